//! Guests `edk2-2022` and `edk2-2023`: OvmfPkg/Library/BaseMemEncryptTdxLib/MemoryEncryption.c of
//! EDK2, whose `SetMemorySharedOrPrivate` walks the page tables and issues one MapGPA a leaf.

use mapgpa_kit::abi::tdcall::{level, module, status};
use mapgpa_kit::abi::{Direction, PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M};
use mapgpa_kit::{Td, calls};

use crate::guest::{Conversion, Converted, GaveUp, Guest, GuestInfo};
use crate::map_gpa::{ALL_BUT_RBP, map_gpa};

/// Guest `edk2-2022`.
pub(crate) const EDK2_2022: GuestInfo = GuestInfo {
    guest: Guest::Edk2Y2022,
    name: "edk2-2022",
    models: "EDK2 before PR 5026 (Nov 2023), BaseMemEncryptTdxLib",
    summary: "one request a page-table leaf, no retry",
    retries: false,
    own_bound: None,
    hosted: true,
};

/// Guest `edk2-2023`.
pub(crate) const EDK2_2023: GuestInfo = GuestInfo {
    guest: Guest::Edk2Y2023,
    name: "edk2-2023",
    models: "EDK2 since 8a41004643 (Nov 2023; same in Aug 2026), BaseMemEncryptTdxLib",
    summary: "one request a page-table leaf, retries, then accepts only the tail",
    retries: true,
    own_bound: Some(3),
    hosted: true,
};

/// EDK2 from Jan 2023 (PR 3921, since which callers see the failure) to PR 5026: any status but
/// SUCCESS is EFI_DEVICE_ERROR; then the leaf is accepted.
pub(crate) fn convert_2022<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    each_leaf(c, |gpa, size| {
        if map_gpa(td, ALL_BUT_RBP, gpa | c.mask(), size).r10 != status::SUCCESS {
            return Err(GaveUp);
        }
        accept_if_private(td, c.to, gpa, size)
    })
}

/// EDK2 since 8a41004643: restarts from R11, which must be in what is left of the leaf, shared bit
/// included, but need not be aligned; gives up at the third reply in a row that points at the start.
///
/// The loop keeps its position in the variables that the accept uses afterwards: to private, only
/// what the last request asked for is accepted, and what earlier requests converted stays pending.
pub(crate) fn convert_2023<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let bound = c.bound.or(EDK2_2023.own_bound);
    each_leaf(c, |gpa, size| {
        let (start, length) = retry_2023(td, gpa | c.mask(), size, bound)?;
        accept_if_private(td, c.to, start, length)
    })
}

/// The retry loop of `SetOrClearSharedBit`; returns what the last request asked for.
fn retry_2023<T: Td>(
    td: &mut T,
    mut start: u64,
    mut length: u64,
    bound: u64,
) -> Result<(u64, u64), GaveUp> {
    let end = start.wrapping_add(length);
    let mut stalled = 0;
    loop {
        let reply = map_gpa(td, ALL_BUT_RBP, start, length);
        match reply.r10 {
            status::SUCCESS => return Ok((start, length)),
            status::RETRY => {}
            _ => return Err(GaveUp),
        }
        if reply.r11 < start || reply.r11 >= end {
            return Err(GaveUp);
        }
        if reply.r11 != start {
            start = reply.r11;
            length = end.wrapping_sub(start);
            stalled = 0;
            continue;
        }
        stalled += 1;
        if stalled >= bound {
            return Err(GaveUp);
        }
    }
}

/// `SetMemorySharedOrPrivate`: one `convert` for each page-table leaf, the page tables being an
/// identity map that is split only where a leaf would reach out of the range.
fn each_leaf(
    c: &Conversion,
    mut convert: impl FnMut(u64, u64) -> Result<u64, GaveUp>,
) -> Converted {
    let mut gpa = c.gpa;
    let mut left = c.size;
    let mut accepted = 0;
    while left >= PAGE_SIZE {
        let leaf = [PAGE_SIZE_1G, PAGE_SIZE_2M]
            .into_iter()
            .find(|&leaf| gpa.is_multiple_of(leaf) && left >= leaf)
            .unwrap_or(PAGE_SIZE);
        accepted += convert(gpa, leaf)?;
        gpa = gpa.wrapping_add(leaf);
        left -= leaf;
    }
    Ok(accepted)
}

/// EDKII_MEMORY_ACCEPT_PROTOCOL of OvmfPkg/TdxDxe: 4 KiB pages up to a 2 MiB boundary, 2 MiB pages,
/// 4 KiB pages for the rest. Exactly 2 MiB count as rest, so that a 2 MiB leaf is accepted by 4 KiB.
fn accept_if_private<T: Td>(td: &mut T, to: Direction, gpa: u64, size: u64) -> Converted {
    if to == Direction::ToShared {
        return Ok(0);
    }
    let head = (gpa.wrapping_neg() % PAGE_SIZE_2M).min(size);
    let rest = size - head;
    let large = if rest > PAGE_SIZE_2M { rest - rest % PAGE_SIZE_2M } else { 0 };
    let mut accepted = accept_pages(td, gpa, head / PAGE_SIZE, level::L4K)?;
    let at = gpa.wrapping_add(head);
    accepted += accept_pages(td, at, large / PAGE_SIZE_2M, level::L2M)?;
    let at = at.wrapping_add(large);
    accepted += accept_pages(td, at, (rest - large) / PAGE_SIZE, level::L4K)?;
    Ok(accepted)
}

