//! Made-up events for the judge: a reply, a conversation that ended well, one that was given up, and
//! what the judge says of a stream.

use mapgpa::engine::{Accept, Call, Conversation, Ending, Event, Then, Truth};
use mapgpa::judge::{Check, Judge, Judgement, Rules};
use mapgpa::pagemap::{PageState, Pages};
use mapgpa_abi::tdcall::{module, status};
use mapgpa_abi::{Alias, Direction};

pub const GPA: u64 = 16 << 20;
pub const BIT: u64 = 1 << 47;
pub const PAGES: Pages = Pages { first: GPA / 4096, count: 512 };
pub const PART: Pages = Pages { first: PAGES.first + 8, count: 4 };

/// A reply RETRY with progress, in the middle of a conversation of [`PAGES`].
pub const RETRY: Call = Call {
    vcpu: 0,
    call: 1,
    raw_gpa: GPA | BIT,
    size: 512 * 4096,
    to: Direction::ToShared,
    converted: 8,
    status: status::RETRY,
    r11: (PART.first * 4096) | BIT,
    truth: Truth::True,
    malformed: None,
    stray: None,
    no_progress: 0,
    standing: 0,
    requests: 1,
    pages: PAGES.count,
    special: false,
    at_ns: 0,
    took_ns: 0,
};

pub const CONVERSATION: Conversation = Conversation {
    vcpu: 0,
    pages: PAGES,
    to: Direction::ToShared,
    requests: 1,
    retries: 1,
    no_progress: 0,
    ns: 0,
};

/// A conversation that ended well.
#[derive(Clone, Copy)]
pub struct Closed {
    pub to: Direction,
    pub pages: Pages,
    pub ending: Ending,
    pub marked: bool,
    pub missing: Option<Pages>,
    pub lied: bool,
    pub pending: Option<Pages>,
}

pub const CLOSED: Closed = Closed {
    to: Direction::ToShared,
    pages: PAGES,
    ending: Ending::Completed,
    marked: true,
    missing: None,
    lied: false,
    pending: None,
};

pub const GAVE_UP: Closed =
    Closed { ending: Ending::GaveUp(Some(GPA)), missing: Some(PART), ..CLOSED };

impl Closed {
    pub fn event(self) -> Event<'static> {
        Event::Closed {
            conversation: Conversation { to: self.to, pages: self.pages, ..CONVERSATION },
            ending: self.ending,
            marked: self.marked,
            reported_accepted: 0,
            missing: self.missing,
            lied: self.lied,
            pending: self.pending,
        }
    }
}

pub const ACCEPT: Accept = Accept {
    vcpu: 0,
    pages: PART,
    answer: Some(module::SUCCESS),
    shared: false,
    lied: false,
    special: false,
};

pub const EXIT: Event<'static> = Event::Exit { vcpu: 0, success: true };
pub const EXIT_FAILURE: Event<'static> = Event::Exit { vcpu: 0, success: false };
pub const USE: Event<'static> = Event::Use { pages: PART, alias: Alias::Private };

pub fn touch(alias: Alias, state: PageState, lied: bool) -> Event<'static> {
    let bit = if alias == Alias::Shared { BIT } else { 0 };
    Event::Touch { raw_gpa: PART.gpa() | bit, alias, page: PART.first, state, lied }
}

pub fn judge(events: &[Event<'_>]) -> Judgement {
    let mut judge = Judge::new(Rules::default(), false);
    for event in events {
        judge.on(event);
    }
    judge.finish()
}

/// The checks that `events` violate, in order.
pub fn checks(events: &[Event<'_>]) -> Vec<Check> {
    judge(events).violations.iter().map(|violation| violation.check).collect()
}

pub fn then(rules: Rules, events: &[Event<'_>]) -> Vec<Then> {
    let mut judge = Judge::new(rules, false);
    events.iter().map(|event| judge.on(event)).collect()
}
