//! Guest `svsm`: `tdvmcall_map_gpa` and `td_accept_physical_memory` of COCONUT-SVSM
//! (kernel/src/tdx/tdcall.rs), behind `page_state_change` of kernel/src/platform/tdp.rs.

use mapgpa_kit::abi::tdcall::{level, module, status};
use mapgpa_kit::abi::{Alias, Direction, PAGE_SIZE, PAGE_SIZE_2M};
use mapgpa_kit::{Td, calls};

use crate::guest::{Conversion, Converted, GaveUp, Guest, GuestInfo};
use crate::map_gpa::{R10_R13, map_gpa};

/// Guest `svsm`.
pub(crate) const SVSM: GuestInfo = GuestInfo {
    guest: Guest::Svsm,
    name: "svsm",
    models: "COCONUT-SVSM since Apr 2025 (f4bc4bcd, Aug 2026), tdvmcall_map_gpa()",
    summary: "restarts from whatever R11 says, until SUCCESS or an error",
    retries: true,
    own_bound: None,
    hosted: true,
};

/// COCONUT-SVSM, snapshot f4bc4bcd (Aug 2026), release build: takes R11 for the position unchecked,
/// on purpose, until the status is not RETRY. R11 at the end asks for size 0, past the end for a size
/// that wraps around. An error status or a failed accept is returned to the caller.
pub(crate) fn convert<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let bound = c.bound.or(SVSM.own_bound);
    let mut gpa = c.start();
    let end = gpa.wrapping_add(c.size);
    let mut stalled = 0;
    loop {
        let reply = map_gpa(td, R10_R13, gpa, end.wrapping_sub(gpa));
        match reply.r10 {
            status::SUCCESS => break,
            status::RETRY => {}
            _ => return Err(GaveUp),
        }
        stalled = if reply.r11 == gpa { stalled + 1 } else { 0 };
        if stalled >= bound {
            return Err(GaveUp);
        }
        gpa = reply.r11;
    }
    match c.to {
        Direction::ToShared => Ok(0),
        Direction::ToPrivate => accept_memory(td, c.gpa, c.size),
    }
}

/// `td_accept_physical_memory`: 2 MiB pages where they are aligned and fit, else 4 KiB, and 4 KiB up
/// to the next 2 MiB boundary where a smaller page is mapped. A page accepted before is zeroed, and
/// that is fine; a failure is returned.
///
/// Zeroing is one write to each 4 KiB page: which pages are touched is what a VMM sees.
fn accept_memory<T: Td>(td: &mut T, gpa: u64, size: u64) -> Converted {
    let end = gpa.wrapping_add(size);
    let mut at = gpa;
    while at < end {
        if at.is_multiple_of(PAGE_SIZE_2M) && end - at >= PAGE_SIZE_2M {
            let rax = accept_page(td, at, level::L2M);
            if rax & module::ERROR_BIT == 0 {
                zero_if_accepted_before(td, rax, at, PAGE_SIZE_2M);
                at = at.wrapping_add(PAGE_SIZE_2M);
                continue;
            }
            if rax & module::STATUS_MASK != module::PAGE_SIZE_MISMATCH {
                return Err(GaveUp);
            }
        }
        let rax = accept_page(td, at, level::L4K);
        if rax & module::ERROR_BIT != 0 {
            return Err(GaveUp);
        }
        zero_if_accepted_before(td, rax, at, PAGE_SIZE);
        at = at.wrapping_add(PAGE_SIZE);
    }
    Ok(size / PAGE_SIZE)
}

/// `tdg_mem_page_accept`: an error that the TDX module calls recoverable, such as OPERAND_BUSY, is tried
/// again for ever.
fn accept_page<T: Td>(td: &mut T, gpa: u64, level: u64) -> u64 {
    loop {
        let rax = calls::accept(td, gpa, level);
        // `tdx_recoverable_error`: bit 63 is ERROR, bit 62 NON_RECOVERABLE.
        if rax >> 62 != 2 {
            return rax;
        }
    }
}

fn zero_if_accepted_before<T: Td>(td: &mut T, rax: u64, gpa: u64, size: u64) {
    if calls::already_accepted(rax) {
        for page in 0..size / PAGE_SIZE {
            td.write(Alias::Private, gpa.wrapping_add(page * PAGE_SIZE), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn svsm_asks_for_size_0_when_r11_is_the_end() {
        let end = BIT | (GPA + M2);
        let mut td = FakeTd::replies([reply::retry(end), reply::error(status::INVALID_OPERAND)]);
        assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Err(GaveUp));
        assert_eq!(td.requests[1], (end, 0));
    }

    #[test]
    fn svsm_wraps_the_size_when_r11_is_past_the_end() {
        let past = BIT | (GPA + M2 + K4);
        let mut td = FakeTd::replies([reply::retry(past), reply::SUCCESS]);
        assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0));
        assert_eq!(td.requests[1], (past, K4.wrapping_neg()));
    }

    #[test]
    fn svsm_tries_a_busy_page_again_until_it_is_not() {
        let mut left = 100;
        let busy = move |_| {
            left -= 1;
            if left > 0 { module::OPERAND_BUSY | module::OPERAND_RCX } else { 0 }
        };
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, busy);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Ok(512));
        assert_eq!(td.accepts, [GPA | 1; 100]);
    }

    #[test]
    fn svsm_flips_the_direction_and_goes_below_the_start() {
        for r11 in [GPA + K4, BIT | (GPA - K4)] {
            let mut td = FakeTd::replies([reply::retry(r11), reply::SUCCESS]);
            assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0));
            assert_eq!(td.requests[1], (r11, (BIT | (GPA + M2)) - r11));
        }
    }

    #[test]
    fn svsm_zeroes_pages_that_were_accepted_before() {
        let mut td = FakeTd::new(
            |_, _| reply::SUCCESS,
            |rcx| match rcx {
                rcx if rcx == GPA | 1 => module::PAGE_SIZE_MISMATCH | 1,
                rcx if rcx == GPA + K4 => module::PAGE_ALREADY_ACCEPTED,
                rcx if rcx == (GPA + M2) | 1 => module::PAGE_ALREADY_ACCEPTED | 1,
                _ => 0,
            },
        );
        assert_eq!(convert(&mut td, &conversion(ToPrivate, 2 * M2)), Ok(1024));
        assert_eq!(td.writes.len(), 1 + 512);
        assert_eq!(td.writes[0], (Alias::Private, GPA + K4, 0));
        assert_eq!(td.accepts.len(), 1 + 512 + 1);
    }

    #[test]
    fn svsm_returns_a_failed_accept() {
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::OPERAND_INVALID);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Err(GaveUp));
        assert_eq!(td.accepts, [GPA | 1]);
    }
}
