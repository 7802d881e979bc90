//! A VMM on KVM: the policy is asked for chunks, as KVM hands them on, and the guest gets KVM's reply.
//!
//! KVM cuts a request into chunks of 2 MiB ([`mapgpa_kvm_model`]) and does not say where a request
//! begins or ends. What user space can know is kept in [`super::user_space`]: a chunk that follows a whole
//! one, answered with success, without another exit of that vCPU between them, belongs to the same
//! request. With `--front-end kvm-*` the engine plays KVM too; backend `tdx` has the real one, and
//! the engine works out what the guest was told ([`Observed`]).
//!
//! How long a request is that was answered with RETRY in its first chunk, only the player of KVM knows.
//! So the two may count `stall` differently for a guest that goes on neither at R11 nor from the start,
//! and does not mark its conversations.

use std::time::Instant;

use mapgpa_abi::tdcall::{status, sub};
use mapgpa_abi::{Direction, PAGE_SIZE};
use mapgpa_kvm_model::{ADDRESS_BITS, CHUNK, EAGAIN, EINVAL, Exit, Kernel, MapGpa, Step, Td};

use super::event::{Call, EventSink, Malformed};
use super::reply::truth;
use super::user_space::{Current, Observed};
use super::{Engine, Flow, Reply, nanos, request};
use crate::memory::{Memory, MemoryError};
use crate::pagemap::{PageState, Pages};
use crate::policy::{Amount, Context, Request, Say};

/// What stands between the guest and the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum FrontEnd {
    /// Nothing: the policy decides requests, and chooses R10 and R11.
    #[default]
    Direct,
    /// A KVM: the policy decides chunks, and chooses `hypercall.ret`.
    Kvm(Kernel),
}

impl FrontEnd {
    /// Its name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Kvm(kernel) => kernel.name(),
        }
    }
}

/// What user space says of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// `hypercall.ret`.
    pub ret: u64,
    /// An event for this vCPU is to be queued before KVM_RUN.
    pub event: bool,
}

/// Chunks of one call, 2 TiB, at which an event comes in between at the latest: all that a guest may ask
/// for would take minutes, and no guest has so much memory.
const CHUNKS_MAX: u64 = 1 << 20;

/// What became of a chunk.
struct Done {
    answer: Answer,
    converted: u64,
    special: bool,
    /// It is taken for the first of a request.
    first: bool,
}

impl<M: Memory, S: EventSink> Engine<M, S> {
    /// Answers a request as KVM `kernel` and a VMM with the policy would.
    pub(super) fn map_gpa_by_kvm(
        &mut self,
        kernel: Kernel,
        vcpu: u32,
        raw_gpa: u64,
        size: u64,
        begun: Option<Instant>,
    ) -> Result<Reply, MemoryError> {
        let td =
            Td { kernel, shared_bit: self.shared_bit, address_bits: ADDRESS_BITS, exits: true };
        let this = &self.vcpus[vcpu as usize];
        let checked = request::check(vcpu, this.calls, raw_gpa, size, self.settings.gpaw);
        let mut kvm = match MapGpa::begin(td, raw_gpa, size) {
            Ok(kvm) => kvm,
            Err(reply) => {
                let malformed = checked.err().unwrap_or(Malformed::IllegalGpa);
                let reply = (reply.status, reply.r11);
                return Ok(self.refuse(vcpu, raw_gpa, size, malformed, reply, begun));
            }
        };
        let stray = checked.ok().and_then(|request| self.enter(&request));
        let (mut converted, mut special) = (0, false);
        let mut chunks = 0;
        let reply = loop {
            let done = self.chunk(kernel, vcpu, kvm.exit())?;
            chunks += 1;
            converted += done.converted;
            special = if done.first { done.special } else { special | done.special };
            match kvm.complete(done.answer.ret, done.answer.event || chunks == CHUNKS_MAX) {
                Step::Exit(_) => {}
                Step::Reply(reply) => break reply,
                // Not with the answers that a chunk gets here.
                Step::RunFails => {
                    break mapgpa_kvm_model::Reply {
                        status: status::INVALID_OPERAND,
                        r11: raw_gpa,
                    };
                }
            }
        };
        // In a TD the guest test says so (`request_told`), lest the next request seem to be this one's.
        self.vcpus[vcpu as usize].user.complete();
        let request = match checked {
            Ok(request) => request,
            // Legal to KVM, but not an address of this guest: user space has refused it.
            Err(malformed) => {
                let reply = (reply.status, reply.r11);
                return Ok(self.refuse(vcpu, raw_gpa, size, malformed, reply, begun));
            }
        };
        let (mut call, next) = self.call_by_kvm(&request, reply, stray, converted, special);
        Ok(self.finish(&mut call, next, begun))
    }

