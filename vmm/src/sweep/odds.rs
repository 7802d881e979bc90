//! Odds of a conversion: the closed form, and the confidence in a share that was counted.

/// What a guest meets at each position of a conversion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trouble {
    /// This many replies without progress, each time.
    Stall(u64),
    /// Each reply makes no progress with this probability, 0 to 1.
    Contention(f64),
}

/// How a guest retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// It follows a RETRY at all.
    pub retries: bool,
    /// Replies in a row without progress at which it gives up, 1 or more; `u64::MAX`: never.
    pub bound: u64,
}

/// Positions of a conversion of `range` bytes: pieces that the host converts in one call, when the
/// guest asks for `guest_chunk` bytes at a time (0: all) and the host does `chunk` of them.
#[must_use]
pub fn positions(range: u64, guest_chunk: u64, chunk: u64) -> u64 {
    let piece = if guest_chunk == 0 { range } else { guest_chunk.min(range) };
    let whole = range / piece * piece.div_ceil(chunk);
    whole + (range % piece).div_ceil(chunk)
}

/// The probability, 0 to 1, that a conversion of `positions` ends well, by the guest's bound alone:
/// `(1 - p^b)^n` under contention. `pieces` is how many requests a guest makes that meets no trouble.
#[must_use]
pub fn closed_form(trouble: Trouble, patience: Patience, positions: u64, pieces: u64) -> f64 {
    if !patience.retries && positions > pieces {
        return 0.0;
    }
    let bound = if patience.retries { patience.bound } else { 1 };
    match trouble {
        Trouble::Stall(stall) => f64::from(u8::from(stall < bound)),
        Trouble::Contention(p) if bound == u64::MAX => f64::from(u8::from(p < 1.0)),
        Trouble::Contention(p) => {
            let lost = p.powf(float(bound));
            // As logarithms: n is large, and the probability to be lost at one position tiny.
            (float(positions) * (-lost).ln_1p()).exp()
        }
    }
}

/// The Wilson score interval, 95 %, of a probability of which `hits` of `runs` are known.
#[must_use]
pub fn wilson(hits: u64, runs: u64) -> (f64, f64) {
    const Z: f64 = 1.959_964;
    if runs == 0 {
        return (0.0, 1.0);
    }
    let (n, share) = (float(runs), float(hits) / float(runs));
    let centre = share + Z * Z / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
}

#[expect(clippy::cast_precision_loss, reason = "to the precision of a probability")]
const fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const K4: u64 = 4 << 10;
    const M2: u64 = 2 << 20;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-4
    }

    #[test]
    fn positions_are_pieces_of_pieces() {
        for (range, guest_chunk, chunk, expected) in [
            (M2, 0, K4, 512),
            (M2, 0, M2, 1),
            (M2, 0, 1 << 30, 1),
            (M2, M2 / 4, M2, 4),
            (M2, 3 * K4, 2 * K4, 170 * 2 + 1),
            (M2, 1 << 30, K4, 512),
        ] {
            assert_eq!(positions(range, guest_chunk, chunk), expected, "{guest_chunk} {chunk}");
        }
    }

    #[test]
    fn the_closed_form() {
        let three = Patience { retries: true, bound: 3 };
        // 2 MiB in pieces of 4 KiB at p = 0.1: the figures in the doc of guest `reference`.
        assert!(close(closed_form(Trouble::Contention(0.1), three, 512, 1), 0.5991));
        let eight = Patience { bound: 8, ..three };
        assert!(close(closed_form(Trouble::Contention(0.5), eight, 512, 1), 0.1348));
        assert!(close(closed_form(Trouble::Stall(2), three, 512, 1), 1.0));
        assert!(close(closed_form(Trouble::Stall(3), three, 512, 1), 0.0));
        let never = Patience { retries: false, ..three };
        assert!(close(closed_form(Trouble::Stall(0), never, 2, 1), 0.0));
        assert!(close(closed_form(Trouble::Contention(0.1), never, 2, 2), 0.81));
        let endless = Patience { bound: u64::MAX, ..three };
        assert!(close(closed_form(Trouble::Contention(0.5), endless, 1 << 18, 1), 1.0));
    }

    #[test]
    fn intervals_hold_the_share_and_narrow() {
        assert_eq!(wilson(0, 0), (0.0, 1.0));
        let (low, high) = wilson(5, 10);
        assert!(close(low, 0.2366) && close(high, 0.7634), "{low} {high}");
        let (low, high) = wilson(0, 100);
        assert!(low == 0.0 && close(high, 0.0370), "{high}");
        assert!(wilson(100, 100).1 == 1.0 && close(wilson(100, 100).0, 0.9630));
    }
}
