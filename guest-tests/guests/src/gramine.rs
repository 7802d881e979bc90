//! Guests `gramine-pre34` and `gramine-34`: `shared_memory_init` of gramine-tdx
//! (pal/src/host/tdx/pal_main.c), which makes the region shared with the host at start-up.
//!
//! Essential to both: the result of MapGPA goes into a variable that hides the one which the
//! function returns. That one keeps its first value, 1 (RETRY), and the caller stops at a negative
//! value only: an error status looks like success. Only an R11 out of range is seen as failure.
//!
//! The original never converts back. To private, these models run the same loop without the shared
//! bit, then accept by 4 KiB and stop at any answer but SUCCESS.

use mapgpa_kit::abi::Direction;
use mapgpa_kit::abi::tdcall::{module, status};
use mapgpa_kit::{Td, report};

use crate::accept;
use crate::guest::{Conversion, Converted, GaveUp, Guest, GuestInfo};
use crate::map_gpa::{R10_R13, map_gpa};

/// Guest `gramine-pre34`.
pub(crate) const GRAMINE_PRE34: GuestInfo = GuestInfo {
    guest: Guest::GraminePre34,
    name: "gramine-pre34",
    models: "gramine-tdx before PR 34 (f4405d38), shared_memory_init()",
    summary: "compares R11 without the shared bit: RETRY fails; error statuses are swallowed",
    retries: true,
    own_bound: None,
    hosted: true,
};

/// Guest `gramine-34`.
pub(crate) const GRAMINE_34: GuestInfo = GuestInfo {
    guest: Guest::Gramine34,
    name: "gramine-34",
    models: "gramine-tdx since PR 34 (July 2024), shared_memory_init()",
    summary: "retries, strips the shared bit of R11; error statuses are swallowed",
    retries: true,
    own_bound: None,
    hosted: true,
};

/// gramine-tdx before PR 34: R11 as the host gave it is compared with the range without the shared
/// bit, so that every RETRY of a correct host ends the guest.
pub(crate) fn convert_pre34<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    convert(td, c, 0)
}

/// gramine-tdx since PR 34: the shared bit of R11 is cleared first, whether it was set or not.
pub(crate) fn convert_34<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    convert(td, c, c.shared_bit)
}

/// The loop of both; `strip` are the bits cleared in R11. No bound of its own on anything.
fn convert<T: Td>(td: &mut T, c: &Conversion, strip: u64) -> Converted {
    let bound = c.bound.or(None);
    let mut next = c.gpa;
    let mut size = c.size;
    let mut stalled = 0;
    loop {
        let reply = map_gpa(td, R10_R13, next | c.mask(), size);
        if reply.r10 != status::RETRY {
            // SUCCESS and errors alike.
            break;
        }
        let failed = reply.r11 & !strip;
        if !(next <= failed && failed < next.wrapping_add(size)) {
            report::panic(td, "gramine: no shared memory, R11 is out of range");
        }
        stalled = if failed == next { stalled + 1 } else { 0 };
        if stalled >= bound {
            return Err(GaveUp);
        }
        size -= failed - next;
        next = failed;
    }
    if c.to == Direction::ToShared {
        return Ok(0);
    }
    match accept::pages_4k(td, c.gpa, c.size, |rax| rax == module::SUCCESS) {
        Ok(pages) => Ok(pages),
        Err(_) => report::panic(td, "gramine: a page was not accepted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply, stops};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn gramine_pre34_always_fails_at_a_retry_to_shared() {
        for r11 in [BIT | GPA, BIT | (GPA + K4)] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            assert!(stops(|| convert_pre34(&mut td, &conversion(ToShared, M2))));
            assert_eq!(td.panics().len(), 1);
        }
    }

    #[test]
    fn gramine_34_takes_r11_with_and_without_the_shared_bit() {
        for r11 in [BIT | (GPA + K4), GPA + K4] {
            let mut td = FakeTd::replies([reply::retry(r11), reply::SUCCESS]);
            assert_eq!(convert_34(&mut td, &conversion(ToShared, M2)), Ok(0));
            assert_eq!(td.requests, [(BIT | GPA, M2), (BIT | (GPA + K4), M2 - K4)]);
        }
    }

    #[test]
    fn gramine_swallows_errors() {
        for convert in [convert_pre34, convert_34] {
            let mut td = FakeTd::replies([reply::error(status::INVALID_OPERAND)]);
            assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0));
        }
    }

    #[test]
    fn gramine_34_stops_at_an_r11_out_of_range() {
        for r11 in [BIT | (GPA + M2), BIT | (GPA - 1), GPA + M2] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            assert!(stops(|| convert_34(&mut td, &conversion(ToShared, M2))), "{r11:#x}");
        }
    }

    #[test]
    fn gramine_has_no_bound_but_takes_one() {
        let c = Conversion { bound: crate::Bound::At(40), ..conversion(ToPrivate, M2) };
        let mut td = FakeTd::always(reply::retry(GPA));
        assert_eq!(convert_34(&mut td, &c), Err(GaveUp));
        assert_eq!(td.requests.len(), 40);
    }
}
