//! The page map: the true state of every page of guest-physical address space.
//!
//! A sparse radix tree whose leaves are 2 MiB blocks: a block in one state costs a slot of a table,
//! a mixed block 128 bytes (two bit planes). A table slot can hold the state of everything below
//! it, so an untouched address space costs nothing and a 2 MiB-aligned change is O(1) per block.

mod block;

use std::collections::BTreeMap;

use mapgpa_abi::{Direction, PAGE_SIZE};

use block::Block;

/// What a page is, in the sense of the TDX module and the host together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageState {
    /// Private, and accepted by the guest: usable through the private alias.
    PrivateAccepted,
    /// Private, converted but not accepted yet: not usable.
    PrivatePending,
    /// Shared: usable through the shared alias.
    Shared,
}

/// A run of 4 KiB pages, by page frame number without the shared bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// First page frame number.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl Pages {
    /// The pages of `size` bytes at `gpa`, both multiples of 4 KiB.
    #[must_use]
    pub const fn of_bytes(gpa: u64, size: u64) -> Self {
        Self { first: gpa / PAGE_SIZE, count: size / PAGE_SIZE }
    }

    /// The page frame number after the last; page numbers have at most 52 bits, so it cannot wrap.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.first + self.count
    }

    /// GPA of the first page, in bytes.
    #[must_use]
    pub const fn gpa(&self) -> u64 {
        self.first * PAGE_SIZE
    }
}

/// A change of state, applied to the pages for which it is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Private, accepted or pending, to shared.
    Share,
    /// Shared to private pending.
    Unshare,
    /// Shared to private accepted: the host never removed the page (`accept=already`).
    Restore,
    /// Pending to accepted.
    Accept,
}

impl Change {
    /// The change that a conversion in direction `to` makes.
    #[must_use]
    pub const fn of(to: Direction) -> Self {
        match to {
            Direction::ToShared => Self::Share,
            Direction::ToPrivate => Self::Unshare,
        }
    }

    const fn of_state(self, state: PageState) -> Option<PageState> {
        match (self, state) {
            (Self::Share, PageState::PrivateAccepted | PageState::PrivatePending) => {
                Some(PageState::Shared)
            }
            (Self::Unshare, PageState::Shared) => Some(PageState::PrivatePending),
            (Self::Restore, PageState::Shared) | (Self::Accept, PageState::PrivatePending) => {
                Some(PageState::PrivateAccepted)
            }
            _ => None,
        }
    }
}

/// What a change did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed {
    /// Pages that changed state.
    pub pages: u64,
    /// The first page of the range that would still have to change, or the end of the range.
    pub next: u64,
}

/// The state of every page; untouched pages are private accepted.
#[derive(Debug, Default)]
pub struct PageMap {
    roots: BTreeMap<u64, Slot<Slot<Block>>>,
}

impl PageMap {
    /// Applies `change` to at most `budget` pages of `range`, in order, and appends each run of
    /// pages that changed to `runs`. Pages for which it is no change use up no budget.
    pub fn apply(
        &mut self,
        range: Pages,
        change: Change,
        budget: u64,
        runs: &mut Vec<Pages>,
    ) -> Changed {
        let mut walk = Walk { range, change, budget, changed: 0, stopped: None, runs };
        let size = Slot::<Slot<Block>>::PAGES;
        let mut base = range.first - range.first % size;
        while base < range.end() && walk.stopped.is_none() {
            let root = self.roots.entry(base / size).or_insert_with(Slot::new_default);
            root.apply(base, &mut walk);
            base += size;
        }
        Changed { pages: walk.changed, next: walk.stopped.unwrap_or(range.end()) }
    }

    /// Calls `visit` with the pieces of `range`, in order, each in one state, until it returns
    /// false. Adjacent pieces may have the same state.
    pub fn scan(&self, range: Pages, mut visit: impl FnMut(Pages, PageState) -> bool) {
        let size = Slot::<Slot<Block>>::PAGES;
        let mut at = range.first;
        while at < range.end() {
            let base = at - at % size;
            let part = Pages { first: at, count: (base + size).min(range.end()) - at };
            let go_on = match self.roots.get(&(base / size)) {
                Some(root) => root.scan(base, part, &mut visit),
                None => visit(part, PageState::PrivateAccepted),
            };
            if !go_on {
                return;
            }
            at = part.end();
        }
    }

    /// The state of one page.
    #[must_use]
    pub fn state(&self, page: u64) -> PageState {
        let mut found = PageState::PrivateAccepted;
        self.scan(Pages { first: page, count: 1 }, |_, state| {
            found = state;
            false
        });
        found
    }

