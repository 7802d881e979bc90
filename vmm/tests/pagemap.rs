//! The page map against naive models: a state a page near the boundaries of its tables, and a list
//! of runs over terabytes.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

use mapgpa::pagemap::{Change, Changed, PageMap, PageState, Pages};
use proptest::prelude::*;

/// Pages of a block, of a table of blocks, and of a root: 2 MiB, 1 GiB, 512 GiB.
const BLOCK: u64 = 512;
const TABLE: u64 = 512 * BLOCK;
const ROOT: u64 = 512 * TABLE;

const CHANGES: [Change; 4] = [Change::Share, Change::Unshare, Change::Restore, Change::Accept];
const STATES: [PageState; 3] =
    [PageState::PrivateAccepted, PageState::PrivatePending, PageState::Shared];

/// What a change makes of a state, written a second time, as a table.
fn after(change: Change, state: PageState) -> Option<PageState> {
    use PageState::{PrivateAccepted, PrivatePending, Shared};
    match (state, change) {
        (PrivateAccepted, Change::Share) => Some(Shared),
        (PrivatePending, Change::Share) => Some(Shared),
        (Shared, Change::Unshare) => Some(PrivatePending),
        (Shared, Change::Restore) => Some(PrivateAccepted),
        (PrivatePending, Change::Accept) => Some(PrivateAccepted),
        _ => None,
    }
}

/// Runs of pages in one state, in order, without gaps, from page 0 on: the naive model. Neighbours
/// may have the same state.
#[derive(Debug)]
struct Model(Vec<(Pages, PageState)>);

impl Model {
    fn new(pages: u64) -> Self {
        Self(vec![(Pages { first: 0, count: pages }, PageState::PrivateAccepted)])
    }

    /// Makes a run begin at `page`.
    fn split(&mut self, page: u64) {
        if let Some(at) = self.0.iter().position(|(run, _)| run.first < page && page < run.end()) {
            let (run, state) = self.0[at];
            self.0[at].0.count = page - run.first;
            self.0.insert(at + 1, (Pages { first: page, count: run.end() - page }, state));
        }
    }

    fn pieces(&mut self, range: Pages) -> Vec<(Pages, PageState)> {
        self.split(range.first);
        self.split(range.end());
        let inside = |run: &Pages| run.first >= range.first && run.end() <= range.end();
        merged(self.0.iter().filter(|(run, _)| inside(run)).copied())
    }

    fn apply(&mut self, range: Pages, change: Change, mut budget: u64) -> (Changed, Vec<Pages>) {
        let (mut pages, mut runs) = (0, Vec::new());
        for (run, state) in self.pieces(range) {
            let Some(new) = after(change, state) else { continue };
            if budget == 0 {
                return (Changed { pages, next: run.first }, joined(&runs));
            }
            let count = run.count.min(budget);
            let done = Pages { first: run.first, count };
            self.split(done.first);
            self.split(done.end());
            for (part, state) in &mut self.0 {
                if part.first >= done.first && part.end() <= done.end() {
                    *state = new;
                }
            }
            budget -= count;
            pages += count;
            runs.push(done);
            if count < run.count {
                return (Changed { pages, next: done.end() }, joined(&runs));
            }
        }
        (Changed { pages, next: range.end() }, joined(&runs))
    }
}

/// Neighbours in the same state as one run.
fn merged(runs: impl Iterator<Item = (Pages, PageState)>) -> Vec<(Pages, PageState)> {
    let mut all: Vec<(Pages, PageState)> = Vec::new();
    for (run, state) in runs {
        match all.last_mut() {
            Some((last, of)) if *of == state && last.end() == run.first => last.count += run.count,
            _ => all.push((run, state)),
        }
    }
    all
}

/// Neighbours as one run.
fn joined(runs: &[Pages]) -> Vec<Pages> {
    merged(runs.iter().map(|run| (*run, PageState::Shared)))
        .into_iter()
        .map(|(run, _)| run)
        .collect()
}

fn scanned(map: &PageMap, range: Pages) -> Vec<(Pages, PageState)> {
    let mut pieces = Vec::new();
    map.scan(range, |piece, state| {
        pieces.push((piece, state));
        true
    });
    pieces
}

/// A change of a range with a budget.
#[derive(Debug, Clone, Copy)]
struct Step {
    range: Pages,
    change: Change,
    budget: u64,
}

/// Ranges within `0..pages` whose ends prefer to lie at, or a little off, a multiple of `units`.
fn range(pages: u64, units: &'static [u64]) -> impl Strategy<Value = Pages> {
    let edge = (0..=pages, 0..units.len(), -3_i64..=3, any::<bool>()).prop_map(
        move |(page, unit, off, near)| {
            let aligned = page - page % units[unit];
            if near { aligned.saturating_add_signed(off).min(pages) } else { page }
        },
    );
    (edge.clone(), edge).prop_filter_map("empty", |(a, b)| {
        (a != b).then(|| Pages { first: a.min(b), count: a.abs_diff(b) })
    })
}