    /// Answers a chunk that a real KVM hands on. What the guest is told is known at the vCPU's next
    /// exit at the latest: then it is an event.
    ///
    /// # Errors
    /// The memory could not be converted.
    pub fn kvm_chunk(
        &mut self,
        kernel: Kernel,
        vcpu: u32,
        exit: Exit,
    ) -> Result<(Answer, Flow), MemoryError> {
        let begun = self.settings.timing.then(Instant::now);
        let to = direction(exit);
        let goes_on = self.goes_on(vcpu, exit);
        let mut flow = if goes_on { Flow::Continue } else { self.request_over(vcpu) };
        if self.vcpus[vcpu as usize].user.observed.is_none() {
            self.vcpus[vcpu as usize].calls += 1;
            let request = self.request_of(vcpu, exit, self.vcpus[vcpu as usize].calls);
            let stray = self.enter(&request);
            let (converted, special) = (0, false);
            let (took_ns, beyond) = (0, None);
            let observed = Observed { request, stray, converted, special, begun, took_ns, beyond };
            self.vcpus[vcpu as usize].user.observed = Some(observed);
        }
        let done = self.chunk(kernel, vcpu, exit)?;
        let this = &mut self.vcpus[vcpu as usize];
        let Some(observed) = &mut this.user.observed else { return Ok((done.answer, flow)) };
        if goes_on {
            observed.request.size += exit.pages * PAGE_SIZE;
            if let Some(open) = this.open.as_mut().filter(|open| !open.marked) {
                let pages = &mut open.conversation.pages;
                let end = pages.end().max(observed.request.pages().end());
                pages.count = end - pages.first;
            }
        }
        observed.converted += done.converted;
        observed.special |= done.special;
        observed.took_ns += begun.map_or(0, |begun| nanos(begun.elapsed()));
        let raw = exit.gpa | (observed.request.raw_gpa ^ observed.request.gpa);
        let whole = exit.pages * PAGE_SIZE == CHUNK;
        let reply = match done.answer.ret {
            0 if !whole => Some((status::SUCCESS, sub::MAP_GPA)),
            // Had it been the last chunk, KVM would have said SUCCESS: the next exit may tell.
            0 => {
                let beyond = done.answer.event.then(|| self.beyond(vcpu, exit, to));
                if let Some(observed) = &mut self.vcpus[vcpu as usize].user.observed {
                    observed.beyond = beyond;
                }
                None
            }
            EAGAIN if kernel == Kernel::V7_2 => Some((status::RETRY, raw)),
            _ => Some((status::INVALID_OPERAND, raw)),
        };
        if let Some((status, r11)) = reply {
            self.vcpus[vcpu as usize].user.unsure = goes_on && done.answer.ret == EAGAIN;
            flow = later(flow, self.observed_reply(vcpu, mapgpa_kvm_model::Reply { status, r11 }));
        }
        Ok((done.answer, flow))
    }

    /// `vcpu` has exited for something other than a chunk: a request whose last chunk was whole and
    /// answered with success was complete, unless an event was queued and it had to go on.
    pub fn request_over(&mut self, vcpu: u32) -> Flow {
        let beyond = self.vcpus[vcpu as usize].user.observed.and_then(|seen| seen.beyond);
        self.whole_chunk_over(vcpu, beyond.filter(|more| *more > 0))
    }

