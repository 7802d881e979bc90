//! Memory model `alias`: contents are lost at conversion, and an access that the page's state
//! forbids is caught.
//!
//! A 2 MiB block of an alias is registered with userfaultfd unless all of it is legitimate through
//! that alias, so that a guest at work in converted memory causes no faults. In a mixed block the
//! fault thread ([`super::fault`]) asks the page map. Registering by block rather than by page
//! bounds the number of host mappings: pages that alternate share one.

use mapgpa_abi::{Alias, Direction};

use super::memory::{Ram, Region, memory_error};
use super::model::Books;
use super::stash::Stash;
use super::userfaultfd::Userfaultfd;
use crate::memory::{Memory, MemoryError};
use crate::pagemap::{PageMap, PageState, Pages};

/// Pages of a block.
const BLOCK: u64 = 512;

/// The backing of both aliases, and what of it is registered.
#[derive(Debug)]
pub(super) struct AliasMemory<'a> {
    pub(super) ram: &'a Ram,
    pub(super) userfaultfd: Option<&'a Userfaultfd>,
    private: Blocks,
    shared: Blocks,
    /// Private contents that a conversion to shared was told to keep.
    stash: Stash,
    pub(super) books: Books,
}

/// A set of blocks, by number: page frame number / [`BLOCK`].
#[derive(Debug)]
struct Blocks {
    bits: Vec<u64>,
}

impl Blocks {
    fn new(blocks: u64) -> Self {
        Self { bits: vec![0; usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX)] }
    }

    fn has(&self, block: u64) -> bool {
        self.word(block).is_some_and(|word| self.bits[word] >> (block % 64) & 1 != 0)
    }

    fn set(&mut self, block: u64, on: bool) {
        if let Some(word) = self.word(block) {
            let bit = 1 << (block % 64);
            if on {
                self.bits[word] |= bit;
            } else {
                self.bits[word] &= !bit;
            }
        }
    }

    fn word(&self, block: u64) -> Option<usize> {
        usize::try_from(block / 64).ok().filter(|word| *word < self.bits.len())
    }
}

impl<'a> AliasMemory<'a> {
    /// The memory of a guest all of whose pages are private and accepted.
    ///
    /// # Errors
    /// The shared alias cannot be registered.
    pub(super) fn new(
        ram: &'a Ram,
        userfaultfd: Option<&'a Userfaultfd>,
    ) -> Result<Self, MemoryError> {
        let end = ram.regions().last().map_or(0, |region| region.pages.end());
        let blocks = end.div_ceil(BLOCK);
        let (private, shared) = (Blocks::new(blocks), Blocks::new(blocks));
        let mut this = Self {
            ram,
            userfaultfd,
            private,
            shared,
            stash: Stash::default(),
            books: Books::default(),
        };
        for region in ram.regions() {
            this.register(region, Alias::Shared, region.pages, true)?;
        }
        Ok(this)
    }

    /// Drops the contents of `part` of `region` behind `alias`.
    fn discard(&mut self, region: &Region, alias: Alias, part: Pages) -> Result<(), MemoryError> {
        self.books.work.book(part.count);
        region.discard(alias, part)
    }

    fn blocks(&mut self, alias: Alias) -> &mut Blocks {
        match alias {
            Alias::Private => &mut self.private,
            Alias::Shared => &mut self.shared,
        }
    }

    /// Registers what the map now forbids through `alias` in the blocks that `part` touches, and
    /// unregisters what it allows; neighbours that change alike by one call.
    fn update(
        &mut self,
        region: &Region,
        alias: Alias,
        part: Pages,
        map: &PageMap,
    ) -> Result<(), MemoryError> {
        if self.userfaultfd.is_none() {
            return Ok(());
        }
        let legitimate = match alias {
            Alias::Private => PageState::PrivateAccepted,
            Alias::Shared => PageState::Shared,
        };
        let mut change: Option<(Pages, bool)> = None;
        for block in part.first / BLOCK..part.end().div_ceil(BLOCK) {
            let pages = Pages { first: block * BLOCK, count: BLOCK };
            let Some(pages) = region.clip(pages) else { continue };
            let on = map.uniform(pages) != Some(legitimate);
            if self.blocks(alias).has(block) == on {
                continue;
            }
            match &mut change {
                Some((run, to)) if *to == on && run.end() == pages.first => {
                    run.count += pages.count;
                }
                _ => {
                    if let Some((run, to)) = change.replace((pages, on)) {
                        self.register(region, alias, run, to)?;
                    }
                }
            }
        }
        if let Some((run, to)) = change {
            self.register(region, alias, run, to)?;
        }
        Ok(())
    }

