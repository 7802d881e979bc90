//! Memory of a TD: memslots, which GPAs are private, and the state of each private page in the secure
//! EPT.
//!
//! In the VM underneath, each memslot is two: private memory of this library's at the GPA, and what the
//! program shares at the GPA with the shared bit. Both are registered with userfaultfd, so that a first
//! touch comes to [`crate::faults`], which asks [`Memory::touch`].
//!
//! Sources: Linux, virt/kvm/kvm_main.c (`kvm_set_memory_region`, `kvm_vm_set_mem_attributes`),
//! virt/kvm/guest_memfd.c, arch/x86/kvm/mmu/mmu.c (`kvm_arch_pre_set_memory_attributes`,
//! `kvm_mmu_faultin_pfn`), arch/x86/kvm/vmx/tdx.c (`tdx_handle_ept_violation`).

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use mapgpa_abi::{Alias, PAGE_SIZE, PAGE_SIZE_2M};
use rangemap::RangeSet;

use crate::faults::Userfaultfd;
use crate::raw::{self, Mapping, OwnFd, Sys};

/// A guest_memfd file. The program's descriptor is an empty file in memory.
#[derive(Debug)]
pub(crate) struct Memfd {
    /// Its memory.
    pub(crate) memory: Mapping,
    /// The TD that it belongs to, as the address of that TD's lock.
    pub(crate) owner: usize,
}

/// State of a private page in the secure EPT (TDX module base specification, "Secure EPT entry").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sept {
    /// Nothing is there.
    Free,
    /// There (TDH.MEM.PAGE.AUG), not accepted.
    Pending,
    /// Added before the TD ran, or accepted.
    Mapped,
}

/// A memslot.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Its first GPA.
    pub(crate) gpa: u64,
    /// Its size in bytes.
    pub(crate) size: u64,
    /// What the program gave as its memory.
    pub(crate) user: u64,
    /// That memory in this library's eyes.
    pub(crate) shared: Mapping,
    /// The file behind `user`, where this library put it there.
    pub(crate) file: Option<OwnFd>,
    /// The private memory and where in it the slot begins.
    pub(crate) private: Option<(Arc<Memfd>, u64)>,
    sept: Vec<Sept>,
}

impl Slot {
    /// The slot of these addresses.
    pub(crate) fn new(
        (gpa, size, user): (u64, u64, u64),
        shared: Mapping,
        file: Option<OwnFd>,
        private: Option<(Arc<Memfd>, u64)>,
    ) -> Self {
        let pages = usize::try_from(size / PAGE_SIZE).unwrap_or(0);
        Self { gpa, size, user, shared, file, private, sept: vec![Sept::Free; pages] }
    }

    /// Whether it has this GPA.
    pub(crate) const fn has(&self, gpa: u64) -> bool {
        self.gpa <= gpa && gpa - self.gpa < self.size
    }

    /// Where `alias` of `gpa`, which it has, is in this process.
    pub(crate) fn host(&self, alias: Alias, gpa: u64) -> Option<u64> {
        let offset = gpa - self.gpa;
        match (alias, &self.private) {
            (Alias::Shared, _) => Some(self.shared.at + offset),
            (Alias::Private, Some((memfd, start))) => Some(memfd.memory.at + start + offset),
            (Alias::Private, None) => None,
        }
    }
}

/// What a touch of a page comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Touch {
    /// It is as it should be.
    Fine,
    /// KVM_EXIT_MEMORY_FAULT: the alias is not the one that the attributes say.
    MemoryFault,
    /// The page is pending: the end of the TD, or #VE.
    Pending,
    /// No memslot: what a TD takes for MMIO.
    Nowhere,
}

/// The memory of a TD.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// By number.
    pub(crate) slots: BTreeMap<u32, Slot>,
    /// Pages with KVM_MEMORY_ATTRIBUTE_PRIVATE.
    private: RangeSet<u64>,
    /// 2 MiB blocks with a page table in the secure EPT, which stays until the TD ends.
    tables: HashSet<u64>,
}

impl Memory {
    /// The slot that has `gpa`.
    pub(crate) fn slot(&self, gpa: u64) -> Option<&Slot> {
        self.slots.values().find(|slot| slot.has(gpa))
    }

    /// Alias and GPA of a host address.
    pub(crate) fn find(&self, address: u64) -> Option<(Alias, u64)> {
        self.slots.values().find_map(|slot| {
            let within = |start: u64| address.checked_sub(start).filter(|at| *at < slot.size);
            let shared = within(slot.shared.at).map(|at| (Alias::Shared, slot.gpa + at));
            shared.or_else(|| {
                let start = slot.host(Alias::Private, slot.gpa)?;
                within(start).map(|at| (Alias::Private, slot.gpa + at))
            })
        })
    }

    /// Whether the attributes of `gpa` say private.
    pub(crate) fn is_private(&self, gpa: u64) -> bool {
        self.private.contains(&(gpa / PAGE_SIZE))
    }

    /// The state of `gpa` in the secure EPT.
    pub(crate) fn sept(&self, gpa: u64) -> Sept {
        let state = self.slot(gpa).and_then(|slot| {
            slot.sept.get(usize::try_from((gpa - slot.gpa) / PAGE_SIZE).ok()?).copied()
        });
        state.unwrap_or(Sept::Free)
    }

