//! The judge: holds the events of a run against the checks.
//!
//! It sees events only, so that made-up ones prove it. What a guest could not have known is a note;
//! what it could is a violation, whatever the host did.

mod checks;
mod pages;
mod verdict;

use mapgpa_abi::tdcall::{module, status};
use mapgpa_abi::{Alias, Direction, PAGE_SIZE};
use rangemap::RangeMap;
use std::collections::{BTreeMap, VecDeque};

pub use checks::{CHECKS, Check, CheckInfo};
use pages::Past;
pub use verdict::{Class, GuestResult, Judgement, Rules, Violation};

use crate::engine::{
    Accept, Alarm, Call, Conversation, Ending, Event, Malformed, Phase, Stray, Then, Truth,
};
use crate::pagemap::Pages;
use crate::units::show_size;

/// Violations kept of one check, and notes kept; more are counted.
const KEPT: usize = 16;
/// Completed conversions that are remembered one by one.
const RECENT: usize = 1024;

/// A judge at work.
#[derive(Debug)]
pub struct Judge {
    rules: Rules,
    class: Class,
    result: GuestResult,
    exercised: bool,
    violations: Vec<Violation>,
    dropped: u64,
    notes: Vec<String>,
    dropped_notes: u64,
    /// The last call, of whatever vCPU.
    last_call: u64,
    /// The first sign that the guest gave up: call, GPA.
    gave_up: Option<(u64, Option<u64>, String)>,
    /// Pages whose last conversion failed, and that conversion.
    failed: RangeMap<u64, Past>,
    /// Pages whose last conversion was completed: by which vCPU, and to what. Without more, so that
    /// neighbours merge.
    completed: RangeMap<u64, (u32, Direction)>,
    /// The latest of those conversions, newest last: what a page's was is looked for only to be told.
    recent: VecDeque<Past>,
    /// How far a firmware has come.
    phase: Option<Phase>,
    /// Replies in a row, by vCPU, that said RETRY at the start of the request.
    at_start: BTreeMap<u32, u64>,
    /// Accepts in a row, by vCPU, that were answered OPERAND_BUSY.
    busy: BTreeMap<u32, u64>,
}

impl Judge {
    /// A judge of a run under a policy that is `special`, i.e. about something that has to occur.
    #[must_use]
    pub fn new(rules: Rules, special: bool) -> Self {
        Self {
            rules,
            class: Class::Legal,
            result: GuestResult::None,
            exercised: !special,
            violations: Vec::new(),
            dropped: 0,
            notes: Vec::new(),
            dropped_notes: 0,
            last_call: 0,
            gave_up: None,
            failed: RangeMap::new(),
            completed: RangeMap::new(),
            recent: VecDeque::new(),
            phase: None,
            at_start: BTreeMap::new(),
            busy: BTreeMap::new(),
        }
    }

