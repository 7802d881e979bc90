//! Guests `linux-5.19` and `linux-6.7`: `tdx_enc_status_changed` of arch/x86/coco/tdx/tdx.c, behind
//! set_memory_decrypted() and set_memory_encrypted().

use mapgpa_kit::abi::tdcall::{level, status};
use mapgpa_kit::abi::{Direction, PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M};
use mapgpa_kit::{Td, calls};

use crate::guest::{Conversion, Converted, GaveUp, Guest, GuestInfo};
use crate::map_gpa::{ALL_BUT_RBP, R10_R15, map_gpa};

/// Guest `linux-5.19`.
pub(crate) const LINUX_5_19: GuestInfo = GuestInfo {
    guest: Guest::Linux519,
    name: "linux-5.19",
    models: "Linux v5.19 to v6.6, tdx_enc_status_changed()",
    summary: "no retry: any status but SUCCESS is a failure",
    retries: false,
    own_bound: None,
    hosted: true,
};

/// Guest `linux-6.7`.
pub(crate) const LINUX_6_7: GuestInfo = GuestInfo {
    guest: Guest::Linux67,
    name: "linux-6.7",
    models: "Linux v6.7 and later (019b383d1132), tdx_map_gpa()",
    summary: "retries, checks that R11 is in range, not its alignment",
    retries: true,
    own_bound: Some(3),
    hosted: true,
};

/// Linux v5.19 to v6.6: one MapGPA for the whole range; any status but SUCCESS, RETRY among them,
/// fails the conversion, although a part of the pages may be converted.
pub(crate) fn convert_5_19<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    if map_gpa(td, R10_R15, c.start(), c.size).r10 != status::SUCCESS {
        return Err(GaveUp);
    }
    accept_if_private(td, c)
}

/// Linux v6.7 and later (commit 019b383d1132; unchanged in v6.12 and v7.x): restarts from R11, which
/// must be in what is left of the range, shared bit included, but need not be aligned. Gives up at
/// the third reply in a row that points at the start; any other reply resets the count.
pub(crate) fn convert_6_7<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let bound = c.bound.or(LINUX_6_7.own_bound);
    let mut start = c.start();
    let end = start.wrapping_add(c.size);
    let mut stalled = 0;
    loop {
        let reply = map_gpa(td, ALL_BUT_RBP, start, end.wrapping_sub(start));
        match reply.r10 {
            status::SUCCESS => return accept_if_private(td, c),
            status::RETRY => {}
            _ => return Err(GaveUp),
        }
        if reply.r11 < start || reply.r11 >= end {
            return Err(GaveUp);
        }
        if reply.r11 != start {
            start = reply.r11;
            stalled = 0;
            continue;
        }
        stalled += 1;
        if stalled >= bound {
            return Err(GaveUp);
        }
    }
}

fn accept_if_private<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    match c.to {
        Direction::ToShared => Ok(0),
        Direction::ToPrivate => accept_memory(td, c.gpa, c.size),
    }
}

/// `tdx_accept_memory` (v5.19: the tail of `tdx_enc_status_changed`): at each address the largest
/// page that is aligned and fits is tried first. Any answer but SUCCESS means the next smaller size,
/// so that ALREADY_ACCEPTED fails the conversion at 4 KiB.
fn accept_memory<T: Td>(td: &mut T, gpa: u64, size: u64) -> Converted {
    const SIZES: [(u64, u64); 3] =
        [(PAGE_SIZE_1G, level::L1G), (PAGE_SIZE_2M, level::L2M), (PAGE_SIZE, level::L4K)];
    let end = gpa.wrapping_add(size);
    let mut at = gpa;
    while at < end {
        let accepted = SIZES.into_iter().find(|&(page, level)| {
            at.is_multiple_of(page) && end - at >= page && calls::accept(td, at, level) == 0
        });
        let Some((page, _)) = accepted else { return Err(GaveUp) };
        at = at.wrapping_add(page);
    }
    Ok(size / PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};
    use mapgpa_kit::abi::tdcall::module;

    #[test]
    fn linux_5_19_fails_at_a_retry() {
        let mut td = FakeTd::replies([reply::retry(BIT | (GPA + K4))]);
        assert_eq!(convert_5_19(&mut td, &conversion(ToShared, M2)), Err(GaveUp));
        assert_eq!(td.requests, [(BIT | GPA, M2)]);
    }

    #[test]
    fn linux_6_7_gives_up_at_the_third_reply_without_progress() {
        let stall = reply::retry(BIT | GPA);
        let mut td = FakeTd::replies([stall, stall, stall]);
        assert_eq!(convert_6_7(&mut td, &conversion(ToShared, M2)), Err(GaveUp));
        assert_eq!(td.requests.len(), 3);

        let on = reply::retry(BIT | (GPA + K4));
        let mut td = FakeTd::replies([stall, stall, on, on, on, reply::SUCCESS]);
        assert_eq!(convert_6_7(&mut td, &conversion(ToShared, M2)), Ok(0));
        assert_eq!(td.requests[3], (BIT | (GPA + K4), M2 - K4));
    }

    #[test]
    fn linux_6_7_takes_a_bound_from_the_command_line() {
        let c = Conversion { bound: crate::Bound::At(5), ..conversion(ToShared, M2) };
        let mut td = FakeTd::always(reply::retry(BIT | GPA));
        assert_eq!(convert_6_7(&mut td, &c), Err(GaveUp));
        assert_eq!(td.requests.len(), 5);
    }

    #[test]
    fn linux_6_7_rejects_an_r11_outside_the_range() {
        for r11 in [GPA + K4, BIT | (GPA - K4), BIT | (GPA + M2), 0, u64::MAX] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            assert_eq!(convert_6_7(&mut td, &conversion(ToShared, M2)), Err(GaveUp), "{r11:#x}");
            assert_eq!(td.requests.len(), 1);
        }
    }

    #[test]
    fn linux_6_7_creeps_along_with_an_unaligned_r11() {
        let mut td = FakeTd::new(|gpa, _| reply::retry(gpa + 1), |_| 0);
        let c = Conversion { size: K4, ..conversion(ToShared, M2) };
        assert_eq!(convert_6_7(&mut td, &c), Err(GaveUp));
        assert_eq!(td.requests.len(), 4096, "one call a byte, the count reset each time");
    }

    #[test]
    fn linux_accepts_the_whole_range_the_largest_page_first() {
        let gpa = PAGE_SIZE_1G - M2 - K4;
        let size = K4 + M2 + PAGE_SIZE_1G + K4;
        let c = Conversion { gpa, size, ..conversion(ToPrivate, size) };
        let mut td = FakeTd::replies([reply::retry(gpa + M2), reply::SUCCESS]);
        assert_eq!(convert_6_7(&mut td, &c), Ok(size / K4));
        assert_eq!(
            td.accepts,
            [gpa, (gpa + K4) | 1, PAGE_SIZE_1G | 2, PAGE_SIZE_1G * 2],
            "4K up to the boundary, then the largest that fits"
        );
    }

    #[test]
    fn linux_tries_smaller_pages_and_fails_at_one_accepted_before() {
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_ALREADY_ACCEPTED);
        assert_eq!(convert_6_7(&mut td, &conversion(ToPrivate, M2)), Err(GaveUp));
        assert_eq!(td.accepts, [GPA | 1, GPA]);
    }
}