    /// The state of all pages of `range` if they have the same; O(1) for an aligned 2 MiB block.
    #[must_use]
    pub fn uniform(&self, range: Pages) -> Option<PageState> {
        let mut seen = None;
        let mut same = true;
        self.scan(range, |_, state| {
            same = *seen.get_or_insert(state) == state;
            same
        });
        seen.filter(|_| same)
    }

    /// The first page of `range` whose state is `wanted`, and how many pages there are of it.
    #[must_use]
    pub fn find(&self, range: Pages, wanted: impl Fn(PageState) -> bool) -> Option<Pages> {
        let mut found: Option<Pages> = None;
        self.scan(range, |piece, state| {
            if wanted(state) {
                found.get_or_insert(Pages { first: piece.first, count: 0 }).count += piece.count;
            }
            true
        });
        found
    }
}

/// A change under way.
struct Walk<'a> {
    range: Pages,
    change: Change,
    budget: u64,
    changed: u64,
    stopped: Option<u64>,
    runs: &'a mut Vec<Pages>,
}

impl Walk<'_> {
    fn emit(&mut self, run: Pages) {
        self.changed += run.count;
        self.budget -= run.count;
        match self.runs.last_mut() {
            Some(last) if last.end() == run.first => last.count += run.count,
            _ => self.runs.push(run),
        }
    }

    /// The part of the range in a node of `size` pages at `base`.
    fn part(&self, base: u64, size: u64) -> Pages {
        let first = self.range.first.max(base);
        Pages { first, count: self.range.end().min(base + size) - first }
    }
}

/// A node of the tree, `PAGES` pages large.
trait Node: Sized {
    const PAGES: u64;
    fn new(state: PageState) -> Self;
    fn new_default() -> Self {
        Self::new(PageState::PrivateAccepted)
    }
    /// The state of all that is below, where it takes no look further down.
    fn state(&self) -> Option<PageState>;
    fn apply(&mut self, base: u64, walk: &mut Walk<'_>);
    fn scan(
        &self,
        base: u64,
        part: Pages,
        visit: &mut impl FnMut(Pages, PageState) -> bool,
    ) -> bool;
}

/// All below in one state, or a table of 512 smaller nodes.
#[derive(Debug)]
enum Slot<T> {
    Uniform(PageState),
    Table(Box<[T]>),
}

impl<T: Node> Node for Slot<T> {
    const PAGES: u64 = 512 * T::PAGES;

    fn new(state: PageState) -> Self {
        Self::Uniform(state)
    }

    fn state(&self) -> Option<PageState> {
        if let Self::Uniform(state) = self { Some(*state) } else { None }
    }

    fn apply(&mut self, base: u64, walk: &mut Walk<'_>) {
        let part = walk.part(base, Self::PAGES);
        if let Self::Uniform(state) = *self {
            let Some(new) = walk.change.of_state(state) else { return };
            if part.count == Self::PAGES && walk.budget >= part.count {
                *self = Self::Uniform(new);
                walk.emit(part);
                return;
            }
            if walk.budget == 0 {
                walk.stopped = Some(part.first);
                return;
            }
            *self = Self::Table((0..512).map(|_| T::new(state)).collect());
        }
        let Self::Table(table) = self else { return };
        let (first, last) = slots(base, part, T::PAGES);
        for (index, node) in (first..).zip(&mut table[first..=last]) {
            node.apply(base + index as u64 * T::PAGES, walk);
            if walk.stopped.is_some() {
                return;
            }
        }
        // A table whose slots have come to the same state is one again. The two ends tell most of
        // those apart that have not, so that this is no work for each call.
        if let Some(state) = table[last].state() {
            let same = |node: &T| node.state() == Some(state);
            if same(&table[511]) && table.iter().all(same) {
                *self = Self::Uniform(state);
            }
        }
    }

    fn scan(
        &self,
        base: u64,
        part: Pages,
        visit: &mut impl FnMut(Pages, PageState) -> bool,
    ) -> bool {
        let table = match self {
            Self::Uniform(state) => return visit(part, *state),
            Self::Table(table) => table,
        };
        let (first, last) = slots(base, part, T::PAGES);
        (first..).zip(&table[first..=last]).all(|(index, node)| {
            let base = base + index as u64 * T::PAGES;
            let first = part.first.max(base);
            let count = part.end().min(base + T::PAGES) - first;
            node.scan(base, Pages { first, count }, visit)
        })
    }
}

/// First and last index of the slots of `size` pages that `part` covers in a table at `base`.
#[expect(clippy::cast_possible_truncation, reason = "less than 512")]
fn slots(base: u64, part: Pages, size: u64) -> (usize, usize) {
    (((part.first - base) / size) as usize, ((part.end() - 1 - base) / size) as usize)
}