    /// Changes the state of `gpa` in the secure EPT.
    pub(crate) fn set_sept(&mut self, gpa: u64, state: Sept) {
        if state != Sept::Free {
            self.tables.insert(gpa / PAGE_SIZE_2M);
        }
        let Some(slot) = self.slots.values_mut().find(|slot| slot.has(gpa)) else { return };
        let index = usize::try_from((gpa - slot.gpa) / PAGE_SIZE).unwrap_or(usize::MAX);
        if let Some(entry) = slot.sept.get_mut(index) {
            *entry = state;
        }
    }

    /// Whether the 2 MiB around `gpa` have a page table in the secure EPT.
    pub(crate) fn has_table(&self, gpa: u64) -> bool {
        self.tables.contains(&(gpa / PAGE_SIZE_2M))
    }

    /// What a touch of `gpa` (no shared bit) through `alias` comes to; as KVM does, a missing private
    /// page is put there, pending.
    pub(crate) fn touch(&mut self, alias: Alias, gpa: u64) -> Touch {
        let private = self.is_private(gpa);
        match alias {
            Alias::Private => match self.fault_in(gpa) {
                Some(Sept::Mapped) => Touch::Fine,
                Some(_) => Touch::Pending,
                None => Touch::MemoryFault,
            },
            Alias::Shared if private => Touch::MemoryFault,
            Alias::Shared if self.slot(gpa).is_none() => Touch::Nowhere,
            Alias::Shared => Touch::Fine,
        }
    }

    /// Puts a private page at `gpa` if none is there (TDH.MEM.PAGE.AUG), and gives its state; nothing
    /// where the attributes or the memslot do not allow one.
    pub(crate) fn fault_in(&mut self, gpa: u64) -> Option<Sept> {
        if !self.is_private(gpa) || self.slot(gpa)?.private.is_none() {
            return None;
        }
        if self.sept(gpa) == Sept::Free {
            self.set_sept(gpa, Sept::Pending);
        }
        Some(self.sept(gpa))
    }

    /// KVM_SET_MEMORY_ATTRIBUTES of `size` bytes at `gpa`, checked.
    pub(crate) fn set_attributes(&mut self, gpa: u64, size: u64, private: bool) -> Sys<()> {
        let pages = gpa / PAGE_SIZE..(gpa + size) / PAGE_SIZE;
        if private {
            self.private.insert(pages);
        } else {
            self.private.remove(pages);
        }
        // What was mapped by the other attribute is unmapped.
        for slot in self.slots.values_mut() {
            let (start, end) = (gpa.max(slot.gpa), (gpa + size).min(slot.gpa + slot.size));
            if start >= end {
                continue;
            }
            if private {
                // The file keeps the contents; only the guest's view of them goes.
                raw::madvise(
                    slot.shared.at + (start - slot.gpa),
                    end - start,
                    libc::MADV_DONTNEED,
                )?;
            } else {
                remove(slot, start, end)?;
            }
        }
        Ok(())
    }

    /// Takes away what is behind `alias` of the page at `gpa`, which may not be touched: the next touch
    /// is the first again.
    pub(crate) fn forget(&self, alias: Alias, gpa: u64) -> Sys<()> {
        match self.slot(gpa).and_then(|slot| slot.host(alias, gpa)) {
            Some(host) => raw::madvise(host, PAGE_SIZE, libc::MADV_DONTNEED).map(drop),
            None => Ok(()),
        }
    }

    /// A hole of `size` bytes at `offset` of a guest_memfd.
    pub(crate) fn punch(&mut self, memfd: &Arc<Memfd>, offset: u64, size: u64) -> Sys<()> {
        for slot in self.slots.values_mut() {
            let Some((of, from)) = slot.private.clone() else { continue };
            let (start, end) = (offset.max(from), (offset + size).min(from + slot.size));
            if Arc::ptr_eq(&of, memfd) && start < end {
                remove(slot, slot.gpa + (start - from), slot.gpa + (end - from))?;
            }
        }
        raw::madvise(memfd.memory.at + offset, size, libc::MADV_DONTNEED).map(drop)
    }

    /// A page of the TD's initial memory, at `gpa`: the attributes and the slot allow it.
    pub(crate) fn add_page(&mut self, uffd: &Userfaultfd, gpa: u64, bytes: &[u8]) -> Sys<()> {
        let host = self.slot(gpa).and_then(|slot| slot.host(Alias::Private, gpa));
        uffd.copy(host.ok_or(libc::EINVAL)?, bytes)?;
        self.set_sept(gpa, Sept::Mapped);
        Ok(())
    }
}

/// Takes the private pages from `start` to `end` out of the secure EPT, with their contents.
fn remove(slot: &mut Slot, start: u64, end: u64) -> Sys<()> {
    let first = usize::try_from((start - slot.gpa) / PAGE_SIZE).unwrap_or(usize::MAX);
    let count = usize::try_from((end - start) / PAGE_SIZE).unwrap_or(0);
    for entry in slot.sept.iter_mut().skip(first).take(count) {
        *entry = Sept::Free;
    }
    match slot.host(Alias::Private, start) {
        Some(host) => raw::madvise(host, end - start, libc::MADV_DONTNEED).map(drop),
        None => Ok(()),
    }
}
