//! Guest memory as the VMM itself reaches it, on behalf of the TDX module or a host's service.

use mapgpa_abi::{Alias, PAGE_SIZE};
use vm_memory::{VolatileMemory, VolatileSlice};

use super::alias::AliasMemory;
use super::memory::{HOST_PAGE, Region, memory_error};
use crate::memory::{Contents, MemoryError};
use crate::pagemap::Pages;
use crate::patch::Patched;

impl AliasMemory<'_> {
    /// Where the VMM reaches `size` bytes behind `alias` at `gpa`, with every page of it present:
    /// the fault thread cannot answer a touch of ours, as we hold the engine.
    fn reach(
        &self,
        gpa: u64,
        alias: Alias,
        size: usize,
    ) -> Result<Option<VolatileSlice<'_, ()>>, MemoryError> {
        let Some(end) = gpa.checked_add(size as u64) else { return Ok(None) };
        let first = gpa / PAGE_SIZE;
        let pages = Pages { first, count: end.div_ceil(PAGE_SIZE) - first };
        let regions = self.ram.regions();
        let inside = |region: &&Region| region.clip(pages) == Some(pages);
        let Some(region) = regions.iter().find(inside) else { return Ok(None) };
        if let Some(userfaultfd) = self.userfaultfd {
            let (start, length) = region.host(alias, pages);
            for page in (start..start + length).step_by(HOST_PAGE) {
                userfaultfd
                    .fill(page)
                    .map_err(|error| memory_error("UFFDIO_ZEROPAGE", pages, error))?;
            }
        }
        let offset = gpa - region.pages.gpa();
        let slice = usize::try_from(offset)
            .ok()
            .and_then(|offset| region.mapping(alias).get_slice(offset, size).ok());
        Ok(slice)
    }
}

impl Contents for AliasMemory<'_> {
    fn read(&mut self, gpa: u64, alias: Alias, bytes: &mut [u8]) -> Result<bool, MemoryError> {
        let slice = self.reach(gpa, alias, bytes.len())?;
        Ok(slice.is_some_and(|slice| slice.copy_to(bytes) == bytes.len()))
    }

    fn write(&mut self, gpa: u64, alias: Alias, bytes: &[u8]) -> Result<bool, MemoryError> {
        let Some(slice) = self.reach(gpa, alias, bytes.len())? else { return Ok(false) };
        slice.copy_from(bytes);
        Ok(true)
    }

    fn patch(&mut self, run: Pages) -> Result<Patched, MemoryError> {
        self.patch_present(run)
    }

    fn find_tdcall(&mut self, run: Pages) -> Result<Option<u64>, MemoryError> {
        self.first_tdcall(run)
    }
}
