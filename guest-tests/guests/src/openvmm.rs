//! Guest `openvmm`: `tdcall_map_gpa` and `accept_pages` of OpenVMM (vm/x86/tdcall/src/lib.rs) as
//! openhcl_boot calls them (openhcl/openhcl_boot/src/arch/x86_64/tdx.rs).

use mapgpa_kit::abi::tdcall::{level, module, status};
use mapgpa_kit::abi::{Direction, PAGE_SIZE, PAGE_SIZE_2M};
use mapgpa_kit::{Td, calls, report};

use crate::guest::{Conversion, Converted, GaveUp, Guest, GuestInfo};
use crate::map_gpa::{R10_R13, map_gpa};

/// Guest `openvmm`.
pub(crate) const OPENVMM: GuestInfo = GuestInfo {
    guest: Guest::Openvmm,
    name: "openvmm",
    models: "OpenVMM openhcl_boot (1488a37b7, Aug 2026), tdcall_map_gpa()",
    summary: "restarts from whatever R11 says until it is past the end; panics on errors",
    retries: true,
    own_bound: None,
    hosted: true,
};

/// OpenVMM's openhcl_boot, snapshot 1488a37b7 (Aug 2026): goes on while the position is below the
/// end, and takes R11 for the position unchecked. R11 at or past the end is success with nothing
/// converted; R11 below the start or without the shared bit asks for pages outside the range or
/// flips the direction; R11 at the start never ends. `change_page_visibility` panics on an error
/// status, its callers on an accept that fails.
///
/// The original's shared bit is a constant, bit 47; here it is the guest's.
pub(crate) fn convert<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let bound = c.bound.or(OPENVMM.own_bound);
    let mut gpa = match c.to {
        Direction::ToShared => c.gpa | c.shared_bit,
        Direction::ToPrivate => c.gpa & !c.shared_bit,
    };
    let end = gpa.wrapping_add(c.size);
    let mut stalled = 0;
    while gpa < end {
        let reply = map_gpa(td, R10_R13, gpa, end - gpa);
        match reply.r10 {
            status::SUCCESS => break,
            status::RETRY => {
                stalled = if reply.r11 == gpa { stalled + 1 } else { 0 };
                if stalled >= bound {
                    return Err(GaveUp);
                }
                gpa = reply.r11;
            }
            _ => report::panic(td, "openhcl_boot: page visibility not changed"),
        }
    }
    match c.to {
        Direction::ToShared => Ok(0),
        Direction::ToPrivate => Ok(accept_pages(td, c.gpa, c.size)),
    }
}

/// `accept_pages`: 2 MiB pages where they are aligned and fit, else 4 KiB. A 2 MiB page of which a
/// smaller one is mapped is done by 4 KiB; any other answer but SUCCESS panics.
fn accept_pages<T: Td>(td: &mut T, gpa: u64, size: u64) -> u64 {
    let end = gpa.wrapping_add(size);
    let mut at = gpa;
    // Where a 2 MiB page that is done by 4 KiB ends.
    let mut small_until = gpa;
    while at < end {
        let large =
            at >= small_until && at.is_multiple_of(PAGE_SIZE_2M) && end - at >= PAGE_SIZE_2M;
        let (page, level) =
            if large { (PAGE_SIZE_2M, level::L2M) } else { (PAGE_SIZE, level::L4K) };
        match calls::accept(td, at, level) & module::STATUS_MASK {
            module::SUCCESS => at = at.wrapping_add(page),
            module::PAGE_SIZE_MISMATCH if large => small_until = at.wrapping_add(PAGE_SIZE_2M),
            module::PAGE_ALREADY_ACCEPTED => {
                report::panic(td, "openhcl_boot: a page was accepted before")
            }
            _ => report::panic(td, "openhcl_boot: a page was not accepted"),
        }
    }
    size / PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply, stops};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn openvmm_takes_an_r11_at_or_past_the_end_for_success() {
        for r11 in [BIT | (GPA + M2), BIT | (GPA + 64 * M2), u64::MAX] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0), "{r11:#x}");
        }
    }

    #[test]
    fn openvmm_flips_the_direction_when_the_bit_is_stripped() {
        let mut td = FakeTd::replies([reply::retry(GPA + K4), reply::SUCCESS]);
        assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0));
        assert_eq!(td.requests[1], (GPA + K4, BIT + M2 - K4));
    }

    #[test]
    fn openvmm_goes_below_the_start() {
        let mut td = FakeTd::replies([reply::retry(GPA - M2), reply::SUCCESS]);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Ok(512));
        assert_eq!(td.requests[1], (GPA - M2, 2 * M2));
    }

    #[test]
    fn openvmm_never_gives_up_unless_told_to() {
        let c = Conversion { bound: crate::Bound::At(100), ..conversion(ToShared, M2) };
        let mut td = FakeTd::always(reply::retry(BIT | GPA));
        assert_eq!(convert(&mut td, &c), Err(GaveUp));
        assert_eq!(td.requests.len(), 100);
    }

    #[test]
    fn openvmm_panics_on_errors_and_accepted_pages() {
        let mut td = FakeTd::replies([reply::error(status::GPA_INUSE)]);
        assert!(stops(|| convert(&mut td, &conversion(ToShared, M2))));
        assert_eq!(td.panics(), ["openhcl_boot: page visibility not changed"]);
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_ALREADY_ACCEPTED | 1);
        assert!(stops(|| convert(&mut td, &conversion(ToPrivate, M2))));
        assert_eq!(td.panics(), ["openhcl_boot: a page was accepted before"]);
    }

    #[test]
    fn openvmm_accepts_by_4k_only_the_2m_that_does_not_match() {
        let mismatch = |rcx| if rcx == GPA | 1 { module::PAGE_SIZE_MISMATCH | 1 } else { 0 };
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, mismatch);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, 2 * M2)), Ok(1024));
        assert_eq!(td.accepts.len(), 1 + 512 + 1);
        assert_eq!(td.accepts[513], (GPA + M2) | 1);
    }
}