    /// Takes an event.
    pub fn on(&mut self, event: &Event<'_>) -> Then {
        let before = self.violations.len();
        match event {
            Event::Call(call) => self.call(call),
            Event::Accept(accept) => self.accept(accept),
            Event::Touch { raw_gpa, alias, page, state, lied } => {
                self.touch(*raw_gpa, *alias, *page, *state, *lied);
            }
            Event::Unaccepted { range, pending } => {
                let detail = format!(
                    "{} pages of {} at {:#x} are still pending acceptance, though the guest took \
                     their conversion to private for done",
                    pending.count,
                    show_size(range.count * PAGE_SIZE),
                    range.gpa()
                );
                self.violate(Check::AcceptMissing, Some(pending.gpa()), detail);
            }
            Event::Phase { phase, .. } => self.phase = Some(*phase),
            Event::Left { pages, state } => self.left(*pages, *state),
            Event::Closed { conversation, ending, marked, missing, lied, pending, .. } => {
                let Conversation { vcpu, pages, to, .. } = *conversation;
                let range = pages.first..pages.end();
                let past = Past { vcpu, to, pages, call: self.last_call };
                self.at_start.remove(&vcpu);
                match ending {
                    Ending::Completed => {
                        self.failed.remove(range.clone());
                        self.completed.insert(range, (vcpu, to));
                        if self.recent.len() == RECENT {
                            self.recent.pop_front();
                        }
                        self.recent.push_back(past);
                        self.end_well(to, *marked, *missing, *lied, *pending);
                    }
                    Ending::GaveUp(at) => {
                        self.failed.insert(range.clone(), past);
                        // What another vCPU has converted meanwhile is there to be used.
                        for (part, by) in self.completed.overlapping(range) {
                            if by.0 != vcpu && by.1 == to {
                                self.failed.remove(part.clone());
                            }
                        }
                        let gpa = at.unwrap_or_else(|| pages.gpa());
                        self.give_up(Some(gpa), "the conversion failed");
                    }
                    Ending::NeverReturned => {}
                }
            }
            Event::Use { pages, alias } => {
                let mut failed = self.failed.overlapping(pages.first..pages.end());
                if let Some((failed, _)) = failed.next() {
                    let gpa = failed.start.max(pages.first) * PAGE_SIZE;
                    let detail = format!(
                        "the guest uses {} pages through the {} alias after their \
                         conversion failed",
                        pages.count,
                        name(*alias)
                    );
                    self.violate(Check::IgnoredFailure, Some(gpa), detail);
                }
            }
            Event::Panic { text } => {
                self.result = GuestResult::Failure;
                self.give_up(None, &format!("the guest panicked: {text}"));
                self.note(format!("the guest panicked: {text}"));
            }
            Event::Crash { detail } => {
                self.result = GuestResult::Crash;
                self.violate(Check::Crash, None, (*detail).to_owned());
            }
            Event::Text { text } => self.note(format!("the guest says: {text}")),
            Event::Odd { detail } => self.note((*detail).to_owned()),
            Event::Console { text, alarm, .. } => match alarm {
                Some(Alarm::GaveUp) => {
                    self.give_up(None, &format!("the kernel says: {text}"));
                    self.note(format!("the kernel says: {text}"));
                }
                Some(Alarm::Oops) => {
                    self.result = GuestResult::Crash;
                    self.violate(Check::Crash, None, (*text).to_owned());
                }
                Some(Alarm::Warning) => self.note(format!("the kernel says: {text}")),
                None => {}
            },
            Event::Begun { .. } | Event::Data { .. } => {}
            Event::Exit { success, .. } => match (success, self.result) {
                (true, GuestResult::None) => self.result = GuestResult::Success,
                (true, _) => {}
                (false, _) => {
                    self.result = GuestResult::Failure;
                    self.give_up(None, "the guest ended with failure");
                }
            },
            Event::Timeout => {
                self.result = GuestResult::Timeout;
                self.violate(Check::Unbounded, None, "the guest did not end in time".to_owned());
                return Then::Stop;
            }
        }
        let new = &self.violations[before..];
        let endless = new.iter().any(|violation| violation.check == Check::Unbounded);
        if endless && self.result == GuestResult::Success {
            // A vCPU that ended well does not speak for one that had to be stopped.
            self.result = GuestResult::None;
        }
        if endless || (self.rules.stop && !new.is_empty()) { Then::Stop } else { Then::GoOn }
    }

    fn call(&mut self, call: &Call) {
        self.last_call = call.call;
        self.exercised |= call.special;
        // An R11 at the start hides what progress there was: to the guest it is none.
        let at_start = self.at_start.entry(call.vcpu).or_default();
        let again = call.status == status::RETRY && call.r11 == call.raw_gpa;
        *at_start = if again { *at_start + 1 } else { 0 };
        self.class = self.class.max(match call.truth {
            Truth::True if call.no_progress.max(*at_start) >= 3 => Class::Stalling,
            Truth::True => Class::Legal,
            Truth::Refusal => Class::Refusing,
            Truth::Undetectable(_) | Truth::Detectable => Class::Hostile,
        });
        if let Some(malformed) = call.malformed {
            let what = match malformed {
                Malformed::Empty => "of size 0",
                Malformed::Wraps => "that wraps at 2^64",
                Malformed::IllegalGpa => "with address bits above the guest's GPAW",
                Malformed::MixedSharedBit => "that begins in one alias and ends in the other",
                Malformed::Unaligned => "that is not 4 KiB aligned",
            };
            let detail = format!("a request {what}: R12 {:#x}, R13 {:#x}", call.raw_gpa, call.size);
            self.violate(Check::Protocol, Some(call.raw_gpa), detail);
        }
        match call.stray {
            Some(Stray::Outside) => {
                let detail = format!("a request of {:#x} bytes outside the range", call.size);
                self.violate(Check::WildRequest, Some(call.raw_gpa), detail);
            }
            Some(Stray::Flipped) => {
                let detail = "a request in the opposite direction".to_owned();
                self.violate(Check::WildRequest, Some(call.raw_gpa), detail);
            }
            Some(Stray::Skipped(pages)) => {
                let detail = format!("{} pages before the retry are not converted", pages.count);
                self.violate(Check::Skipped, Some(pages.gpa()), detail);
            }
            None => {}
        }
        let most = self.rules.max_calls.saturating_add(call.pages.saturating_mul(4));
        if call.standing > self.rules.max_no_progress {
            let detail = format!("{} replies in a row without progress", call.standing);
            self.violate(Check::Unbounded, Some(call.raw_gpa), detail);
        } else if call.requests > most {
            let detail =
                format!("{} calls in a conversation of {} pages", call.requests, call.pages);
            self.violate(Check::Unbounded, Some(call.raw_gpa), detail);
        }
        if let Truth::Undetectable(pages) = call.truth {
            let said = if call.status == status::SUCCESS { "SUCCESS" } else { "an R11 in range" };
            self.note(format!(
                "the host said {said} though {} pages from {:#x} on are not converted: no guest can \
                 detect that",
                pages.count,
                pages.gpa()
            ));
        }
    }

