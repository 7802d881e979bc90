//! The engine: a request in, pages converted as the policy decides, a reply out, and the facts of it
//! as events.
//!
//! It knows no KVM: a backend calls it from its vCPU loop, or a guest in the same process does. What
//! the guest sees of the pages is [`Memory`]'s; what is true of them is the [`PageMap`]'s.

mod access;
mod chunks;
mod conversation;
mod event;
mod guest_channel;
mod phase;
mod reply;
mod request;
mod user_space;

use std::time::Instant;

use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Direction, PAGE_SIZE, shared_bit};
use rangemap::RangeSet;

use crate::memory::{Memory, MemoryError};
use crate::pagemap::{Change, PageMap, PageState, Pages};
use crate::policy::{Amount, Context, Policy, Request};
pub use chunks::{Answer, FrontEnd};
use conversation::Open;
pub use event::{
    Accept, Alarm, Call, Conversation, Ending, Event, EventSink, Malformed, Phase, Stray, Then,
    Truth,
};
use guest_channel::Channel;
use reply::reply;
use user_space::UserSpace;

/// What a vCPU does after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Runs on.
    Continue,
    /// Waits until all vCPUs that have not ended wait.
    Barrier,
    /// Has nothing to do for a moment (HLT).
    Idle,
    /// Has ended; the others run on.
    Exit,
    /// The run is over, for all vCPUs.
    Stop,
}

impl From<Then> for Flow {
    fn from(then: Then) -> Self {
        match then {
            Then::GoOn => Self::Continue,
            Then::Stop => Self::Stop,
        }
    }
}

/// R10 and R11 of a reply, and what the vCPU does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// R10.
    pub status: u64,
    /// R11.
    pub r11: u64,
    /// What the vCPU does next.
    pub flow: Flow,
}

/// What an engine is made with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The policy.
    pub policy: Policy,
    /// The seed of its draws.
    pub seed: u64,
    /// Guest-physical address width in bits.
    pub gpaw: u32,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Take times.
    pub timing: bool,
    /// What stands between the guest and the policy.
    pub front_end: FrontEnd,
}

/// What the engine knows of a vCPU.
#[derive(Debug, Default)]
struct Vcpu {
    calls: u64,
    accepts: u64,
    open: Option<Open>,
    channel: Channel,
    user: UserSpace,
    ended: bool,
}

/// The state of a run.
#[derive(Debug)]
pub struct Engine<M, S> {
    settings: Settings,
    shared_bit: u64,
    keeps_private: bool,
    /// Accepts are not seen here: what a guest reports of them is taken for true.
    accepts_unseen: bool,
    started: Instant,
    map: PageMap,
    memory: M,
    sink: S,
    vcpus: Vec<Vcpu>,
    /// Pages that the guest was told are converted, and cannot know are not.
    lied: RangeSet<u64>,
    /// Pages to private that the host never removed.
    kept: RangeSet<u64>,
    /// Pages that were converted to private in unmarked conversations, and are to be accepted.
    returned: RangeSet<u64>,
    /// How far a firmware has come.
    phase: Option<Phase>,
    /// Scratch for runs of pages, kept so that a call does not allocate.
    runs: Vec<Pages>,
}

/// Pages converted between two looks at the clock, where a budget is in measured time.
const BUDGET_STEP: u64 = 64;

impl<M: Memory, S: EventSink> Engine<M, S> {
    /// An engine over `memory`, all of it private and accepted.
    pub fn new(settings: Settings, memory: M, sink: S) -> Self {
        Self {
            shared_bit: shared_bit(settings.gpaw),
            keeps_private: settings.policy.keeps_private(),
            accepts_unseen: false,
            started: Instant::now(),
            map: PageMap::default(),
            memory,
            sink,
            vcpus: (0..settings.vcpus).map(|_| Vcpu::default()).collect(),
            lied: RangeSet::new(),
            kept: RangeSet::new(),
            returned: RangeSet::new(),
            phase: None,
            runs: Vec::new(),
            settings,
        }
    }

    /// From now on what a guest reports of accepts is taken for true: they are not seen here.
    pub const fn accepts_are_unseen(&mut self) {
        self.accepts_unseen = true;
    }

