//! Guest `mushroom`: `Vmcall::map_gpa` of mushroom's TDX supervisor
//! (tee/supervisor-tdx/src/tdcall.rs), as tee/supervisor-tdx/src/input.rs calls it.

use mapgpa_kit::abi::tdcall::{module, status};
use mapgpa_kit::abi::{Direction, PAGE_SIZE};
use mapgpa_kit::{Td, report};

use crate::accept;
use crate::guest::{Conversion, Converted, Guest, GuestInfo};
use crate::map_gpa::{R10_R13, map_gpa};

/// Guest `mushroom`.
pub(crate) const MUSHROOM: GuestInfo = GuestInfo {
    guest: Guest::Mushroom,
    name: "mushroom",
    models: "mushroom supervisor-tdx (85556609, May 2026), Vmcall::map_gpa()",
    summary: "no retry, and R13 holds the number of pages, not bytes",
    retries: false,
    own_bound: None,
    hosted: true,
};

/// mushroom's supervisor, snapshot 85556609 (May 2026): R13 is the number of 4 KiB pages, as its own
/// VMM wants it, and any status but SUCCESS fails an assertion. To shared, one call for the range; to
/// private, a call and an accept for each page.
///
/// The original's shared bit is a constant, bit 51; here it is the guest's.
pub(crate) fn convert<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let pages = c.size / PAGE_SIZE;
    if c.to == Direction::ToShared {
        map(td, c.start(), pages);
        return Ok(0);
    }
    for page in 0..pages {
        let gpa = c.gpa.wrapping_add(page * PAGE_SIZE);
        map(td, gpa, 1);
        if accept::pages_4k(td, gpa, PAGE_SIZE, |rax| rax == module::SUCCESS).is_err() {
            report::panic(td, "mushroom: a page was not accepted");
        }
    }
    Ok(pages)
}

fn map<T: Td>(td: &mut T, gpa: u64, pages: u64) {
    if map_gpa(td, R10_R13, gpa, pages).r10 != status::SUCCESS {
        report::panic(td, "mushroom: MapGPA failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply, stops};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn mushroom_passes_a_page_count() {
        let mut td = FakeTd::always(reply::SUCCESS);
        assert_eq!(convert(&mut td, &conversion(ToShared, M2)), Ok(0));
        assert_eq!(td.requests, [(BIT | GPA, 512)]);
        let mut td = FakeTd::always(reply::SUCCESS);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, 2 * K4)), Ok(2));
        assert_eq!(td.requests, [(GPA, 1), (GPA + K4, 1)]);
        assert_eq!(td.accepts, [GPA, GPA + K4]);
    }

    #[test]
    fn mushroom_asserts_success() {
        for reply in [reply::retry(BIT | GPA), reply::error(status::ALIGN_ERROR)] {
            let mut td = FakeTd::replies([reply]);
            assert!(stops(|| convert(&mut td, &conversion(ToShared, M2))));
            assert_eq!(td.panics(), ["mushroom: MapGPA failed"]);
        }
    }
}
