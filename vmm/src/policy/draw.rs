//! Random draws that derive from (seed, vCPU, call), and the mixes made of them.
//!
//! Every call has a stream of its own, so that no draw depends on what other vCPUs do or on how
//! many draws an earlier call made.

use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::status;
use rand_core::{Rng, SeedableRng};
use rand_xoshiro::SplitMix64;

use super::r11::{Anchor, NAMED, R11};
use super::{Amount, Context, Decision, Mix, Request, Say};

/// A stream of draws.
#[derive(Debug, Clone)]
pub struct Draw(SplitMix64);

impl Draw {
    /// The stream of MapGPA call number `call` of `vcpu`.
    #[must_use]
    pub fn for_call(seed: u64, vcpu: u32, call: u64) -> Self {
        Self::keyed(seed, u64::from(vcpu) << 1, call)
    }

    /// The stream of accept number `accept` of `vcpu`.
    #[must_use]
    pub fn for_accept(seed: u64, vcpu: u32, accept: u64) -> Self {
        Self::keyed(seed, u64::from(vcpu) << 1 | 1, accept)
    }

    fn keyed(seed: u64, stream: u64, index: u64) -> Self {
        let mut key = SplitMix64::seed_from_u64(seed);
        let key = key.next_u64() ^ stream;
        let key = SplitMix64::seed_from_u64(key).next_u64() ^ index;
        Self(SplitMix64::seed_from_u64(key))
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The high half of the product: unbiased enough for limits far below 2^64.
        let wide = u128::from(self.0.next_u64()) * u128::from(limit);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// True with `probability`, 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in f64")]
    pub fn chance(&mut self, probability: f64) -> bool {
        ((self.0.next_u64() >> 11) as f64) < probability * (1u64 << 53) as f64
    }
}

/// Decides a request by a mix.
pub(super) fn decide(mix: Mix, request: &Request, context: &Context) -> Decision {
    let mut draw = Draw::for_call(context.seed, request.vcpu, request.call);
    let pages = request.size / PAGE_SIZE;
    let say = match mix {
        Mix::Legal => Say::Truth,
        Mix::Hostile => match draw.below(10) {
            0..6 => Say::Truth,
            6..8 => Say::Retry(odd_r11(&mut draw)),
            8 => Say::Status(odd_status(&mut draw)),
            _ => Say::Success,
        },
    };
    let convert = if say == Say::Truth && context.no_progress < 2 && draw.chance(0.25) {
        Amount::Pages(0)
    } else {
        match draw.below(8) {
            0 => Amount::All,
            1 => Amount::Pages(1),
            // Any size with the same weight for each power of two.
            _ => {
                let power = draw.below(u64::from(pages.ilog2()) + 1);
                Amount::Pages(1 + draw.below(1 << power))
            }
        }
    };
    Decision { convert, say, special: true, keep: false }
}

fn odd_r11(draw: &mut Draw) -> R11 {
    let named = NAMED.len() as u64;
    match draw.below(named + 4) {
        pick if pick < named => usize::try_from(pick).map_or(NAMED[0].1, |pick| NAMED[pick].1),
        _ => {
            let anchor = [Anchor::Start, Anchor::Next, Anchor::End, Anchor::Zero];
            let offset = [-4097, -4096, -1, 0, 1, 2048, 4095, 4096, 4097, i64::MAX, i64::MIN];
            let pick =
                |draw: &mut Draw, len: usize| usize::try_from(draw.below(len as u64)).unwrap_or(0);
            R11::new(anchor[pick(draw, anchor.len())], offset[pick(draw, offset.len())])
        }
    }
}

fn odd_status(draw: &mut Draw) -> u64 {
    match draw.below(6) {
        0 => status::INVALID_OPERAND,
        1 => status::GPA_INUSE,
        2 => status::ALIGN_ERROR,
        3 => status::SUBFUNC_UNSUPPORTED,
        4 => 2,
        _ => 1 << 62,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_and_repeat() {
        let first = |mut draw: Draw| draw.below(u64::MAX);
        let a = first(Draw::for_call(1, 0, 1));
        assert_eq!(a, first(Draw::for_call(1, 0, 1)));
        for other in [
            Draw::for_call(2, 0, 1),
            Draw::for_call(1, 1, 1),
            Draw::for_call(1, 0, 2),
            Draw::for_accept(1, 0, 1),
        ] {
            assert_ne!(a, first(other));
        }
    }

    #[test]
    fn chances_are_as_asked() {
        let hits = (0..10_000).filter(|n| Draw::for_call(7, 0, *n).chance(0.1)).count();
        assert!((900..1100).contains(&hits), "{hits}");
        assert!(!Draw::for_call(7, 0, 0).chance(0.0));
        assert!(Draw::for_call(7, 0, 0).chance(1.0));
    }
}
