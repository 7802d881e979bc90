//! Guest memory on the host: for each region of RAM two mappings, one behind each alias.
//!
//! Both are anonymous and reserve nothing, so that memory costs what is touched of it.
#![allow(unsafe_code, reason = "madvise of guest memory")]

use std::io;

use mapgpa_abi::layout::{HOLE_END, HOLE_START};
use mapgpa_abi::{Alias, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, MmapRegion};

use crate::memory::MemoryError;
use crate::pagemap::Pages;

/// Bytes of a page, as a host size.
pub(in crate::backend) const HOST_PAGE: usize = 4096;

/// Why guest memory cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The host has no room for the mapping.
    #[error("cannot map {size} bytes for guest memory")]
    Map {
        /// Size in bytes.
        size: u64,
        /// Why.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Something was to be written outside guest memory.
    #[error("no guest memory for {size} bytes at GPA {gpa:#x}")]
    Outside {
        /// GPA in bytes.
        gpa: u64,
        /// Size in bytes.
        size: usize,
    },
}

/// An anonymous mapping of `size` bytes, all zero, nothing reserved.
///
/// # Errors
/// The host has no room for it.
pub(in crate::backend) fn map(size: u64) -> Result<MmapRegion, SetupError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    usize::try_from(size)
        .map_err(|_| vm_memory::mmap::MmapRegionError::InvalidPointer)
        .and_then(|size| MmapRegion::build(None, size, libc::PROT_READ | libc::PROT_WRITE, flags))
        .map_err(|source| SetupError::Map { size, source })
}

/// The pages of the host behind guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HostPages {
    /// 4 KiB: a conversion of part of a huge page would split it, and a guest test touches few pages.
    Small,
    /// 2 MiB where there are: a kernel touches much, and boots in a third of the time.
    Huge,
}

/// A run of RAM.
#[derive(Debug)]
pub(in crate::backend) struct Region {
    /// Its pages.
    pub(in crate::backend) pages: Pages,
    private: MmapRegion,
    shared: MmapRegion,
}

impl Region {
    fn new(gpa: u64, size: u64, pages: HostPages) -> Result<Self, SetupError> {
        let region =
            Self { pages: Pages::of_bytes(gpa, size), private: map(size)?, shared: map(size)? };
        for mapping in [&region.private, &region.shared] {
            let advice = match pages {
                HostPages::Small => libc::MADV_NOHUGEPAGE,
                HostPages::Huge => libc::MADV_HUGEPAGE,
            };
            // Advice: a kernel without huge pages refuses it, which is as good.
            let _ = advise(mapping, 0, mapping.size(), advice);
        }
        Ok(region)
    }

    /// The mapping behind `alias`.
    pub(in crate::backend) const fn mapping(&self, alias: Alias) -> &MmapRegion {
        match alias {
            Alias::Private => &self.private,
            Alias::Shared => &self.shared,
        }
    }

    /// The part of `run` in this region, if any.
    pub(in crate::backend) fn clip(&self, run: Pages) -> Option<Pages> {
        let first = run.first.max(self.pages.first);
        let end = run.end().min(self.pages.end());
        (first < end).then(|| Pages { first, count: end - first })
    }

    /// Host address and size in bytes of `part`, which lies in this region, behind `alias`.
    #[expect(clippy::cast_possible_truncation, reason = "less than the mapping's size, a usize")]
    pub(in crate::backend) fn host(&self, alias: Alias, part: Pages) -> (usize, usize) {
        let offset = (part.first - self.pages.first) * PAGE_SIZE;
        (self.mapping(alias).as_ptr().addr() + offset as usize, (part.count * PAGE_SIZE) as usize)
    }

    /// The pages of `part`, which lies in this region, that are there behind `alias`.
    pub(in crate::backend) fn present(
        &self,
        alias: Alias,
        part: Pages,
    ) -> Result<Vec<u64>, MemoryError> {
        let (start, size) = self.host(alias, part);
        let mut there = vec![0u8; size / HOST_PAGE];
        let offset = start - self.mapping(alias).as_ptr().addr();
        // SAFETY: `part` lies within the mapping, and `there` has a byte for each of its pages.
        let result = unsafe {
            let start = self.mapping(alias).as_ptr().add(offset);
            libc::mincore(start.cast(), size, there.as_mut_ptr())
        };
        if result < 0 {
            return Err(memory_error("mincore", part, io::Error::last_os_error()));
        }
        let pages = (part.first..).zip(there).filter(|(_, byte)| byte & 1 != 0);
        Ok(pages.map(|(page, _)| page).collect())
    }

