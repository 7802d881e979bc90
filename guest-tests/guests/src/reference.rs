//! Guest `reference`: the MapGPA retry loop that we recommend. Copy it.
//!
//! [`convert_range`] and what is below it need only a way to execute TDCALL. The VMM is taken for an
//! adversary that may also be merely slow. Against what a VMM can do:
//!
//! | VMM | here |
//! |---|---|
//! | converts a part, in either direction, down to 4 KiB a call | restarts at R11 until SUCCESS |
//! | RETRY at the start, a few times | the count of such replies is reset by progress |
//! | the same for ever | gives up at [`STALLS`] in a row, or after [`calls_allowed`] calls |
//! | R11 without the shared bit | out of range, because the range compared has the bit: fails |
//! | R11 at the end, past it, or below the position | out of range: fails, and never goes backwards |
//! | R11 not 4 KiB aligned | fails: there is no such page, and a byte a call would never end |
//! | an error or unknown status, early or late | fails, whatever R11 is |
//! | SUCCESS without conversion | to private, the accept notices; to shared, nothing in a TD can |
//! | accept: a smaller page is mapped | that 2 MiB by 4 KiB |
//! | accept: the page is busy | tries again, [`STALLS`] times in a row at most |
//! | accept: accepted before | fails, see below |
//!
//! Why like this:
//!
//! - **Only R10 decides whether R11 has a meaning.** R11 is read for RETRY alone.
//! - **One comparison with the shared bit in place** of position, R11 and end keeps the direction:
//!   a value between two addresses of one alias is an address of that alias.
//! - **The bound is on replies in a row without progress.** GHCI has none, a guest needs one. 3, as
//!   Linux has, suits a host on which the second try succeeds. Where each reply is fruitless with
//!   probability p, a position fails with p^bound, and 2 MiB in 4 KiB chunks has 512 positions: at
//!   p = 0.1, bound 3 loses 40 % of such conversions, 8 loses 5 in a million; at p = 0.5, 8 loses
//!   87 %, 16 loses 0.8 %. 16 costs a host that stalls for ever 16 calls, well under a millisecond.
//! - **A second bound on all calls**, because a host can stall [`STALLS`] - 1 times at each page.
//! - **The whole range is accepted after the last request**, from the caller's variables and not from
//!   the loop's: accepting only what the last request covered leaves the rest pending.
//! - **ALREADY_ACCEPTED is a failure.** It says that the host did not remove the page, so that it has
//!   its private contents from before it was shared; a caller that expects zeroes would get those. A
//!   guest that knows which of its pages are shared never sees it from an honest host. If yours may
//!   convert pages that are private already, zero such a page (2 MiB of it, if that was accepted) and
//!   go on, as COCONUT-SVSM does; to take it for accepted without that is wrong.
//! - **Nothing is rolled back.** The host that refused would have to be asked again. After a failure
//!   each page of the range may be shared, pending or private: take the range out of use for good,
//!   touch it through neither alias, and put no secret there. [`Failure::done`] says how far it got.

use core::fmt;

use mapgpa_kit::abi::tdcall::{Regs, leaf, level, module, status, sub};
use mapgpa_kit::abi::{Direction, PAGE_SIZE, PAGE_SIZE_2M};
use mapgpa_kit::{Td, report};

use crate::guest::{Conversion, Converted, GaveUp, Guest, GuestInfo};
use crate::line::Line;

/// Guest `reference`.
pub(crate) const REFERENCE: GuestInfo = GuestInfo {
    guest: Guest::Reference,
    name: "reference",
    models: "the retry loop that we recommend",
    summary: "retries, checks all of R11, bounds stalls and calls, accepts the whole range",
    retries: true,
    own_bound: Some(STALLS),
    hosted: true,
};

/// [`convert_range`] as a guest test; a failure is also explained in a line of text.
pub(crate) fn convert<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let bound = c.bound.or(Some(STALLS));
    convert_range(td, c.gpa, c.size, c.to, c.shared_bit, bound).map_err(|failure| {
        let Failure { reason, done } = failure;
        let line = Line::new(format_args!("reference: after {done:#x} bytes: {reason}"));
        report::text(td, line.as_str());
        GaveUp
    })
}

/// Replies in a row without progress at which the conversion fails.
pub const STALLS: u64 = 16;

