//! Guest `oak`: `map_gpa` of Oak's crate oak_tdx_guest (oak_tdx_guest/src/vmcall.rs), as the
//! restricted kernel calls it.

use mapgpa_kit::abi::Direction;
use mapgpa_kit::abi::tdcall::{module, status};
use mapgpa_kit::{Td, report};

use crate::accept;
use crate::guest::{Conversion, Converted, Guest, GuestInfo};
use crate::map_gpa::{R10_R13, map_gpa};

/// Guest `oak`.
pub(crate) const OAK: GuestInfo = GuestInfo {
    guest: Guest::Oak,
    name: "oak",
    models: "Oak oak_tdx_guest (578b95116b, Aug 2026), map_gpa()",
    summary: "retries, but a partly done to-shared fails: its upper bound lacks the shared bit",
    retries: true,
    own_bound: Some(3),
    hosted: true,
};

/// Oak's oak_tdx_guest, snapshot 578b95116b (Aug 2026): R11 above the position, which has the shared
/// bit, and below the end, which has not, is progress; R11 at the position is not; anything else is
/// an error. To shared, progress is always an error. Gives up at the third reply in a row without
/// progress. The callers in oak_restricted_kernel_tdx panic on errors and accept by 4 KiB.
///
/// Those callers convert a page at a time, so that the error has not shown; this model asks for the
/// whole range in one call.
pub(crate) fn convert<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let bound = c.bound.or(OAK.own_bound);
    let end = c.gpa.wrapping_add(c.size);
    let mut start = c.start();
    let mut size = c.size;
    let mut stalled = 0;
    loop {
        let reply = map_gpa(td, R10_R13, start, size);
        match reply.r10 {
            status::SUCCESS => break,
            status::RETRY if reply.r11 > start && reply.r11 < end => {
                start = reply.r11;
                size = end - start;
                stalled = 0;
            }
            status::RETRY if reply.r11 == start => {
                stalled += 1;
                if stalled >= bound {
                    report::panic(td, "oak: MapGPA makes no progress");
                }
            }
            _ => report::panic(td, "oak: MapGPA failed"),
        }
    }
    if c.to == Direction::ToShared {
        return Ok(0);
    }
    match accept::pages_4k(td, c.gpa, c.size, |rax| rax == module::SUCCESS) {
        Ok(pages) => Ok(pages),
        Err(_) => report::panic(td, "oak: a page was not accepted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply, stops};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn oak_fails_when_a_part_is_made_shared() {
        let mut td = FakeTd::replies([reply::retry(BIT | (GPA + K4))]);
        assert!(stops(|| convert(&mut td, &conversion(ToShared, M2))));
        assert_eq!(td.panics(), ["oak: MapGPA failed"]);
    }

    #[test]
    fn oak_survives_two_stalls_to_shared_and_stops_at_the_third() {
        let stall = reply::retry(BIT | GPA);
        let mut td = FakeTd::replies([stall, stall, reply::SUCCESS]);
        assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0));
        let mut td = FakeTd::always(stall);
        assert!(stops(|| convert(&mut td, &conversion(ToShared, M2))));
        assert_eq!(td.requests.len(), 3);
        assert_eq!(td.panics(), ["oak: MapGPA makes no progress"]);
    }

    #[test]
    fn oak_retries_to_private_and_accepts_everything() {
        let mut td = FakeTd::replies([reply::retry(GPA + K4), reply::SUCCESS]);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Ok(512));
        assert_eq!(td.requests, [(GPA, M2), (GPA + K4, M2 - K4)]);
        assert_eq!((td.accepts.len(), td.accepts[0]), (512, GPA));
    }

    #[test]
    fn oak_rejects_an_r11_outside_the_range() {
        for r11 in [GPA - K4, GPA + M2, BIT | GPA] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            assert!(stops(|| convert(&mut td, &conversion(ToPrivate, M2))), "{r11:#x}");
        }
    }

    #[test]
    fn oak_panics_at_an_accepted_page() {
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_ALREADY_ACCEPTED);
        assert!(stops(|| convert(&mut td, &conversion(ToPrivate, M2))));
        assert_eq!(td.panics(), ["oak: a page was not accepted"]);
    }
}