    /// `vcpu` says what the guest was told by its last request ([`mapgpa_abi::channel::tag::REPLY`]).
    pub(super) fn request_told(&mut self, vcpu: u32, told: u32) -> Flow {
        let Some(seen) = self.vcpus[vcpu as usize].user.observed else {
            return self.request_over(vcpu);
        };
        let more = match u64::from(told) {
            // KVM may have had an event of its own.
            status::RETRY => Some(seen.beyond.filter(|more| *more > 0).unwrap_or(PAGE_SIZE)),
            status::SUCCESS => None,
            _ => return self.request_over(vcpu),
        };
        self.whole_chunk_over(vcpu, more)
    }

    /// The request of `vcpu` whose last chunk was whole, if there is one, was answered: with RETRY if
    /// it went on for `more` bytes.
    fn whole_chunk_over(&mut self, vcpu: u32, more: Option<u64>) -> Flow {
        let user = &mut self.vcpus[vcpu as usize].user;
        user.complete();
        let Some(seen) = &mut user.observed else { return Flow::Continue };
        let reply = match more {
            None => mapgpa_kvm_model::Reply { status: status::SUCCESS, r11: sub::MAP_GPA },
            Some(more) => {
                let r11 = seen.request.raw_gpa + seen.request.size;
                seen.request.size += more;
                mapgpa_kvm_model::Reply { status: status::RETRY, r11 }
            }
        };
        self.observed_reply(vcpu, reply)
    }

    /// Emits the observed request with its reply.
    fn observed_reply(&mut self, vcpu: u32, reply: mapgpa_kvm_model::Reply) -> Flow {
        let Some(seen) = self.vcpus[vcpu as usize].user.observed.take() else {
            return Flow::Continue;
        };
        let (mut call, next) =
            self.call_by_kvm(&seen.request, reply, seen.stray, seen.converted, seen.special);
        call.took_ns = seen.took_ns;
        self.finish(&mut call, next, seen.begun).flow
    }

    /// How many bytes the request goes on after `exit`: as far as the conversation that the guest
    /// marked. Without a mark nothing is known, and a page is assumed.
    fn beyond(&self, vcpu: u32, exit: Exit, to: Direction) -> u64 {
        let end = exit.gpa + exit.pages * PAGE_SIZE;
        let open = self.vcpus[vcpu as usize].open.filter(|open| open.marked);
        open.map(|open| open.conversation)
            .filter(|conversation| conversation.to == to)
            .map_or(PAGE_SIZE, |marked| (marked.pages.end() * PAGE_SIZE).saturating_sub(end))
    }

    /// The request that begins with `exit`, as far as user space can tell.
    fn request_of(&self, vcpu: u32, exit: Exit, call: u64) -> Request {
        let bit = if exit.private { 0 } else { self.shared_bit };
        Request {
            vcpu,
            call,
            raw_gpa: exit.gpa | bit,
            gpa: exit.gpa,
            size: exit.pages * PAGE_SIZE,
            to: direction(exit),
            shared_bit: self.shared_bit,
        }
    }

    /// Whether `exit` is taken for the next chunk of the request before it.
    fn goes_on(&self, vcpu: u32, exit: Exit) -> bool {
        let current = self.vcpus[vcpu as usize].user.current;
        current.is_some_and(|now| now.next == exit.gpa && now.to == direction(exit))
    }