    /// Reads from the start of `part`, which lies in this region, behind `alias`. Where a page is
    /// missing and registered, this waits for the fault thread.
    pub(in crate::backend) fn read(
        &self,
        alias: Alias,
        part: Pages,
        bytes: &mut [u8],
    ) -> io::Result<()> {
        let mapping = self.mapping(alias);
        let offset = self.host(alias, part).0 - mapping.as_ptr().addr();
        mapping.as_volatile_slice().read_slice(bytes, offset).map_err(io::Error::other)
    }

    /// Writes `bytes` at `gpa`, which lies in this region, behind the private alias.
    pub(in crate::backend) fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = gpa.checked_sub(self.pages.gpa()).and_then(|at| usize::try_from(at).ok());
        let offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        self.private.as_volatile_slice().write_slice(bytes, offset).map_err(io::Error::other)
    }

    /// Drops the contents of `part`, which lies in this region, behind `alias`: it reads as zero.
    pub(in crate::backend) fn discard(&self, alias: Alias, part: Pages) -> Result<(), MemoryError> {
        let mapping = self.mapping(alias);
        let (start, size) = self.host(alias, part);
        advise(mapping, start - mapping.as_ptr().addr(), size, libc::MADV_DONTNEED)
            .map_err(|source| memory_error("madvise(MADV_DONTNEED)", part, source))
    }
}

/// The error of `call` for the pages of `part`.
pub(in crate::backend) fn memory_error(
    call: &'static str,
    part: Pages,
    source: io::Error,
) -> MemoryError {
    MemoryError { call, gpa: part.gpa(), size: part.count * PAGE_SIZE, source }
}

/// madvise of `size` bytes at `offset` of a mapping of guest memory.
fn advise(mapping: &MmapRegion, offset: usize, size: usize, advice: i32) -> io::Result<()> {
    if offset.checked_add(size).is_none_or(|end| end > mapping.size()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: within the mapping, which is guest memory: it holds no Rust objects, and is read and
    // written as volatile bytes only.
    let result = unsafe { libc::madvise(mapping.as_ptr().add(offset).cast(), size, advice) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The RAM of a guest: from 0, with the hole of [`mapgpa_abi::layout`].
#[derive(Debug)]
pub(in crate::backend) struct Ram {
    regions: Vec<Region>,
}

impl Ram {
    /// RAM of `size` bytes, a multiple of 4 KiB, in small pages of the host.
    pub(in crate::backend) fn new(size: u64) -> Result<Self, SetupError> {
        Self::with(size, HostPages::Small)
    }

    /// RAM of `size` bytes, a multiple of 4 KiB, in huge pages where the host has them.
    pub(in crate::backend) fn with_huge_pages(size: u64) -> Result<Self, SetupError> {
        Self::with(size, HostPages::Huge)
    }

    fn with(size: u64, pages: HostPages) -> Result<Self, SetupError> {
        let mut regions = vec![Region::new(0, size.min(HOLE_START), pages)?];
        if size > HOLE_START {
            regions.push(Region::new(HOLE_END, size - HOLE_START, pages)?);
        }
        Ok(Self { regions })
    }

    /// Its regions, in order.
    pub(in crate::backend) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Writes `bytes` at `gpa` behind the private alias.
    pub(in crate::backend) fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), SetupError> {
        let outside = || SetupError::Outside { gpa, size: bytes.len() };
        let page = gpa / PAGE_SIZE;
        let region = self
            .regions
            .iter()
            .find(|region| region.pages.first <= page && page < region.pages.end());
        region.ok_or_else(outside)?.write(gpa, bytes).map_err(|_| outside())
    }

    /// Puts pages behind the private alias of `run` at once, rather than one by one as they are
    /// touched; what lies outside RAM is left out.
    pub(in crate::backend) fn populate(&self, run: Pages) {
        for region in &self.regions {
            if let Some(part) = region.clip(run) {
                let (start, size) = region.host(Alias::Private, part);
                let offset = start - region.private.as_ptr().addr();
                // For speed only: kernels before 5.14 refuse it.
                let _ = advise(&region.private, offset, size, libc::MADV_POPULATE_WRITE);
            }
        }
    }

    /// Whether there is RAM at `gpa` (no shared bit).
    pub(in crate::backend) fn has(&self, gpa: u64) -> bool {
        let page = Pages { first: gpa / PAGE_SIZE, count: 1 };
        self.regions.iter().any(|region| region.clip(page).is_some())
    }

    /// The alias and the page behind a host address.
    pub(in crate::backend) fn find(&self, address: usize) -> Option<(Alias, u64)> {
        self.regions.iter().find_map(|region| {
            [Alias::Private, Alias::Shared].into_iter().find_map(|alias| {
                let mapping = region.mapping(alias);
                let offset = address.checked_sub(mapping.as_ptr().addr())?;
                (offset < mapping.size())
                    .then(|| (alias, region.pages.first + (offset / HOST_PAGE) as u64))
            })
        })
    }
}