    /// Registers (`on`) or unregisters `run`, whole blocks of `region`.
    ///
    /// Where the host has no mappings left (vm.max_map_count), more is registered rather than less:
    /// the fault thread then lets legitimate accesses through, only slower.
    fn register(
        &mut self,
        region: &Region,
        alias: Alias,
        mut run: Pages,
        on: bool,
    ) -> Result<(), MemoryError> {
        let Some(userfaultfd) = self.userfaultfd else { return Ok(()) };
        let (start, size) = region.host(alias, run);
        let call = if on { "UFFDIO_REGISTER" } else { "UFFDIO_UNREGISTER" };
        self.books.work.book(0);
        let done = if on {
            userfaultfd.register(start, size)
        } else {
            userfaultfd.unregister(start, size)
        };
        if let Err(error) = done {
            if error.raw_os_error() != Some(libc::ENOMEM) {
                return Err(memory_error(call, run, error));
            }
            // What was changed before the mappings ran out is covered too.
            run = region.pages;
            let (start, size) = region.host(alias, run);
            userfaultfd
                .register(start, size)
                .map_err(|error| memory_error("UFFDIO_REGISTER", run, error))?;
            self.mark(alias, run, true);
            return Ok(());
        }
        self.mark(alias, run, on);
        Ok(())
    }

    fn mark(&mut self, alias: Alias, run: Pages, on: bool) {
        for block in run.first / BLOCK..run.end().div_ceil(BLOCK) {
            self.blocks(alias).set(block, on);
        }
    }
}