/// All calls of one conversion, for `pages` pages of 4 KiB: four a page, and some for small ranges.
#[must_use]
pub const fn calls_allowed(pages: u64) -> u64 {
    pages.saturating_mul(4).saturating_add(4096)
}

/// Why a conversion failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The range is empty, unaligned, wraps around, or reaches the shared bit. Nothing was asked.
    Range,
    /// The TDX module refused the call: RAX.
    Module(u64),
    /// The VMM refused: R10.
    Status(u64),
    /// RETRY with an R11 that is not a page of what is left of the range: R11.
    Restart(u64),
    /// Too many replies in a row without progress.
    Stalled,
    /// Too many calls.
    Calls,
    /// A page was not accepted: RAX.
    Accept(u64),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range => write!(f, "not a range of pages below the shared bit"),
            Self::Module(rax) => write!(f, "RAX {rax:#x} from the TDX module"),
            Self::Status(r10) => write!(f, "status {r10:#x}"),
            Self::Restart(r11) => write!(f, "R11 {r11:#x} is no page of what is left"),
            Self::Stalled => write!(f, "too many replies without progress"),
            Self::Calls => write!(f, "too many calls"),
            Self::Accept(rax) => write!(f, "RAX {rax:#x} from accept"),
        }
    }
}

/// A failed conversion. The range must not be used, except after [`Reason::Range`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// Why.
    pub reason: Reason,
    /// Bytes from the start that the VMM claims to have converted or, after [`Reason::Accept`], that
    /// are accepted. What follows is in an unknown state.
    pub done: u64,
}

/// Converts `size` bytes at `gpa` (no shared bit) and, to private, accepts them; returns the 4 KiB
/// pages accepted. `bound` is the number of replies in a row without progress at which it fails;
/// [`STALLS`] if in doubt.
///
/// # Errors
/// [`Failure`]; what it means for the caller is above.
pub fn convert_range<T: Td>(
    td: &mut T,
    gpa: u64,
    size: u64,
    to: Direction,
    shared_bit: u64,
    bound: u64,
) -> Result<u64, Failure> {
    let aligned = gpa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE) && size != 0;
    let below_shared_bit = gpa.checked_add(size).is_some_and(|end| end <= shared_bit);
    let start = if to == Direction::ToShared { gpa | shared_bit } else { gpa };
    let (true, true, Some(end)) = (aligned, below_shared_bit, start.checked_add(size)) else {
        return Err(Failure { reason: Reason::Range, done: 0 });
    };
    map(td, start, end, bound)?;
    match to {
        Direction::ToShared => Ok(0),
        Direction::ToPrivate => accept(td, start, end),
    }
}

/// MapGPA from `start` to `end`, both with the shared bit as requests carry it.
fn map<T: Td>(td: &mut T, start: u64, end: u64, bound: u64) -> Result<(), Failure> {
    let mut next = start;
    let mut stalled = 0;
    let mut reason = Reason::Calls;
    for _ in 0..calls_allowed((end - start) / PAGE_SIZE) {
        let mut regs = Regs::vmcall(sub::MAP_GPA, next, end - next);
        td.tdcall(&mut regs);
        let restart = regs.r11;
        reason = match (regs.rax, regs.r10) {
            (module::SUCCESS, status::SUCCESS) => return Ok(()),
            (module::SUCCESS, status::RETRY) if restart == next => {
                stalled += 1;
                if stalled < bound {
                    continue;
                }
                Reason::Stalled
            }
            (module::SUCCESS, status::RETRY)
                if restart > next && restart < end && restart.is_multiple_of(PAGE_SIZE) =>
            {
                next = restart;
                stalled = 0;
                continue;
            }
            (module::SUCCESS, status::RETRY) => Reason::Restart(restart),
            (module::SUCCESS, refusal) => Reason::Status(refusal),
            (rax, _) => Reason::Module(rax),
        };
        break;
    }
    Err(Failure { reason, done: next - start })
}

