//! Memory model `guest-memfd`: private pages lie in a guest_memfd, and a conversion is what a
//! production VMM does: set the pages' attributes, and drop the contents on the side that they leave.
//!
//! The VM is of type KVM_X86_SW_PROTECTED_VM, for which the attributes alone say whether an access is
//! private; it knows no shared bit. So the private alias is a slot with a guest_memfd, and the shared
//! alias a slot of its own, as in the model `alias`. Behind the private alias of a page that is shared
//! there is a mapping that stays empty, so that userfaultfd catches a touch; the shared alias of a
//! private page is empty too. Both are registered once: nothing is registered at a conversion.
//!
//! KVM gives the VMM no way to write to a guest_memfd (but by TDX's and SEV-SNP's own calls), so what
//! the guest starts from, below [`IMAGE_END`], is private for the page map but lies in the mapping.

use kvm_ioctls::VmFd;
use mapgpa_abi::layout::IMAGE_END;
use mapgpa_abi::{Alias, Direction, PAGE_SIZE};

use super::memory::{Ram, Region, memory_error};
use super::model::Books;
use super::userfaultfd::Userfaultfd;
use crate::backend::guest_memfd::{self, GuestMemfd, GuestMemfdError};
use crate::memory::{Memory, MemoryError};
use crate::pagemap::{PageMap, Pages};

/// What the guest starts from.
const BOOT: Pages = Pages { first: 0, count: IMAGE_END / PAGE_SIZE };

/// The memory of a VM of type KVM_X86_SW_PROTECTED_VM.
#[derive(Debug, Clone, Copy)]
pub(super) struct Protected<'a> {
    vm: &'a VmFd,
    ram: &'a Ram,
    /// For each region of RAM its guest_memfd.
    files: &'a [GuestMemfd],
}

impl<'a> Protected<'a> {
    /// All of it private, but for what the guest starts from.
    ///
    /// # Errors
    /// KVM refuses the attributes.
    pub(super) fn new(
        vm: &'a VmFd,
        ram: &'a Ram,
        files: &'a [GuestMemfd],
    ) -> Result<Self, MemoryError> {
        let this = Self { vm, ram, files };
        for (region, _) in this.regions() {
            let first = region.pages.first.max(BOOT.end());
            let count = region.pages.end().saturating_sub(first);
            this.set(Pages { first, count }, true)?;
        }
        Ok(this)
    }

    fn regions(self) -> impl Iterator<Item = (&'a Region, &'a GuestMemfd)> {
        self.ram.regions().iter().zip(self.files)
    }

    /// What of `run` is RAM, and its guest_memfd.
    fn parts(self, run: Pages) -> impl Iterator<Item = (&'a Region, &'a GuestMemfd, Pages)> {
        self.regions()
            .filter_map(move |(region, file)| region.clip(run).map(|part| (region, file, part)))
    }

    /// Makes `pages` private, or shared.
    fn set(self, pages: Pages, private: bool) -> Result<(), MemoryError> {
        let size = pages.count * PAGE_SIZE;
        if size == 0 {
            return Ok(());
        }
        guest_memfd::set_private(self.vm, pages.gpa(), size, private)
            .map_err(|error| failed("KVM_SET_MEMORY_ATTRIBUTES", pages, error))
    }

    /// Converts what of `run` is RAM, and does no more: its contents on the side that it leaves are
    /// dropped.
    ///
    /// # Errors
    /// A host call failed.
    pub(super) fn convert(self, run: Pages, to: Direction) -> Result<(), MemoryError> {
        for (region, file, part) in self.parts(run) {
            self.set(part, to == Direction::ToPrivate)?;
            forget(region, file, part, to.reverse().alias())?;
        }
        Ok(())
    }
}

/// Drops the contents of `part` of `region` that are private, or those that are shared.
fn forget(region: &Region, file: &GuestMemfd, part: Pages, side: Alias) -> Result<(), MemoryError> {
    let offset = (part.first - region.pages.first) * PAGE_SIZE;
    match side {
        Alias::Shared => region.discard(Alias::Shared, part),
        Alias::Private => file
            .punch(offset, part.count * PAGE_SIZE)
            .map_err(|error| failed("fallocate(FALLOC_FL_PUNCH_HOLE)", part, error)),
    }
}

fn failed(call: &'static str, pages: Pages, error: GuestMemfdError) -> MemoryError {
    memory_error(call, pages, error.into_source())
}

/// The memory of a run.
#[derive(Debug)]
pub(super) struct ProtectedMemory<'a> {
    memory: Protected<'a>,
    pub(super) userfaultfd: Option<&'a Userfaultfd>,
    /// A conversion to shared was told to keep private contents.
    kept: bool,
    pub(super) books: Books,
}

impl<'a> ProtectedMemory<'a> {
    /// `memory`, none of it converted yet.
    ///
    /// # Errors
    /// The mappings cannot be registered.
    pub(super) fn new(
        memory: Protected<'a>,
        userfaultfd: Option<&'a Userfaultfd>,
    ) -> Result<Self, MemoryError> {
        if let Some(userfaultfd) = userfaultfd {
            for region in memory.ram.regions() {
                for alias in [Alias::Private, Alias::Shared] {
                    let (start, size) = region.host(alias, region.pages);
                    userfaultfd
                        .register(start, size)
                        .map_err(|error| memory_error("UFFDIO_REGISTER", region.pages, error))?;
                }
            }
        }
        Ok(Self { memory, userfaultfd, kept: false, books: Books::default() })
    }
}

impl Memory for ProtectedMemory<'_> {
    fn convert(
        &mut self,
        run: Pages,
        to: Direction,
        keep: bool,
        _: &PageMap,
    ) -> Result<(), MemoryError> {
        let memory = self.memory;
        let (new, old) = (to.alias(), to.reverse().alias());
        self.kept |= keep;
        for (region, file, part) in memory.parts(run) {
            memory.set(part, to == Direction::ToPrivate)?;
            self.books.work.book(0);
            if !keep || old == Alias::Shared {
                forget(region, file, part, old)?;
                self.books.work.book(part.count);
            }
            // What was kept, and is not wanted after all.
            let unwanted = self.kept && !keep && new == Alias::Private;
            if unwanted || self.books.tainted && new == Alias::Shared {
                forget(region, file, part, new)?;
                self.books.work.book(part.count);
            }
            // Behind the private alias: what the guest started from, or a forbidden access has left.
            let boot = BOOT.end().saturating_sub(part.first).min(part.count);
            let stale = Pages { count: if self.books.tainted { part.count } else { boot }, ..part };
            if stale.count > 0 {
                region.discard(Alias::Private, stale)?;
                self.books.work.book(stale.count);
            }
        }
        Ok(())
    }

    /// Nothing is left to do: a private page that nobody has touched reads as zero.
    fn accept(&mut self, _: Pages, _: &PageMap) -> Result<(), MemoryError> {
        Ok(())
    }
}
