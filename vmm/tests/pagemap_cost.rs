//! What the page map costs: bytes for a terabyte, and allocations and time for a 2 MiB block.
//!
//! A binary of its own, because it counts allocations.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use mapgpa::pagemap::{Change, PageMap, PageState, Pages};

const MIB: usize = 1 << 20;
/// Pages of 2 MiB, 1 GiB and 1 TiB.
const BLOCK: u64 = 512;
const BLOCK_STEP: usize = 512;
const GIB: u64 = 1 << 18;
const TIB: u64 = 1 << 28;

thread_local! {
    /// Bytes that this thread holds, and how often it asked for some.
    static HELD: Cell<usize> = const { Cell::new(0) };
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread.
struct Counting;

/// What an allocation takes of a typical heap: a header of 8 bytes, then rounded to 16.
fn taken(layout: Layout) -> usize {
    (layout.size() + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call goes to `System` with the caller's own arguments; the counters are plain cells
// of this thread without destructors, so that counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get().wrapping_add(taken(layout)));
        ASKED.set(ASKED.get() + 1);
        // SAFETY: the caller upholds what `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get().wrapping_sub(taken(layout)));
        // SAFETY: the caller upholds what `System` asks for.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A map that `fill` filled, and the bytes that it holds.
fn measured(fill: impl FnOnce(&mut PageMap)) -> (PageMap, usize) {
    let before = HELD.get();
    let mut map = PageMap::default();
    fill(&mut map);
    let held = HELD.get().wrapping_sub(before);
    (map, held)
}

fn change(map: &mut PageMap, first: u64, count: u64, change: Change) {
    let mut runs = Vec::new();
    map.apply(Pages { first, count }, change, u64::MAX, &mut runs);
}

/// Shares one page of every block of `pages`: no block is in one state then.
fn mix(map: &mut PageMap, pages: u64) {
    for first in (0..pages).step_by(BLOCK_STEP) {
        change(map, first, 1, Change::Share);
    }
}

#[test]
fn a_terabyte_of_alternating_states_fits_in_96_mib() {
    // A block costs the same however many of its pages differ, so that one page of each stands for
    // the alternating ones; for 1 GiB that is measured.
    let (_, alternating) = measured(|map| {
        for first in (0..GIB).step_by(2) {
            change(map, first, 1, Change::Share);
        }
    });
    let (_, mixed) = measured(|map| mix(map, GIB));
    assert_eq!(alternating, mixed);
    let (map, held) = measured(|map| mix(map, TIB));
    assert!(held < 96 * MIB, "{held}");
    assert!(held > 32 * MIB, "2 bits a page are the least: {held} were not counted right");
    assert_eq!(map.uniform(Pages { first: TIB - BLOCK, count: BLOCK }), None);
}

#[test]
fn an_empty_terabyte_costs_less_than_1_mib() {
    let (_, held) = measured(|_| {});
    assert!(held < 1024, "{held}");
    // Converted and taken back, whole or in pieces, it is as good as empty.
    for piece in [TIB, GIB, 3 * GIB / 2, 16 * BLOCK, BLOCK / 2 * 3] {
        let (map, held) = measured(|map| {
            for what in [Change::Share, Change::Unshare, Change::Accept] {
                for first in (0..TIB).step_by(usize::try_from(piece).expect("64 bits")) {
                    change(map, first, piece.min(TIB - first), what);
                }
            }
        });
        assert!(held < MIB, "{held} after pieces of {piece} pages");
        let whole = Pages { first: 0, count: TIB };
        assert_eq!(map.uniform(whole), Some(PageState::PrivateAccepted));
    }
}

/// The fastest of two conversions of all of `pages` in calls of 2 MiB, and what they asked for.
fn by_blocks(pages: u64, mixed: bool) -> (Duration, usize) {
    let mut best = (Duration::MAX, usize::MAX);
    for _ in 0..2 {
        let mut map = PageMap::default();
        if mixed {
            mix(&mut map, pages);
        }
        let mut runs = Vec::with_capacity(1);
        let (asked, begun) = (ASKED.get(), Instant::now());
        for first in (0..pages).step_by(BLOCK_STEP) {
            runs.clear();
            map.apply(Pages { first, count: BLOCK }, Change::Share, u64::MAX, &mut runs);
        }
        let took = begun.elapsed();
        best = (best.0.min(took), best.1.min(ASKED.get() - asked));
        black_box(map);
    }
    best
}

#[test]
#[expect(clippy::cast_precision_loss, reason = "a ratio")]
fn a_block_costs_the_same_in_a_gibibyte_and_in_a_tebibyte() {
    for mixed in [false, true] {
        let (small, _) = by_blocks(8 * GIB, mixed);
        let (large, asked) = by_blocks(TIB, mixed);
        let tables = usize::try_from(TIB / GIB).expect("64 bits") + 8;
        // Only the table of each GiB, where there was none.
        assert!(asked <= tables, "{asked} allocations for {} blocks", TIB / BLOCK);
        let ratio = large.as_secs_f64() / small.as_secs_f64() / (TIB / (8 * GIB)) as f64;
        assert!(ratio < 8.0, "mixed {mixed}: a block costs {ratio} x what it does in 8 GiB");
    }
}