/// Accepts from `start` to `end`, 2 MiB at a time where that is aligned, fits and is mapped so.
fn accept<T: Td>(td: &mut T, start: u64, end: u64) -> Result<u64, Failure> {
    let mut next = start;
    // Up to where 2 MiB was tried in vain.
    let mut small_until = start;
    let mut busy = 0;
    while next < end {
        let large =
            next >= small_until && next.is_multiple_of(PAGE_SIZE_2M) && end - next >= PAGE_SIZE_2M;
        let (page, level) =
            if large { (PAGE_SIZE_2M, level::L2M) } else { (PAGE_SIZE, level::L4K) };
        let mut regs = Regs { rax: leaf::MEM_PAGE_ACCEPT, rcx: next | level, ..Regs::default() };
        td.tdcall(&mut regs);
        // The low half has details, such as the level, and is no part of the status.
        match regs.rax & module::STATUS_MASK {
            module::SUCCESS => {
                next += page;
                busy = 0;
            }
            module::PAGE_SIZE_MISMATCH if large => small_until = next + PAGE_SIZE_2M,
            // Another vCPU or the host holds the page's Secure EPT entry.
            module::OPERAND_BUSY if busy + 1 < STALLS => busy += 1,
            _ => {
                return Err(Failure { reason: Reason::Accept(regs.rax), done: next - start });
            }
        }
    }
    Ok((end - start) / PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};
    use mapgpa_kit::abi::channel::tag;

    fn run(td: &mut FakeTd, to: Direction) -> Result<u64, Failure> {
        convert_range(td, GPA, M2, to, BIT, STALLS)
    }

    fn fails(reason: Reason, done: u64) -> Result<u64, Failure> {
        Err(Failure { reason, done })
    }

    #[test]
    fn partial_progress_is_followed_in_both_directions() {
        for chunk in [K4, 16 * K4, 511 * K4, M2] {
            let mut td = FakeTd::chunked(chunk);
            assert_eq!(run(&mut td, ToShared), Ok(0));
            assert_eq!(td.requests.len() as u64, M2.div_ceil(chunk));
            assert!(td.requests.iter().all(|(gpa, size)| gpa + size == (BIT | (GPA + M2))));
            let mut td = FakeTd::chunked(chunk);
            assert_eq!(run(&mut td, ToPrivate), Ok(512));
            assert_eq!(td.accepts, [GPA | 1], "the whole range, not the tail");
        }
    }

    #[test]
    fn stalls_are_survived_up_to_the_bound_and_counted_anew_after_progress() {
        let host = |stalls: u64| {
            let mut left = stalls;
            move |gpa, size| {
                if left > 0 {
                    left -= 1;
                    return reply::retry(gpa);
                }
                left = stalls;
                if size == K4 { reply::SUCCESS } else { reply::retry(gpa + K4) }
            }
        };
        // 2 at every position is what a legal policy may do.
        for stalls in [1, 2, 3] {
            let mut td = FakeTd::new(host(stalls), |_| 0);
            assert_eq!(run(&mut td, ToShared), Ok(0), "{stalls}");
        }
        let mut td = FakeTd::new(host(STALLS), |_| 0);
        assert_eq!(run(&mut td, ToShared), fails(Reason::Stalled, 0));
        assert_eq!(td.requests.len() as u64, STALLS);
        // As many as can be at every page: the bound on all calls ends it.
        let mut td = FakeTd::new(host(STALLS - 1), |_| 0);
        let Err(Failure { reason: Reason::Calls, done }) = run(&mut td, ToShared) else {
            panic!("no bound on calls");
        };
        assert_eq!(td.requests.len() as u64, calls_allowed(512));
        assert_eq!(done, calls_allowed(512) / STALLS * K4);
    }

    #[test]
    fn every_bad_r11_is_rejected_at_once() {
        let next = BIT | (GPA + 4 * K4);
        for r11 in [
            BIT | (GPA + M2),            // the end
            BIT | (GPA + M2 + K4),       // past it
            BIT | (GPA + 512 * M2),      // far past it
            BIT | GPA,                   // backwards, in the range
            next - K4,                   // the page before
            BIT | (GPA - K4),            // below the range
            GPA + 8 * K4,                // without the shared bit
            GPA,                         // the same, at the start
            next + 1,                    // creeping
            next + K4 + 0x800,           // unaligned
            (BIT << 1) | (GPA + 8 * K4), // another high bit
            next | (1 << 63),            // a high bit too many
            0,
            u64::MAX,
        ] {
            let mut td = FakeTd::replies([reply::retry(next), reply::retry(r11)]);
            assert_eq!(run(&mut td, ToShared), fails(Reason::Restart(r11), 4 * K4), "{r11:#x}");
        }
        for r11 in [BIT | (GPA + K4), BIT | GPA] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            assert_eq!(run(&mut td, ToPrivate), fails(Reason::Restart(r11), 0), "direction");
        }
    }

    #[test]
    fn every_other_status_is_a_failure() {
        for status in [
            status::INVALID_OPERAND,
            status::GPA_INUSE,
            status::ALIGN_ERROR,
            status::SUBFUNC_UNSUPPORTED,
            2,
            u64::MAX,
        ] {
            let mut td = FakeTd::replies([reply::retry(GPA + K4), (status, GPA + 2 * K4)]);
            assert_eq!(run(&mut td, ToPrivate), fails(Reason::Status(status), K4));
            assert_eq!(td.accepts, []);
        }
    }

    #[test]
    fn a_bad_range_is_not_asked_for() {
        for (gpa, size) in [
            (GPA, 0),
            (GPA + 1, K4),
            (GPA, K4 - 1),
            (u64::MAX - K4 + 1, K4),
            (u64::MAX - K4 + 1, 2 * K4),
            (BIT, K4),
            (BIT - K4, 2 * K4),
            (GPA | BIT, K4),
        ] {
            for to in [ToShared, ToPrivate] {
                let mut td = FakeTd::always(reply::SUCCESS);
                let limit = u64::MAX;
                let result = convert_range(&mut td, gpa, size, to, BIT, limit);
                assert_eq!(result, fails(Reason::Range, 0), "{gpa:#x} {size:#x}");
                assert_eq!(td.requests, []);
            }
        }
        let mut td = FakeTd::always(reply::SUCCESS);
        let top = convert_range(&mut td, BIT - K4, K4, ToShared, BIT, u64::MAX);
        assert_eq!(top, Ok(0), "the last page below the shared bit is fine");
    }

    #[test]
    fn accepts_fall_to_4k_for_one_2m_page_only() {
        let mismatch = |rcx| if rcx == GPA | 1 { module::PAGE_SIZE_MISMATCH | 1 } else { 0 };
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, mismatch);
        let limit = STALLS;
        let size = 2 * M2 + K4;
        assert_eq!(convert_range(&mut td, GPA, size, ToPrivate, BIT, limit), Ok(1025));
        assert_eq!(td.accepts.len(), 1 + 512 + 1 + 1);
        assert_eq!(td.accepts[513], (GPA + M2) | 1);
        assert_eq!(td.accepts[514], GPA + 2 * M2);
    }

    #[test]
    fn an_accept_that_fails_is_a_failure() {
        for rax in [
            module::PAGE_ALREADY_ACCEPTED,
            module::PAGE_ALREADY_ACCEPTED | 1,
            module::OPERAND_INVALID | 1,
            module::OPERAND_BUSY | 1,
        ] {
            let mut td = FakeTd::new(|_, _| reply::SUCCESS, move |_| rax);
            assert_eq!(run(&mut td, ToPrivate), fails(Reason::Accept(rax), 0));
        }
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_SIZE_MISMATCH);
        let rax = module::PAGE_SIZE_MISMATCH;
        assert_eq!(run(&mut td, ToPrivate), fails(Reason::Accept(rax), 0), "at 4K, no way down");
        assert_eq!(td.accepts, [GPA | 1, GPA]);
    }

    #[test]
    fn a_busy_page_is_tried_again() {
        let mut calls = 0;
        let busy_twice = move |_| {
            calls += 1;
            if calls <= 2 { module::OPERAND_BUSY } else { 0 }
        };
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, busy_twice);
        assert_eq!(run(&mut td, ToPrivate), Ok(512));
        assert_eq!(td.accepts.len(), 3);
    }

    #[test]
    fn the_guest_test_explains_a_failure() {
        let mut td = FakeTd::replies([reply::retry(GPA + K4), reply::retry(GPA + K4 + 1)]);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Err(GaveUp));
        assert_eq!(
            td.texts(tag::TEXT),
            ["reference: after 0x1000 bytes: R11 0x40201001 is no page of what is left"]
        );
    }
}
