//! Guests `asterinas-3339` and `asterinas-3845`: `convert_gpa_range` of Asterinas
//! (ostd/src/arch/x86/tdx_guest.rs), whose callers panic when a conversion fails.

use mapgpa_kit::abi::tdcall::{module, status};
use mapgpa_kit::abi::{Direction, PAGE_SIZE};
use mapgpa_kit::{Td, report};

use crate::accept;
use crate::guest::{Conversion, Converted, Guest, GuestInfo};
use crate::map_gpa::{R10_R15, map_gpa};

/// Guest `asterinas-3339`.
pub(crate) const ASTERINAS_3339: GuestInfo = GuestInfo {
    guest: Guest::Asterinas3339,
    name: "asterinas-3339",
    models: "Asterinas since PR 3339 (June 2026), convert_gpa_range()",
    summary: "retries, but compares R11 without the shared bit: to-shared fails at any RETRY",
    retries: true,
    own_bound: Some(3),
    hosted: true,
};

/// Guest `asterinas-3845`.
pub(crate) const ASTERINAS_3845: GuestInfo = GuestInfo {
    guest: Guest::Asterinas3845,
    name: "asterinas-3845",
    models: "Asterinas since PR 3845 (Sept 2026), convert_gpa_range()",
    summary: "retries, checks range and alignment of R11, panics on failure",
    retries: true,
    own_bound: Some(3),
    hosted: true,
};

/// Asterinas since PR 3339 (snapshot 604948581, Aug 2026): R11 must be 4 KiB aligned and in what is
/// left of the range, which is kept without the shared bit. To shared, every RETRY of a correct host
/// is out of range, and one with the bit stripped is taken.
pub(crate) fn convert_3339<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    convert(td, c, c.gpa, c.mask())
}

/// Asterinas since PR 3845 (from its description, not from the code): as 3339, the shared bit being
/// part of the range that R11 is compared with.
pub(crate) fn convert_3845<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    convert(td, c, c.start(), 0)
}

/// The loop of both: `next` is compared with R11, `next | mask` is asked for. Gives up at the third
/// reply in a row that points at the start.
fn convert<T: Td>(td: &mut T, c: &Conversion, mut next: u64, mask: u64) -> Converted {
    let bound = c.bound.or(ASTERINAS_3339.own_bound);
    let end = next.wrapping_add(c.size);
    let mut stalled = 0;
    loop {
        let reply = map_gpa(td, R10_R15, next | mask, end.wrapping_sub(next));
        if reply.r10 == status::SUCCESS {
            break;
        }
        let usable = reply.r10 == status::RETRY
            && (next..end).contains(&reply.r11)
            && reply.r11.is_multiple_of(PAGE_SIZE);
        if !usable {
            report::panic(td, "asterinas: MapGPA failed");
        }
        if reply.r11 != next {
            next = reply.r11;
            stalled = 0;
            continue;
        }
        stalled += 1;
        if stalled >= bound {
            report::panic(td, "asterinas: MapGPA makes no progress");
        }
    }
    if c.to == Direction::ToShared {
        return Ok(0);
    }
    // Crate tdx-guest's `accept_page` returns an error for all but SUCCESS.
    match accept::pages_4k(td, c.gpa, c.size, |rax| rax == module::SUCCESS) {
        Ok(pages) => Ok(pages),
        Err(_) => report::panic(td, "asterinas: a page was not accepted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply, stops};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn asterinas_3339_always_fails_at_a_retry_to_shared() {
        for r11 in [BIT | GPA, BIT | (GPA + K4)] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            assert!(stops(|| convert_3339(&mut td, &conversion(ToShared, M2))));
            assert_eq!(td.panics(), ["asterinas: MapGPA failed"]);
            assert_eq!(td.requests, [(BIT | GPA, M2)]);
        }
    }

    #[test]
    fn asterinas_3339_takes_an_r11_without_the_shared_bit() {
        let mut td = FakeTd::replies([reply::retry(GPA + K4), reply::SUCCESS]);
        assert_eq!(convert_3339(&mut td, &conversion(ToShared, M2)), Ok(0));
        assert_eq!(td.requests[1], (BIT | (GPA + K4), M2 - K4));
    }

    #[test]
    fn asterinas_3845_retries_to_shared_and_rejects_a_stripped_bit() {
        let mut td = FakeTd::replies([reply::retry(BIT | (GPA + K4)), reply::SUCCESS]);
        assert_eq!(convert_3845(&mut td, &conversion(ToShared, M2)), Ok(0));
        assert_eq!(td.requests[1], (BIT | (GPA + K4), M2 - K4));
        let mut td = FakeTd::replies([reply::retry(GPA + K4)]);
        assert!(stops(|| convert_3845(&mut td, &conversion(ToShared, M2))));
    }

    #[test]
    fn asterinas_rejects_an_unaligned_r11_and_gives_up_at_the_third_stall() {
        for convert in [convert_3339, convert_3845] {
            let mut td = FakeTd::replies([reply::retry(GPA + 1)]);
            assert!(stops(|| convert(&mut td, &conversion(ToPrivate, M2))));
            let mut td = FakeTd::always(reply::retry(GPA));
            assert!(stops(|| convert(&mut td, &conversion(ToPrivate, M2))));
            assert_eq!(td.requests.len(), 3);
            assert_eq!(td.panics(), ["asterinas: MapGPA makes no progress"]);
        }
    }

    #[test]
    fn asterinas_accepts_the_whole_range_by_4k_and_panics_at_an_accepted_page() {
        let mut td = FakeTd::replies([reply::retry(GPA + K4), reply::SUCCESS]);
        assert_eq!(convert_3339(&mut td, &conversion(ToPrivate, M2)), Ok(512));
        assert_eq!((td.accepts.len(), td.accepts[0]), (512, GPA));
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_ALREADY_ACCEPTED);
        assert!(stops(|| convert_3339(&mut td, &conversion(ToPrivate, M2))));
        assert_eq!(td.panics(), ["asterinas: a page was not accepted"]);
    }
}