impl Memory for AliasMemory<'_> {
    fn convert(
        &mut self,
        run: Pages,
        to: Direction,
        keep: bool,
        map: &PageMap,
    ) -> Result<(), MemoryError> {
        let ram = self.ram;
        let (new, old) = (to.alias(), to.reverse().alias());
        for region in ram.regions() {
            let Some(part) = region.clip(run) else { continue };
            // In this order a touch in between is either before the conversion, or caught.
            self.update(region, old, part, map)?;
            if keep && to == Direction::ToShared {
                self.stash.keep(region, part)?;
            }
            self.discard(region, old, part)?;
            if self.books.tainted {
                self.discard(region, new, part)?;
            }
            if to == Direction::ToPrivate {
                if keep {
                    self.stash.restore(region, part, self.userfaultfd)?;
                } else {
                    self.stash.forget(part);
                }
            }
            self.update(region, new, part, map)?;
        }
        Ok(())
    }

    fn accept(&mut self, run: Pages, map: &PageMap) -> Result<(), MemoryError> {
        let ram = self.ram;
        for region in ram.regions() {
            let Some(part) = region.clip(run) else { continue };
            if self.books.tainted {
                self.discard(region, Alias::Private, part)?;
            }
            self.update(region, Alias::Private, part, map)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::pagemap::Change;

    const K4: u64 = 4096;

    /// Memory and map, without a VM.
    struct Bench<'a> {
        memory: AliasMemory<'a>,
        map: PageMap,
    }

    impl<'a> Bench<'a> {
        fn new(ram: &'a Ram, userfaultfd: Option<&'a Userfaultfd>) -> Self {
            let memory = AliasMemory::new(ram, userfaultfd).unwrap();
            Self { memory, map: PageMap::default() }
        }

        fn convert(&mut self, gpa: u64, size: u64, to: Direction) {
            let mut runs = Vec::new();
            self.map.apply(Pages::of_bytes(gpa, size), Change::of(to), u64::MAX, &mut runs);
            for run in runs {
                self.memory.convert(run, to, false, &self.map).unwrap();
            }
        }

        fn is_registered(&self, alias: Alias, gpa: u64) -> bool {
            let blocks = match alias {
                Alias::Private => &self.memory.private,
                Alias::Shared => &self.memory.shared,
            };
            blocks.has(gpa / K4 / BLOCK)
        }
    }

    fn read(ram: &Ram, alias: Alias, gpa: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        let at = Pages::of_bytes(gpa, K4);
        ram.regions()[0].read(alias, at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[test]
    fn without_userfaultfd_contents_are_lost_all_the_same() {
        let ram = Ram::new(4 << 20).unwrap();
        let mut bench = Bench::new(&ram, None);
        ram.write(5 * K4, &[7; 8]).unwrap();
        ram.write(6 * K4, &[7; 8]).unwrap();
        bench.convert(5 * K4, K4, Direction::ToShared);
        assert_eq!(read(&ram, Alias::Shared, 5 * K4).unwrap(), 0);
        assert_eq!(read(&ram, Alias::Private, 5 * K4).unwrap(), 0);
        assert_eq!(read(&ram, Alias::Private, 6 * K4).unwrap(), u64::from_le_bytes([7; 8]));
    }

    #[test]
    fn blocks_are_registered_unless_all_of_them_is_legitimate() {
        let Some(userfaultfd) = Userfaultfd::of_test() else { return };
        // The last block is no whole one.
        let ram = Ram::new((8 << 20) + 3 * K4).unwrap();
        let mut bench = Bench::new(&ram, Some(&userfaultfd));
        let state = |bench: &Bench<'_>, gpa| {
            [Alias::Private, Alias::Shared].map(|alias| bench.is_registered(alias, gpa))
        };
        let (m2, last) = (2 << 20, 8 << 20);
        assert_eq!(state(&bench, m2), [false, true]);
        bench.convert(m2 + K4, K4, Direction::ToShared);
        assert_eq!(state(&bench, m2), [true, true], "mixed");
        assert_eq!(state(&bench, 2 * m2), [false, true], "its neighbour");
        bench.convert(m2, 3 * m2 + 3 * K4, Direction::ToShared);
        for gpa in [m2, 2 * m2, last] {
            assert_eq!(state(&bench, gpa), [true, false], "all shared");
        }
        bench.convert(last, 3 * K4, Direction::ToPrivate);
        assert_eq!(state(&bench, last), [true, true], "pending");
        let run = Pages::of_bytes(last, 3 * K4);
        bench.map.apply(run, Change::Accept, u64::MAX, &mut Vec::new());
        bench.memory.accept(run, &bench.map).unwrap();
        assert_eq!(state(&bench, last), [false, true], "accepted");
    }

    #[test]
    fn more_alternating_blocks_than_the_host_has_mappings_are_watched_still() {
        let Some(userfaultfd) = Userfaultfd::of_test() else { return };
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let limit: u64 = limit.trim().parse().unwrap();
        if limit > 1 << 17 {
            eprintln!("skipped: vm.max_map_count is {limit}, too many to use up in a test");
            return;
        }
        let m2 = 2 << 20;
        let size = limit * m2 * 3;
        let ram = Ram::new(size).unwrap();
        let mut bench = Bench::new(&ram, Some(&userfaultfd));
        for block in 0..size / m2 / 2 - 1024 {
            bench.convert(2 * block * m2, m2, Direction::ToShared);
        }
        // The last are in the second region, whose mappings were the ones to run out.
        let gpa = (size / m2 / 2 - 1025) * 2 * m2;
        assert!(bench.is_registered(Alias::Private, gpa));
        assert!(bench.is_registered(Alias::Shared, gpa + m2));
        std::thread::scope(|scope| {
            let region = &ram.regions()[1];
            let wrong =
                scope.spawn(|| region.read(Alias::Private, Pages::of_bytes(gpa, K4), &mut [0; 8]));
            let fault = loop {
                if let Some(fault) = userfaultfd.read_fault().unwrap() {
                    break fault;
                }
                std::thread::yield_now();
            };
            assert_eq!(ram.find(fault), Some((Alias::Private, gpa / K4)));
            userfaultfd.fill(fault).unwrap();
            wrong.join().unwrap().unwrap();
        });
    }
}
