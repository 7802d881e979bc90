//! Guest `td-shim-2022`: td-payload of td-shim with crate tdx-tdcall before it could retry.

use mapgpa_kit::abi::Direction;
use mapgpa_kit::abi::tdcall::{module, status};
use mapgpa_kit::{Td, report};

use crate::accept;
use crate::guest::{Conversion, Converted, Guest, GuestInfo};
use crate::map_gpa::{R10_R15, map_gpa};

/// Guest `td-shim-2022`.
pub(crate) const TD_SHIM_2022: GuestInfo = GuestInfo {
    guest: Guest::TdShim2022,
    name: "td-shim-2022",
    models: "td-shim before 3f18d9f (Oct 2023), td-payload with crate tdx-tdcall",
    summary: "no retry: any status but SUCCESS panics",
    retries: false,
    own_bound: None,
    hosted: true,
};

/// td-shim before commit 3f18d9f: `decrypt` and `encrypt` of td-payload/src/arch/x86_64/dma.rs around
/// `tdvmcall_mapgpa` of tdx-tdcall/src/tdx.rs. One MapGPA; any status but SUCCESS panics. Then accepts
/// by 4 KiB, and takes a page accepted before for fine, if the details of RAX are 0.
pub(crate) fn convert<T: Td>(td: &mut T, c: &Conversion) -> Converted {
    let start = match c.to {
        Direction::ToShared => c.gpa | c.shared_bit,
        Direction::ToPrivate => c.gpa & !c.shared_bit,
    };
    if map_gpa(td, R10_R15, start, c.size).r10 != status::SUCCESS {
        report::panic(td, "td-payload: MapGPA failed");
    }
    if c.to == Direction::ToShared {
        return Ok(0);
    }
    let fine = |rax| rax == module::SUCCESS || rax == module::PAGE_ALREADY_ACCEPTED;
    match accept::pages_4k(td, c.gpa, c.size, fine) {
        Ok(pages) => Ok(pages),
        Err(_) => report::panic(td, "td-payload: a page was not accepted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply, stops};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};

    #[test]
    fn td_shim_2022_panics_at_a_retry() {
        let mut td = FakeTd::replies([reply::retry(BIT | (GPA + K4))]);
        assert!(stops(|| convert(&mut td, &conversion(ToShared, M2))));
        assert_eq!(td.panics(), ["td-payload: MapGPA failed"]);
        assert_eq!(td.requests, [(BIT | GPA, M2)]);
    }

    #[test]
    fn td_shim_2022_tolerates_an_accepted_page_by_an_exact_compare() {
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_ALREADY_ACCEPTED);
        assert_eq!(convert(&mut td, &conversion(ToPrivate, M2)), Ok(512));
        let mut td = FakeTd::new(|_, _| reply::SUCCESS, |_| module::PAGE_ALREADY_ACCEPTED | 1);
        assert!(stops(|| convert(&mut td, &conversion(ToPrivate, M2))));
        assert_eq!(td.accepts, [GPA]);
    }
}
