//! A TD's memory: attributes say which pages are private, a guest_memfd holds those, a mapping the
//! others; a conversion drops what is on the side that pages leave, as QEMU does
//! (`kvm_convert_memory()` in its accel/kvm/kvm-all.c).

use mapgpa_abi::{Alias, Direction, PAGE_SIZE};
use rangemap::RangeSet;

use super::vm::Td;
use crate::backend::emulated::memory::{Ram, memory_error};
use crate::backend::guest_memfd::{self, GuestMemfdError};
use crate::memory::{HostWork, Memory, MemoryError};
use crate::pagemap::{PageMap, Pages};

/// The memory of a run.
#[derive(Debug)]
pub(super) struct TdMemory<'a> {
    td: &'a Td<'a>,
    ram: &'a Ram,
    /// Private pages whose shared alias was touched, and let through: they are shared to KVM.
    let_through: RangeSet<u64>,
    /// Pages have become private since the TD runs, so that some may be pending acceptance.
    pub(super) pending: bool,
    pub(super) work: HostWork,
}

fn failed(call: &'static str, pages: Pages, error: GuestMemfdError) -> MemoryError {
    memory_error(call, pages, error.into_source())
}

impl<'a> TdMemory<'a> {
    pub(super) fn new(td: &'a Td<'a>, ram: &'a Ram) -> Self {
        let let_through = RangeSet::new();
        Self { td, ram, let_through, pending: false, work: HostWork::default() }
    }

    fn set_private(&mut self, pages: Pages, private: bool) -> Result<(), MemoryError> {
        self.work.book(0);
        guest_memfd::set_private(self.td.fd(), pages.gpa(), pages.count * PAGE_SIZE, private)
            .map_err(|error| failed("KVM_SET_MEMORY_ATTRIBUTES", pages, error))
    }

    /// A private page was touched through its shared alias, which is booked: lets the guest go on, with
    /// memory there. The private contents are out of reach until [`TdMemory::restore`].
    pub(super) fn let_through(&mut self, page: u64) -> Result<(), MemoryError> {
        let pages = Pages { first: page, count: 1 };
        self.set_private(pages, false)?;
        self.let_through.insert(page..page + 1);
        Ok(())
    }

    /// A page that was let through is touched through its private alias; false if it was not.
    pub(super) fn restore(&mut self, page: u64) -> Result<bool, MemoryError> {
        if !self.let_through.contains(&page) {
            return Ok(false);
        }
        self.let_through.remove(page..page + 1);
        self.set_private(Pages { first: page, count: 1 }, true)?;
        self.pending = true;
        Ok(true)
    }
}

impl Memory for TdMemory<'_> {
    fn convert(
        &mut self,
        run: Pages,
        to: Direction,
        _: bool,
        _: &PageMap,
    ) -> Result<(), MemoryError> {
        let private = to == Direction::ToPrivate;
        self.pending |= private;
        for (region, file) in self.ram.regions().iter().zip(self.td.files()) {
            let Some(part) = region.clip(run) else { continue };
            self.set_private(part, private)?;
            let was_let_through = self.let_through.overlaps(&(part.first..part.end()));
            self.let_through.remove(part.first..part.end());
            if private || was_let_through {
                region.discard(Alias::Shared, part)?;
                self.work.book(0);
            }
            if !private {
                let offset = (part.first - region.pages.first) * PAGE_SIZE;
                file.punch(offset, part.count * PAGE_SIZE)
                    .map_err(|error| failed("fallocate(FALLOC_FL_PUNCH_HOLE)", part, error))?;
                self.work.book(0);
            }
            self.work.pages += part.count;
        }
        Ok(())
    }

    /// The TDX module answers accepts; nobody is told here.
    fn accept(&mut self, _: Pages, _: &PageMap) -> Result<(), MemoryError> {
        Ok(())
    }
}