    /// Converts what the policy allows of a chunk, and says what user space says of it.
    fn chunk(&mut self, kernel: Kernel, vcpu: u32, exit: Exit) -> Result<Done, MemoryError> {
        let first = !self.goes_on(vcpu, exit);
        if first {
            self.vcpus[vcpu as usize].user.complete();
            self.vcpus[vcpu as usize].user.requests += 1;
        }
        if exit.gpa & !(self.shared_bit - 1) != 0 {
            let user = &mut self.vcpus[vcpu as usize].user;
            user.replied(false);
            let answer = Answer { ret: EINVAL, event: false };
            return Ok(Done { answer, converted: 0, special: false, first });
        }
        let pages = Pages::of_bytes(exit.gpa, exit.pages * PAGE_SIZE);
        let to = direction(exit);
        let user = &self.vcpus[vcpu as usize].user;
        let mut now = match user.current.filter(|_| !first) {
            Some(current) => current,
            None => {
                let request = self.request_of(vcpu, exit, user.requests);
                let context = Context {
                    seed: self.settings.seed,
                    replies: user.replies,
                    no_progress: user.no_progress,
                    overlap: self.overlaps(&request),
                };
                let decision = self.settings.policy.decide(&request, &context);
                let left = allowed(decision.convert);
                Current { next: exit.gpa, to, decision, left, converted: 0 }
            }
        };
        let is_missing = |state| (state == PageState::Shared) != (to == Direction::ToShared);
        let missing = self.map.find(pages, is_missing).map_or(0, |missing| missing.count);
        let whole = exit.pages * PAGE_SIZE == CHUNK;
        let (ret, budget) = match now.decision.say {
            Say::Success => (0, now.left),
            Say::Status(_) => (EINVAL, 0),
            // An older kernel has no "later"; an event after the chunk before was all there is.
            _ if missing <= now.left || kernel == Kernel::V6_16 => (0, missing),
            _ => (EAGAIN, 0),
        };
        let converted = self.convert(pages, to, budget, now.decision.keep)?.0;
        now.left = now.left.saturating_sub(converted);
        now.converted += converted;
        now.next += CHUNK;
        let stops = now.left < CHUNK / PAGE_SIZE && now.decision.say != Say::Success;
        let event = kernel == Kernel::V6_16 && ret == 0 && whole && stops;
        let user = &mut self.vcpus[vcpu as usize].user;
        if ret == 0 && whole && !event {
            user.current = Some(now);
        } else {
            user.replied(now.converted > 0 || ret == 0);
        }
        if ret == 0 && now.decision.say == Say::Success && converted < missing {
            self.lie(pages, is_missing);
        }
        let special = now.decision.special;
        Ok(Done { answer: Answer { ret, event }, converted, special, first })
    }

    /// Books the pages of `range` that are missing: the guest is told that they are converted.
    fn lie(&mut self, range: Pages, is_missing: impl Fn(PageState) -> bool) {
        let lied = &mut self.lied;
        self.map.scan(range, |piece, state| {
            if is_missing(state) {
                lied.insert(piece.first..piece.end());
            }
            true
        });
    }

    /// The call that `request` was, and the first page of it that is not converted.
    fn call_by_kvm(
        &mut self,
        request: &Request,
        reply: mapgpa_kvm_model::Reply,
        stray: Option<super::Stray>,
        converted: u64,
        special: bool,
    ) -> (Call, u64) {
        let pages = request.pages();
        let shared = request.to == Direction::ToShared;
        let missing = self.map.find(pages, |state| (state == PageState::Shared) != shared);
        let next = missing.map_or(pages.end(), |missing| missing.first);
        if !self.lied.is_empty() && next > pages.first {
            self.lied.remove(pages.first..next);
        }
        let mapgpa_kvm_model::Reply { status, r11 } = reply;
        let truth = truth(request, status, r11, next);
        let special = special && !(status == status::SUCCESS && next == pages.end());
        let call = Call { converted, status, r11, truth, stray, special, ..Call::of(request) };
        (call, next)
    }
}

const fn direction(exit: Exit) -> Direction {
    if exit.private { Direction::ToPrivate } else { Direction::ToShared }
}

/// The later of two wishes of the events' consumer.
fn later(first: Flow, second: Flow) -> Flow {
    if first == Flow::Stop { first } else { second }
}

/// Pages that a request may convert. A budget of measured time is no policy for a KVM
/// ([`crate::express`]).
fn allowed(amount: Amount) -> u64 {
    match amount {
        Amount::All | Amount::Budget { cost_ns: None, .. } => u64::MAX,
        Amount::Pages(pages) => pages,
        Amount::Budget { budget_ns, cost_ns: Some(cost) } => (budget_ns / cost.max(1)).max(1),
    }
}
