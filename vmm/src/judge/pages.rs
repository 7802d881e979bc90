//! Pages that the guest touches, or hands over at ExitBootServices, against what became of their last
//! conversion.

use std::fmt;

use mapgpa_abi::{Alias, Direction, PAGE_SIZE};

use super::{Check, Judge, name};
use crate::pagemap::{PageState, Pages};
use crate::units::show_size;

/// A conversation that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Past {
    pub(super) vcpu: u32,
    pub(super) to: Direction,
    pub(super) pages: Pages,
    /// The last call by then.
    pub(super) call: u64,
}

impl fmt::Display for Past {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = show_size(self.pages.count * PAGE_SIZE);
        write!(f, "{size} at {:#x} {}, call {}", self.pages.gpa(), to_name(self.to), self.call)
    }
}

impl Judge {
    pub(super) fn touch(
        &mut self,
        raw_gpa: u64,
        alias: Alias,
        page: u64,
        state: PageState,
        lied: bool,
    ) {
        let failed = self.failed.get(&page).copied();
        let done = self
            .recent
            .iter()
            .rev()
            .find(|past| (past.pages.first..past.pages.end()).contains(&page));
        let cause = match (failed, done) {
            (Some(past), _) => format!(" ({past}, failed)"),
            (None, Some(past)) => format!(" ({past}, completed)"),
            (None, None) => String::new(),
        };
        let detail =
            format!("touched through the {} alias while {}{cause}", name(alias), state_name(state));
        if lied {
            self.note(format!("{raw_gpa:#x} {detail}: the host had lied about it"));
            return;
        }
        if let Some(past) = failed {
            let detail = format!("the guest uses the page after its conversion failed ({past})");
            self.violate(Check::IgnoredFailure, Some(raw_gpa), detail);
        }
        let pending = (alias, state) == (Alias::Private, PageState::PrivatePending);
        let check = if pending { Check::AccessBeforeAccept } else { Check::WrongAlias };
        self.violate(check, Some(raw_gpa), detail);
    }

    /// RAM that is not private and accepted when boot services have been exited.
    pub(super) fn left(&mut self, pages: Pages, state: PageState) {
        let (first, end) = (pages.gpa(), pages.end() * PAGE_SIZE);
        let range = pages.first..pages.end();
        let what = format!("{} pages, {first:#x} to {end:#x}", pages.count);
        if state == PageState::PrivatePending {
            if self.completed.overlapping(range).next().is_none() {
                // What was never converted is what the firmware lets the kernel accept.
                self.note(format!("{what}, were not accepted by the firmware"));
            }
            return;
        }
        let failed = self.failed.overlapping(range).next().map(|(_, past)| *past);
        if let Some(past) = failed {
            let detail =
                format!("ExitBootServices goes on though a conversion in {what}, failed ({past})");
            self.violate(Check::IgnoredFailure, Some(first), detail);
        }
        let detail = format!("{what}, are still shared with the host");
        self.violate(Check::LeftShared, Some(first), detail);
    }
}

const fn state_name(state: PageState) -> &'static str {
    match state {
        PageState::PrivateAccepted => "private",
        PageState::PrivatePending => "private and pending acceptance",
        PageState::Shared => "shared",
    }
}

const fn to_name(to: Direction) -> &'static str {
    match to {
        Direction::ToShared => "to shared",
        Direction::ToPrivate => "to private",
    }
}
