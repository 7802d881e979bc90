//! A leaf of the page map: one 2 MiB block, in one state or mixed.

use super::{Change, Node, PageState, Pages, Walk};

/// A 2 MiB block: in one state, or two bit planes.
#[derive(Debug)]
pub(super) enum Block {
    Uniform(PageState),
    Mixed(Box<Planes>),
}

/// One bit a page; neither bit set is private accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Planes {
    shared: [u64; 8],
    pending: [u64; 8],
}

impl Planes {
    fn new(state: PageState) -> Self {
        let plane = |is: bool| if is { [u64::MAX; 8] } else { [0; 8] };
        Self {
            shared: plane(state == PageState::Shared),
            pending: plane(state == PageState::PrivatePending),
        }
    }

    fn uniform(&self) -> Option<PageState> {
        [PageState::PrivateAccepted, PageState::PrivatePending, PageState::Shared]
            .into_iter()
            .find(|state| Self::new(*state) == *self)
    }

    /// Of word `w`, the pages for which `change` is a change.
    fn candidates(&self, w: usize, change: Change) -> u64 {
        match change {
            Change::Share => !self.shared[w],
            Change::Unshare | Change::Restore => self.shared[w],
            Change::Accept => self.pending[w],
        }
    }

    fn change(&mut self, w: usize, bits: u64, change: Change) {
        match change {
            Change::Share => {
                self.shared[w] |= bits;
                self.pending[w] &= !bits;
            }
            Change::Unshare => {
                self.shared[w] &= !bits;
                self.pending[w] |= bits;
            }
            Change::Restore => self.shared[w] &= !bits,
            Change::Accept => self.pending[w] &= !bits,
        }
    }
}

impl Node for Block {
    const PAGES: u64 = 512;

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
            if walk.budget == 0 {
                walk.stopped = Some(part.first);
                return;
            }
            if part.count == Self::PAGES && walk.budget >= part.count {
                *self = Self::Uniform(new);
                walk.emit(part);
                return;
            }
            *self = Self::Mixed(Box::new(Planes::new(state)));
        }
        let Self::Mixed(planes) = self else { return };
        for (w, mask) in words(base, part) {
            let mut todo = planes.candidates(w, walk.change) & mask;
            let mut done = 0;
            while todo != 0 {
                let bit = todo.trailing_zeros();
                if walk.budget == 0 {
                    walk.stopped = Some(base + w as u64 * 64 + u64::from(bit));
                    break;
                }
                let run = (!(todo >> bit)).trailing_zeros();
                let run = u64::from(run).min(walk.budget);
                let bits = ones(run) << bit;
                done |= bits;
                todo &= !bits;
                walk.emit(Pages { first: base + w as u64 * 64 + u64::from(bit), count: run });
            }
            planes.change(w, done, walk.change);
            if walk.stopped.is_some() {
                break;
            }
        }
        if let Some(state) = planes.uniform() {
            *self = Self::Uniform(state);
        }
    }

    fn scan(
        &self,
        base: u64,
        part: Pages,
        visit: &mut impl FnMut(Pages, PageState) -> bool,
    ) -> bool {
        let planes = match self {
            Self::Uniform(state) => return visit(part, *state),
            Self::Mixed(planes) => planes,
        };
        for (w, mask) in words(base, part) {
            let first = base + w as u64 * 64;
            let mut todo = mask;
            while todo != 0 {
                let bit = todo.trailing_zeros();
                let (plane, state) = if planes.shared[w] >> bit & 1 != 0 {
                    (planes.shared[w], PageState::Shared)
                } else if planes.pending[w] >> bit & 1 != 0 {
                    (planes.pending[w], PageState::PrivatePending)
                } else {
                    (!(planes.shared[w] | planes.pending[w]), PageState::PrivateAccepted)
                };
                let run = u64::from((!((plane & todo) >> bit)).trailing_zeros());
                todo &= !(ones(run) << bit);
                if !visit(Pages { first: first + u64::from(bit), count: run }, state) {
                    return false;
                }
            }
        }
        true
    }
}

/// The lowest `count` bits, 1 to 64.
const fn ones(count: u64) -> u64 {
    u64::MAX >> (64 - count)
}

/// The words of a block at `base` that `part` touches, each with the mask of its pages.
#[expect(clippy::cast_possible_truncation, reason = "less than 512")]
fn words(base: u64, part: Pages) -> impl Iterator<Item = (usize, u64)> {
    let (lo, hi) = (part.first - base, part.end() - base);
    (lo / 64..=(hi - 1) / 64).map(move |w| {
        let from = lo.max(w * 64) - w * 64;
        let to = hi.min(w * 64 + 64) - w * 64;
        (w as usize, ones(to - from) << from)
    })
}