    /// The settings.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The memory.
    pub const fn memory(&mut self) -> &mut M {
        &mut self.memory
    }

    /// The page map.
    pub const fn map(&self) -> &PageMap {
        &self.map
    }

    /// Puts `pages` into the state shared before the run begins, unseen by the policy.
    ///
    /// # Errors
    /// The memory cannot be set up.
    pub fn preset_shared(&mut self, pages: Pages) -> Result<(), MemoryError> {
        self.convert(pages, Direction::ToShared, u64::MAX, false).map(|_| ())
    }

    /// Puts `pages` into the state pending before the run begins: the guest has to accept them.
    ///
    /// # Errors
    /// The memory cannot be set up.
    pub fn preset_pending(&mut self, pages: Pages) -> Result<(), MemoryError> {
        self.preset_shared(pages)?;
        self.convert(pages, Direction::ToPrivate, u64::MAX, false).map(|_| ())
    }

    /// Answers MapGPA with R12 `raw_gpa` and R13 `size` on `vcpu`.
    ///
    /// # Errors
    /// The memory could not be converted.
    pub fn map_gpa(&mut self, vcpu: u32, raw_gpa: u64, size: u64) -> Result<Reply, MemoryError> {
        let begun = self.settings.timing.then(Instant::now);
        let this = &mut self.vcpus[vcpu as usize];
        this.calls += 1;
        if let FrontEnd::Kvm(kernel) = self.settings.front_end {
            return self.map_gpa_by_kvm(kernel, vcpu, raw_gpa, size, begun);
        }
        let request = match request::check(vcpu, this.calls, raw_gpa, size, self.settings.gpaw) {
            Ok(request) => request,
            Err(malformed) => {
                let status = match malformed {
                    Malformed::Unaligned => status::ALIGN_ERROR,
                    _ => status::INVALID_OPERAND,
                };
                return Ok(self.refuse(vcpu, raw_gpa, size, malformed, (status, raw_gpa), begun));
            }
        };
        let stray = self.enter(&request);
        let open = self.vcpus[vcpu as usize].open.get_or_insert_with(|| Open::of(&request));
        let context = Context {
            seed: self.settings.seed,
            replies: open.conversation.requests,
            no_progress: open.no_progress,
            overlap: self.overlaps(&request),
        };
        let decision = self.settings.policy.decide(&request, &context);
        let (converted, next) = self.perform(&request, decision.convert, decision.keep)?;
        let (code, r11, truth, special) = reply(&request, &decision, next);
        // What is converted is no lie any more, whichever way it was one.
        if !self.lied.is_empty() && next > request.pages().first {
            self.lied.remove(request.pages().first..next);
        }
        if let Truth::Undetectable(pages) = truth {
            self.lied.insert(pages.first..pages.end());
        }
        let (status, call) = (code, Call::of(&request));
        let mut call = Call { converted, status, r11, truth, stray, special, ..call };
        Ok(self.finish(&mut call, next, begun))
    }

    /// Puts a request into its vCPU's conversation; returns what is odd about it there.
    fn enter(&mut self, request: &Request) -> Option<Stray> {
        let vcpu = request.vcpu;
        if self.vcpus[vcpu as usize].open.is_none_or(|open| !open.takes(request)) {
            self.close(vcpu, None);
            let this = &mut self.vcpus[vcpu as usize];
            this.open = Some(Open::of(request));
            this.user.begin();
        }
        self.vcpus[vcpu as usize].open.and_then(|open| open.stray(request, &self.map))
    }

    /// Answers a malformed request with `reply`, R10 and R11.
    fn refuse(
        &mut self,
        vcpu: u32,
        raw_gpa: u64,
        size: u64,
        malformed: Malformed,
        (status, r11): (u64, u64),
        begun: Option<Instant>,
    ) -> Reply {
        let shared = raw_gpa & self.shared_bit != 0;
        let to = if shared { Direction::ToShared } else { Direction::ToPrivate };
        let page = (raw_gpa & !self.shared_bit) / PAGE_SIZE;
        let this = &self.vcpus[vcpu as usize];
        let malformed = Some(malformed);
        let stray = this.open.and_then(|open| open.stray_malformed(page, to));
        let call = Call::new(vcpu, this.calls, raw_gpa, size, to);
        let mut call = Call { status, r11, malformed, stray, ..call };
        self.finish(&mut call, 0, begun)
    }