    fn accept(&mut self, accept: &Accept) {
        self.exercised |= accept.special;
        self.busy(accept);
        if accept.answer.is_none() {
            let gpa = accept.pages.gpa();
            if accept.shared && !accept.lied {
                let detail = "an accept of a page that is shared: the TD does not come back";
                self.violate(Check::WrongAlias, Some(gpa), detail.to_owned());
            } else {
                self.class = Class::Hostile;
                let why = if accept.shared { "the host lied about it" } else { "the policy" };
                self.note(format!(
                    "the accept at {gpa:#x} found no page ({why}): the TD exits and does not come back"
                ));
            }
        } else if accept.special && accept.answer.is_some_and(mapgpa_kit::calls::already_accepted) {
            // The host kept a page that it said it had converted.
            self.class = Class::Hostile;
        }
    }

    /// As with MapGPA: two in a row are legal, and the guest has to set a bound.
    fn busy(&mut self, accept: &Accept) {
        let answer = accept.answer.map(|rax| rax & module::STATUS_MASK);
        if answer != Some(module::OPERAND_BUSY) {
            self.busy.remove(&accept.vcpu);
            return;
        }
        let busy = self.busy.entry(accept.vcpu).or_default();
        *busy += 1;
        let busy = *busy;
        if busy >= 3 {
            self.class = self.class.max(Class::Stalling);
        }
        if busy > self.rules.max_no_progress {
            let detail = format!("{busy} accepts in a row of a page that is busy");
            self.violate(Check::Unbounded, Some(accept.pages.gpa()), detail);
        }
    }

    fn end_well(
        &mut self,
        to: Direction,
        marked: bool,
        missing: Option<Pages>,
        lied: bool,
        pending: Option<Pages>,
    ) {
        if let Some(missing) = missing {
            let detail = format!("{} pages are not converted", missing.count);
            if lied {
                self.note(format!("{detail}, and the guest could not know"));
            } else {
                self.violate(Check::FalseSuccess, Some(missing.gpa()), detail);
            }
        }
        // Without marks the accepts come after the last reply, which is where it was closed.
        if let (Direction::ToPrivate, true, Some(pending)) = (to, marked, pending) {
            let detail = format!("{} pages are still pending acceptance", pending.count);
            self.violate(Check::AcceptMissing, Some(pending.gpa()), detail);
        }
    }

    fn give_up(&mut self, gpa: Option<u64>, detail: &str) {
        let call = self.last_call;
        self.gave_up.get_or_insert_with(|| (call, gpa, detail.to_owned()));
    }

    fn violate(&mut self, check: Check, gpa: Option<u64>, detail: String) {
        let kept = self.violations.iter().filter(|violation| violation.check == check).count();
        if kept < KEPT {
            let (call, phase) = (self.last_call, self.phase);
            self.violations.push(Violation { check, call, gpa, detail, phase });
        } else {
            self.dropped += 1;
        }
    }

    fn note(&mut self, note: String) {
        if self.notes.len() < KEPT {
            self.notes.push(note);
        } else {
            self.dropped_notes += 1;
        }
    }

    /// Ends the run.
    #[must_use]
    pub fn finish(mut self) -> Judgement {
        if let Some((call, gpa, detail)) = self.gave_up.take_if(|_| self.class == Class::Legal) {
            let check = Check::GaveUp;
            self.violations.push(Violation { check, call, gpa, detail, phase: None });
        }
        for (dropped, what) in [(self.dropped, "violations"), (self.dropped_notes, "notes")] {
            if dropped > 0 {
                self.notes.push(format!("{dropped} more {what} are not listed"));
            }
        }
        Judgement {
            class: self.class,
            result: self.result,
            exercised: self.exercised,
            violations: self.violations,
            notes: self.notes,
        }
    }
}

const fn name(alias: Alias) -> &'static str {
    match alias {
        Alias::Private => "private",
        Alias::Shared => "shared",
    }
}
