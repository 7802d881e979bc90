//! Which requests belong together: the conversation that a vCPU is in.
//!
//! Guest tests mark begin and end on the channel. Without marks (kernels, firmware) a request
//! belongs to the open conversation if the last reply was RETRY and the request starts at the R11
//! of that reply, or lies in the conversation's range in the same direction and its vCPU has done
//! nothing else since; any other request opens a new one, and what was open has been given up.

use std::time::Instant;

use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Direction, PAGE_SIZE};

use super::event::{Call, Conversation, Ending, Event, EventSink, Stray, Truth};
use super::{Engine, Flow};
use crate::memory::Memory;
use crate::pagemap::{PageMap, PageState, Pages};
use crate::policy::Request;

/// The open conversation of a vCPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Open {
    pub(super) conversation: Conversation,
    /// The guest marked it.
    pub(super) marked: bool,
    /// Replies in a row without progress.
    pub(super) no_progress: u64,
    /// Of those, the last in a row that showed the guest none either.
    pub(super) standing: u64,
    /// The furthest page that a true RETRY has named; before the first, where the range begins.
    furthest: u64,
    /// The last reply, if it was RETRY.
    pub(super) retry: Option<Retry>,
    /// The last reply was SUCCESS.
    pub(super) succeeded: bool,
    /// Since the last reply its vCPU has done what a retry loop does not.
    pub(super) moved_on: bool,
    /// When its first request came.
    began: Option<Instant>,
}

/// A RETRY that was said.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retry {
    /// R11 as it was said.
    r11: u64,
    /// The first page that was not converted.
    next: u64,
}

impl Open {
    pub(super) const fn new(conversation: Conversation, marked: bool) -> Self {
        Self {
            conversation,
            marked,
            no_progress: 0,
            standing: 0,
            furthest: conversation.pages.first,
            retry: None,
            succeeded: false,
            moved_on: false,
            began: None,
        }
    }

    /// An unmarked conversation that `request` opens.
    pub(super) const fn of(request: &Request) -> Self {
        let conversation = Conversation {
            vcpu: request.vcpu,
            pages: request.pages(),
            to: request.to,
            requests: 0,
            retries: 0,
            no_progress: 0,
            ns: 0,
        };
        Self::new(conversation, false)
    }

    /// Whether `request` belongs to this conversation.
    pub(super) fn takes(&self, request: &Request) -> bool {
        self.marked
            || self.retry.is_some_and(|retry| {
                retry.r11 == request.raw_gpa
                    || (!self.moved_on
                        && request.to == self.conversation.to
                        && contains(self.conversation.pages, request.pages()))
            })
    }

    /// What is odd about `request`, given that it belongs here.
    pub(super) fn stray(&self, request: &Request, map: &PageMap) -> Option<Stray> {
        if request.to != self.conversation.to {
            return Some(Stray::Flipped);
        }
        if !contains(self.conversation.pages, request.pages()) {
            return Some(Stray::Outside);
        }
        let retry = self.retry?;
        let first = request.pages().first;
        if first <= retry.next || request.raw_gpa == retry.r11 {
            return None;
        }
        let over = Pages { first: retry.next, count: first - retry.next };
        map.find(over, |state| (state == PageState::Shared) != is_shared(request))
            .map(Stray::Skipped)
    }

    /// What is odd about a malformed request that starts at `page` in direction `to`.
    pub(super) fn stray_malformed(&self, page: u64, to: Direction) -> Option<Stray> {
        let pages = self.conversation.pages;
        if to != self.conversation.to {
            Some(Stray::Flipped)
        } else if !(pages.first..pages.end()).contains(&page) {
            Some(Stray::Outside)
        } else {
            None
        }
    }

    /// Takes note of the time that a request which came at `begun` has been answered.
    pub(super) fn timed(&mut self, begun: Option<Instant>) {
        if let Some(begun) = begun {
            let first = *self.began.get_or_insert(begun);
            self.conversation.ns = super::nanos(first.elapsed());
        }
    }