    /// Books a reply in its conversation and emits it.
    fn finish(&mut self, call: &mut Call, next: u64, begun: Option<Instant>) -> Reply {
        let mut done = false;
        let Vcpu { open, user: UserSpace { unsure, .. }, .. } = &mut self.vcpus[call.vcpu as usize];
        let unsure = std::mem::take(unsure);
        if let Some(open) = open {
            open.replied(call, next, self.shared_bit);
            if unsure {
                open.no_progress = open.no_progress.max(1);
            }
            open.timed(begun);
            call.no_progress = open.no_progress;
            call.standing = open.standing;
            call.requests = open.conversation.requests;
            call.pages = open.conversation.pages.count;
            done = !open.marked && call.status != status::RETRY;
        }
        if let Some(begun) = begun {
            let now = Instant::now();
            // Of an observed request the time with the guest has been left out already.
            if call.took_ns == 0 {
                call.took_ns = nanos(now - begun);
            }
            call.at_ns = nanos(now - self.started);
        }
        let mut flow = self.emit(&Event::Call(*call));
        if done && self.close(call.vcpu, None) == Flow::Stop {
            flow = Flow::Stop;
        }
        Reply { status: call.status, r11: call.r11, flow }
    }

    /// Converts what `amount` allows of a request; returns pages converted, and the first page that
    /// is not.
    fn perform(
        &mut self,
        request: &Request,
        amount: Amount,
        keep: bool,
    ) -> Result<(u64, u64), MemoryError> {
        let pages = request.pages();
        let budget = match amount {
            Amount::All => u64::MAX,
            Amount::Pages(pages) => pages,
            Amount::Budget { budget_ns, cost_ns: Some(cost) } => (budget_ns / cost.max(1)).max(1),
            Amount::Budget { budget_ns, cost_ns: None } => {
                let begun = Instant::now();
                let mut converted = 0;
                loop {
                    let (more, next) = self.convert(pages, request.to, BUDGET_STEP, keep)?;
                    converted += more;
                    if next == pages.end() || nanos(begun.elapsed()) >= budget_ns {
                        return Ok((converted, next));
                    }
                }
            }
        };
        self.convert(pages, request.to, budget, keep)
    }

    fn convert(
        &mut self,
        pages: Pages,
        to: Direction,
        budget: u64,
        restore: bool,
    ) -> Result<(u64, u64), MemoryError> {
        let change = match to {
            Direction::ToPrivate if restore => Change::Restore,
            _ => Change::of(to),
        };
        let keep = match to {
            Direction::ToShared => self.keeps_private,
            Direction::ToPrivate => restore,
        };
        self.runs.clear();
        let changed = self.map.apply(pages, change, budget, &mut self.runs);
        for run in &self.runs {
            self.memory.convert(*run, to, keep, &self.map)?;
            if change == Change::Restore {
                self.kept.insert(run.first..run.end());
            } else if !self.kept.is_empty() {
                self.kept.remove(run.first..run.end());
            }
        }
        Ok((changed.pages, changed.next))
    }

    /// Whether lies that the guest could not detect cover all of `pages`.
    fn is_lied(&self, pages: Pages) -> bool {
        self.lied.gaps(&(pages.first..pages.end())).next().is_none()
    }

    /// Whether such lies cover all pages of `range` in a state that is `wanted`.
    fn are_lied(&self, range: Pages, wanted: impl Fn(PageState) -> bool) -> bool {
        let mut all = true;
        self.map.scan(range, |piece, state| {
            all = !wanted(state) || self.is_lied(piece);
            all
        });
        all
    }

    /// Tells the consumer that time passes.
    pub fn tick(&mut self) {
        self.sink.tick();
    }

    /// Hands an event to the consumer.
    pub fn emit(&mut self, event: &Event<'_>) -> Flow {
        self.sink.on(event).into()
    }
}

fn nanos(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
