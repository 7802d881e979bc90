//! The accept loop that several guests share: 4 KiB pages, one after the other.

use mapgpa_kit::abi::PAGE_SIZE;
use mapgpa_kit::abi::tdcall::level;
use mapgpa_kit::{Td, calls};

/// Accepts `size` bytes at `gpa` in 4 KiB pages, until an answer is not `fine`.
///
/// # Errors
/// The first RAX that is not `fine`; the pages before it are accepted.
pub(crate) fn pages_4k(
    td: &mut impl Td,
    gpa: u64,
    size: u64,
    fine: impl Fn(u64) -> bool,
) -> Result<u64, u64> {
    let pages = size / PAGE_SIZE;
    for page in 0..pages {
        let rax = calls::accept(td, gpa.wrapping_add(page * PAGE_SIZE), level::L4K);
        if !fine(rax) {
            return Err(rax);
        }
    }
    Ok(pages)
}