    /// Takes note of a reply that left `next` as the first page not converted. An R11 ahead of the
    /// truth is progress as far as any guest can see. So is one that is further on than any before,
    /// though its pages were converted earlier and R11 hid that.
    pub(super) fn replied(&mut self, call: &Call, next: u64, shared_bit: u64) {
        let retry = call.status == status::RETRY;
        self.moved_on = false;
        self.conversation.requests += 1;
        self.conversation.retries += u64::from(retry);
        self.succeeded = call.status == status::SUCCESS;
        self.retry = retry.then_some(Retry { r11: call.r11, next });
        self.conversation.no_progress += u64::from(retry && call.converted == 0);
        let skips = matches!(call.truth, Truth::Undetectable(_));
        let fruitless = retry && call.converted == 0 && !skips;
        self.no_progress = if fruitless { self.no_progress + 1 } else { 0 };
        let named = (call.r11 & !shared_bit) / PAGE_SIZE;
        let further = retry && call.truth == Truth::True && named > self.furthest;
        if further {
            self.furthest = named;
        }
        self.standing = if fruitless && !further { self.standing + 1 } else { 0 };
    }
}

fn is_shared(request: &Request) -> bool {
    request.raw_gpa != request.gpa
}

fn contains(outer: Pages, inner: Pages) -> bool {
    inner.first >= outer.first && inner.end() <= outer.end()
}

impl<M: Memory, S: EventSink> Engine<M, S> {
    /// Whether a conversation of another vCPU that is under way overlaps `request`.
    pub(super) fn overlaps(&self, request: &Request) -> bool {
        let pages = request.pages();
        self.vcpus.iter().zip(0..).any(|(vcpu, index)| {
            index != request.vcpu
                && vcpu.open.is_some_and(|open| {
                    let other = open.conversation.pages;
                    open.retry.is_some() && other.first < pages.end() && pages.first < other.end()
                })
        })
    }

    /// Closes the open conversation of `vcpu`, if there is one; `marked` is what the guest reports:
    /// success, and pages accepted.
    pub(super) fn close(&mut self, vcpu: u32, marked: Option<(bool, u64)>) -> Flow {
        let Some(open) = self.vcpus[vcpu as usize].open.take() else { return Flow::Continue };
        let conversation = open.conversation;
        let shared = conversation.to == Direction::ToShared;
        let success = marked.map_or(open.succeeded, |(success, _)| success);
        let pages = conversation.pages;
        let is_missing = |state| (state == PageState::Shared) != shared;
        let missing = self.map.find(pages, is_missing);
        let pending = self.map.find(pages, |state| state == PageState::PrivatePending);
        let lied = missing.is_some() && self.are_lied(pages, is_missing);
        if success && !shared && !open.marked {
            self.returned.insert(pages.first..pages.end());
        }
        let ending = if success {
            Ending::Completed
        } else {
            Ending::GaveUp(missing.map(|missing| missing.gpa()))
        };
        self.emit(&Event::Closed {
            conversation,
            ending,
            marked: open.marked,
            reported_accepted: marked.map_or(0, |(_, accepted)| accepted),
            missing,
            lied,
            pending,
        })
    }

    /// `vcpu` does what a retry loop does not: it waits, or writes to a device. Should it not come
    /// back to an unmarked conversation that was answered RETRY, it has given that up.
    pub fn moved_on(&mut self, vcpu: u32) {
        if let Some(open) = &mut self.vcpus[vcpu as usize].open {
            open.moved_on = true;
        }
    }

    /// `vcpu` says that a conversion failed: its unmarked conversation was given up.
    pub fn gave_up(&mut self, vcpu: u32) -> Flow {
        if self.vcpus[vcpu as usize].open.is_some_and(|open| !open.marked) {
            return self.close(vcpu, None);
        }
        Flow::Continue
    }

    /// Ends the run: conversations still open never returned, unless their vCPU moved on. Gives back
    /// memory and sink.
    pub fn end(mut self) -> (M, S) {
        for vcpu in 0..self.settings.vcpus {
            self.request_over(u32::try_from(vcpu).unwrap_or(u32::MAX));
            let open = self.vcpus[vcpu].open;
            if open.is_some_and(|open| !open.marked && open.moved_on) {
                self.close(u32::try_from(vcpu).unwrap_or(u32::MAX), None);
            }
            let Some(open) = self.vcpus[vcpu].open.take() else { continue };
            if !open.marked && open.retry.is_none() {
                continue;
            }
            self.emit(&Event::Closed {
                conversation: open.conversation,
                ending: Ending::NeverReturned,
                marked: open.marked,
                reported_accepted: 0,
                missing: None,
                lied: false,
                pending: None,
            });
        }
        (self.memory, self.sink)
    }
}
