//! Guest `tdx-guest`: the least that a caller can write around crate tdx-guest's `map_gpa`.

use mapgpa_kit::abi::tdcall::{level, module, status};
use mapgpa_kit::abi::{Direction, PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M};
use mapgpa_kit::{Td, calls};

use crate::guest::{Conversion, Converted, GaveUp, Guest, GuestInfo};
use crate::map_gpa::{R10_R15, map_gpa};

/// Guest `tdx-guest`.
pub(crate) const TDX_GUEST: GuestInfo = GuestInfo {
    guest: Guest::TdxGuest,
    name: "tdx-guest",
    models: "crate tdx-guest 0.6.0, map_gpa() in a minimal caller's loop",
    summary: "the crate returns (R11, RETRY); a caller that restarts there without a check",
    retries: true,
    own_bound: None,
    hosted: true,
};

/// Crate tdx-guest 0.6.0 (src/tdvmcall.rs): its `map_gpa` makes one call and, unless the status is
/// SUCCESS, returns R11 as the host gave it together with the status. The loop is not the crate's: it
/// takes what is returned at its word, as a caller does who reads only the GHCI's sentence on RETRY.
pub(crate) fn convert<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let bound = c.bound.or(TDX_GUEST.own_bound);
    let mut gpa = c.start();
    let end = gpa.wrapping_add(c.size);
    let mut stalled = 0;
    while let Err((r11, status)) = crate_map_gpa(td, gpa, end.wrapping_sub(gpa)) {
        if status != status::RETRY {
            return Err(GaveUp);
        }
        stalled = if r11 == gpa { stalled + 1 } else { 0 };
        if stalled >= bound {
            return Err(GaveUp);
        }
        gpa = r11;
    }
    match c.to {
        Direction::ToShared => Ok(0),
        Direction::ToPrivate => accept_memory(td, c.gpa, c.size),
    }
}

/// The crate's `map_gpa`: R11 and status, unless it is SUCCESS.
fn crate_map_gpa<T: Td>(td: &mut T, gpa: u64, size: u64) -> Result<(), (u64, u64)> {
    let reply = map_gpa(td, R10_R15, gpa, size);
    if reply.r10 == status::SUCCESS { Ok(()) } else { Err((reply.r11, reply.r10)) }
}

/// The crate's `accept_memory` (src/lib.rs): 1 GiB, 2 MiB, 4 KiB, the largest that is aligned and
/// fits first. ALREADY_ACCEPTED, SIZE_MISMATCH and OPERAND_INVALID mean a smaller page; at 4 KiB the
/// first of them is fine, the others fail, as anything else does at any size.
fn accept_memory<T: Td>(td: &mut T, gpa: u64, size: u64) -> Converted {
    const SIZES: [(u64, u64); 3] =
        [(PAGE_SIZE_1G, level::L1G), (PAGE_SIZE_2M, level::L2M), (PAGE_SIZE, level::L4K)];
    let end = gpa.wrapping_add(size);
    let mut at = gpa;
    while at < end {
        let mut done = 0;
        for (page, level) in SIZES {
            if !at.is_multiple_of(page) || end - at < page {
                continue;
            }
            let smallest = level == level::L4K;
            match calls::accept(td, at, level) & module::STATUS_MASK {
                module::SUCCESS => done = page,
                module::PAGE_ALREADY_ACCEPTED if smallest => done = page,
                module::PAGE_ALREADY_ACCEPTED
                | module::PAGE_SIZE_MISMATCH
                | module::OPERAND_INVALID
                    if !smallest => {}
                _ => return Err(GaveUp),
            }
            if done != 0 {
                break;
            }
        }
        if done == 0 {
            return Err(GaveUp);
        }
        at = at.wrapping_add(done);
    }
    Ok(size / PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn tdx_guest_restarts_where_r11_says() {
        for r11 in [BIT | (GPA + K4), GPA, BIT | (GPA + M2), u64::MAX] {
            let mut td = FakeTd::replies([reply::retry(r11), reply::SUCCESS]);
            assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0));
            assert_eq!(td.requests[1], (r11, (BIT | (GPA + M2)).wrapping_sub(r11)));
        }
    }

    #[test]
    fn tdx_guest_returns_errors() {
        let mut td = FakeTd::replies([reply::error(status::SUBFUNC_UNSUPPORTED)]);
        assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Err(GaveUp));
    }

    #[test]
    fn tdx_guest_takes_an_accepted_4k_page_for_fine_and_goes_down_at_larger_ones() {
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_ALREADY_ACCEPTED | 1);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Ok(512));
        // A 4K accept brings the position to an address where 2M no longer fits.
        assert_eq!(td.accepts.len(), 1 + 512);
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_SIZE_MISMATCH);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Err(GaveUp));
        assert_eq!(td.accepts, [GPA | 1, GPA]);
    }
}