fn steps(pages: u64, units: &'static [u64]) -> impl Strategy<Value = Vec<Step>> {
    let budget = prop_oneof![
        4 => Just(u64::MAX),
        1 => Just(0),
        2 => 1..200_u64,
        2 => proptest::sample::select(units).prop_map(|unit| unit),
        1 => 1..=pages,
    ];
    let change = proptest::sample::select(&CHANGES[..]);
    let step = (range(pages, units), change, budget).prop_map(|(range, change, budget)| Step {
        range,
        change,
        budget,
    });
    proptest::collection::vec(step, 1..24)
}

/// Holds a map and a model to the same answers, `base` pages apart.
fn compare(steps: &[Step], looks: &[Pages], base: u64, pages: u64) {
    let mut map = PageMap::default();
    let mut model = Model::new(pages);
    let up = |run: Pages| Pages { first: run.first + base, count: run.count };
    for Step { range, change, budget } in steps {
        // What is there already stays, and is not joined to.
        let before = Pages { first: u64::MAX - 9, count: 1 };
        let mut runs = vec![before];
        let changed = map.apply(up(*range), *change, *budget, &mut runs);
        let (expected, expected_runs) = model.apply(*range, *change, *budget);
        assert_eq!(changed.pages, expected.pages, "{range:?} {change:?} {budget}");
        assert_eq!(changed.next, expected.next + base, "{range:?} {change:?} {budget}");
        assert_eq!(runs.remove(0), before);
        assert_eq!(runs, expected_runs.into_iter().map(up).collect::<Vec<_>>());
        assert_eq!(changed.pages, runs.iter().map(|run| run.count).sum::<u64>());
    }
    let whole = Pages { first: 0, count: pages };
    for look in looks.iter().copied().chain([whole]) {
        let expected = model.pieces(look);
        let pieces = scanned(&map, up(look));
        assert!(pieces.iter().all(|(piece, _)| piece.count > 0));
        let down = pieces.iter().map(|(piece, state)| {
            (Pages { first: piece.first - base, count: piece.count }, *state)
        });
        assert_eq!(merged(down), expected, "{look:?}");
        let uniform = if let [(_, state)] = expected[..] { Some(state) } else { None };
        assert_eq!(map.uniform(up(look)), uniform, "{look:?}");
        assert_eq!(map.state(look.first + base), expected[0].1);
        for wanted in STATES {
            let of = expected.iter().filter(|(_, state)| *state == wanted);
            let found = of.clone().next().map(|(run, _)| Pages {
                first: run.first + base,
                count: of.map(|(run, _)| run.count).sum(),
            });
            assert_eq!(map.find(up(look), |state| state == wanted), found, "{look:?} {wanted:?}");
        }
    }
    let outside = Pages { first: base + pages, count: BLOCK };
    assert_eq!(map.uniform(outside), Some(PageState::PrivateAccepted), "no change outside");
}

/// A few blocks, and words within them.
const SMALL: &[u64] = &[1, 64, BLOCK];
/// All of the tree's levels.
const LARGE: &[u64] = &[1, 64, BLOCK, TABLE, ROOT];

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Four blocks about a boundary of 2 MiB, 1 GiB or 512 GiB.
    #[test]
    fn as_a_model_near_boundaries(
        steps in steps(4 * BLOCK, SMALL),
        looks in proptest::collection::vec(range(4 * BLOCK, SMALL), 4),
        boundary in proptest::sample::select(&[2 * BLOCK, TABLE, ROOT, 3 * ROOT][..]),
    ) {
        compare(&steps, &looks, boundary - 2 * BLOCK, 4 * BLOCK);
    }

    /// Two and a half terabytes, from zero.
    #[test]
    fn as_a_model_over_terabytes(
        steps in steps(5 * ROOT, LARGE),
        looks in proptest::collection::vec(range(5 * ROOT, LARGE), 4),
    ) {
        compare(&steps, &looks, 0, 5 * ROOT);
    }
}

#[test]
fn a_scan_stops_when_it_is_told_to() {
    let mut map = PageMap::default();
    let range = Pages { first: TABLE - 8, count: 16 };
    for page in (range.first..range.end()).step_by(2) {
        map.apply(Pages { first: page, count: 1 }, Change::Share, 1, &mut Vec::new());
    }
    for stop_after in 1..=16 {
        let mut seen = 0;
        map.scan(range, |_, _| {
            seen += 1;
            seen < stop_after
        });
        assert_eq!(seen, stop_after);
    }
}

#[test]
fn the_highest_pages_there_are() {
    let mut map = PageMap::default();
    let top = Pages { first: (1 << 40) - 3, count: 3 };
    let changed = map.apply(top, Change::Share, u64::MAX, &mut Vec::new());
    assert_eq!(changed, Changed { pages: 3, next: 1 << 40 });
    assert_eq!(map.uniform(top), Some(PageState::Shared));
}