/// `TdAcceptPages` of MdePkg/Library/TdxLib: tolerates ALREADY_ACCEPTED; a 2 MiB page of which a
/// smaller one is mapped is accepted by 4 KiB; OPERAND_BUSY is tried again, three times a page;
/// everything else fails. Returns 4 KiB pages.
fn accept_pages<T: Td>(td: &mut T, gpa: u64, pages: u64, level: u64) -> Converted {
    /// Bits 51:12, all that an address may have.
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// The details that EDK2 masks off.
    const DETAILS: u64 = 0xffff;
    /// TDX_ACCEPTPAGE_MAX_RETRIED.
    const RETRIES: u64 = 3;

    let page = if level == level::L4K { PAGE_SIZE } else { PAGE_SIZE_2M };
    if pages > 0 && gpa & !ADDRESS != 0 {
        return Err(GaveUp);
    }
    for index in 0..pages {
        let at = gpa.wrapping_add(index * page);
        let mut answer = calls::accept(td, at, level) & !DETAILS;
        for _ in 0..RETRIES {
            if answer != module::OPERAND_BUSY {
                break;
            }
            answer = calls::accept(td, at, level) & !DETAILS;
        }
        match answer {
            module::SUCCESS | module::PAGE_ALREADY_ACCEPTED => {}
            module::PAGE_SIZE_MISMATCH if level != level::L4K => {
                accept_pages(td, at, PAGE_SIZE_2M / PAGE_SIZE, level::L4K)?;
            }
            _ => return Err(GaveUp),
        }
    }
    Ok(pages * (page / PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn edk2_asks_once_for_each_leaf() {
        let size = K4 + PAGE_SIZE_1G + M2 + K4;
        let gpa = PAGE_SIZE_1G - K4;
        let c = Conversion { gpa, ..conversion(ToShared, size) };
        for convert in [convert_2022, convert_2023] {
            let mut td = FakeTd::always(reply::SUCCESS);
            assert_eq!(convert(&mut td, &c), Ok(0));
            assert_eq!(
                td.requests,
                [
                    (BIT | gpa, K4),
                    (BIT | (gpa + K4), PAGE_SIZE_1G),
                    (BIT | (2 * PAGE_SIZE_1G), M2),
                    (BIT | (2 * PAGE_SIZE_1G + M2), K4)
                ]
            );
        }
    }

    #[test]
    fn edk2_2022_fails_at_a_retry() {
        let mut td = FakeTd::replies([reply::retry(GPA + K4)]);
        assert_eq!(convert_2022(&mut td, &conversion(ToPrivate, M2)), Err(GaveUp));
    }

    #[test]
    fn edk2_2023_accepts_only_the_tail() {
        let mut td = FakeTd::replies([reply::retry(GPA + 508 * K4), reply::SUCCESS]);
        assert_eq!(convert_2023(&mut td, &conversion(ToPrivate, M2)), Ok(4));
        assert_eq!(td.accepts, [508, 509, 510, 511].map(|page| GPA + page * K4));
    }

    #[test]
    fn edk2_2023_accepts_all_of_a_leaf_converted_at_once() {
        let mut td = FakeTd::always(reply::SUCCESS);
        assert_eq!(convert_2023(&mut td, &conversion(ToPrivate, M2)), Ok(512));
        assert_eq!(td.accepts.len(), 512, "2 MiB is accepted by 4 KiB");
    }

    #[test]
    fn edk2_2023_gives_up_at_the_third_reply_without_progress() {
        let mut td = FakeTd::always(reply::retry(BIT | GPA));
        assert_eq!(convert_2023(&mut td, &conversion(ToShared, M2)), Err(GaveUp));
        assert_eq!(td.requests.len(), 3);
    }

    #[test]
    fn edk2_2023_rejects_an_r11_outside_the_leaf() {
        for r11 in [GPA + K4, BIT | (GPA + M2), BIT | (GPA - 1)] {
            let mut td = FakeTd::replies([reply::retry(r11)]);
            let c = conversion(ToShared, 2 * M2);
            assert_eq!(convert_2023(&mut td, &c), Err(GaveUp), "{r11:#x}");
        }
    }

    #[test]
    fn edk2_2023_cannot_accept_from_an_unaligned_r11() {
        let mut td = FakeTd::replies([reply::retry(GPA + 1), reply::SUCCESS]);
        assert_eq!(convert_2023(&mut td, &conversion(ToPrivate, M2)), Err(GaveUp));
        assert_eq!(td.accepts, []);
    }

    #[test]
    fn edk2_tries_a_busy_page_four_times_and_counts_for_each_page_anew() {
        for (busy, result) in [(3, Ok(2)), (4, Err(GaveUp))] {
            let mut left = busy;
            let mut td = FakeTd::new(
                |_, _| reply::SUCCESS,
                move |_| {
                    if left == 0 {
                        left = busy;
                        return 0;
                    }
                    left -= 1;
                    module::OPERAND_BUSY | module::OPERAND_RCX
                },
            );
            assert_eq!(convert_2023(&mut td, &conversion(ToPrivate, 2 * K4)), result);
            assert_eq!(td.accepts.len(), if result.is_ok() { 8 } else { 4 });
        }
    }

    #[test]
    fn edk2_accepts_by_4k_where_2m_does_not_match_and_tolerates_accepted_pages() {
        let gpa = PAGE_SIZE_1G;
        let mut td = FakeTd::new(
            |_, _| reply::SUCCESS,
            move |rcx| match rcx {
                rcx if rcx == gpa | 1 => module::PAGE_SIZE_MISMATCH | 1,
                rcx if rcx & 1 == 1 => module::PAGE_ALREADY_ACCEPTED | 1,
                _ => 0,
            },
        );
        let c = Conversion { gpa, ..conversion(ToPrivate, PAGE_SIZE_1G) };
        assert_eq!(convert_2022(&mut td, &c), Ok(262_144));
        assert_eq!(td.accepts.len(), 512 + 512);
    }
}
