//! What happened in a run, as facts: the engine emits them, the judge and the reports consume them.

use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Alias, Direction};

use crate::pagemap::{PageState, Pages};
use crate::policy::Request;

/// What is wrong with the form of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Size 0.
    Empty,
    /// Start plus size wraps at 2^64.
    Wraps,
    /// Bits set above the guest's GPAW.
    IllegalGpa,
    /// The range crosses from one alias into the other.
    MixedSharedBit,
    /// Start or size is not a multiple of 4 KiB.
    Unaligned,
}

/// How a reply relates to the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// It is true, or an error that the request itself deserved.
    True,
    /// A true refusal: an error status that GHCI defines.
    Refusal,
    /// A lie that no guest can detect, about these pages: they are not converted.
    Undetectable(Pages),
    /// A lie, or outside the protocol, so that a careful guest can tell.
    Detectable,
}

/// How a request relates to the conversation it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stray {
    /// It reaches outside the conversation's range.
    Outside,
    /// It asks for the opposite direction.
    Flipped,
    /// It starts past pages that are not converted, though R11 did not say so.
    Skipped(Pages),
}

/// One MapGPA call and its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Which MapGPA call of this vCPU, from 1.
    pub call: u64,
    /// R12.
    pub raw_gpa: u64,
    /// R13, in bytes.
    pub size: u64,
    /// Direction, from the shared bit in R12.
    pub to: Direction,
    /// Pages that changed state.
    pub converted: u64,
    /// R10 of the reply.
    pub status: u64,
    /// R11 of the reply.
    pub r11: u64,
    /// Reply and pages.
    pub truth: Truth,
    /// What is wrong with the request, if anything.
    pub malformed: Option<Malformed>,
    /// The request's relation to its conversation, if odd.
    pub stray: Option<Stray>,
    /// Replies in a row without progress in this conversation, this one included.
    pub no_progress: u64,
    /// Of those, the last in a row in which R11 was no further on than before either: what a guest can
    /// see.
    pub standing: u64,
    /// Requests in this conversation, this one included.
    pub requests: u64,
    /// Pages of the conversation.
    pub pages: u64,
    /// The reply shows what the policy is about.
    pub special: bool,
    /// When it was answered: nanoseconds since the run began; 0 without timing.
    pub at_ns: u64,
    /// Nanoseconds it took; 0 without timing.
    pub took_ns: u64,
}

impl Call {
    /// The request, answered with SUCCESS and nothing done, which is the caller's to fill in; its place
    /// in its conversation and its times are booked by [`super::Engine`] when it ends.
    pub(super) const fn new(vcpu: u32, call: u64, raw_gpa: u64, size: u64, to: Direction) -> Self {
        Self {
            vcpu,
            call,
            raw_gpa,
            size,
            to,
            converted: 0,
            status: status::SUCCESS,
            r11: 0,
            truth: Truth::True,
            malformed: None,
            stray: None,
            no_progress: 0,
            standing: 0,
            requests: 0,
            pages: 0,
            special: false,
            at_ns: 0,
            took_ns: 0,
        }
    }

    /// The same for a request that is well formed.
    pub(super) const fn of(request: &Request) -> Self {
        let Request { vcpu, call, raw_gpa, size, to, .. } = *request;
        Self::new(vcpu, call, raw_gpa, size, to)
    }

    /// Whether R11 means anything in this reply.
    #[must_use]
    pub const fn r11_defined(&self) -> bool {
        self.status != status::SUCCESS && self.status != status::SUBFUNC_UNSUPPORTED
    }
}

/// A TDG.MEM.PAGE.ACCEPT and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accept {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// The pages.
    pub pages: Pages,
    /// RAX, or nothing if the TD exited to the VMM for good.
    pub answer: Option<u64>,
    /// The TD exited because the page is shared, not because the policy wants it.
    pub shared: bool,
    /// Some of the pages are shared because of a lie that the guest could not detect.
    pub lied: bool,
    /// The answer shows what the policy is about.
    pub special: bool,
}

/// How a conversation went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversation {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Its range.
    pub pages: Pages,
    /// Direction.
    pub to: Direction,
    /// Requests.
    pub requests: u64,
    /// Replies RETRY.
    pub retries: u64,
    /// Replies without progress.
    pub no_progress: u64,
    /// Nanoseconds from its first request to the last reply; 0 without timing.
    pub ns: u64,
}

/// How a conversation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest took it for done.
    Completed,
    /// The guest gave up; the first page not converted then, if any.
    GaveUp(Option<u64>),
    /// The run ended first.
    NeverReturned,
}

/// What a line of a kernel's console tells the judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alarm {
    /// A conversion failed, as the kernel sees it.
    GaveUp,
    /// The kernel has an exception that it cannot handle.
    Oops,
    /// Something else that it warns of.
    Warning,
}

/// How far a guest that is booted by firmware has come.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// From the reset vector on.
    Sec,
    /// The driver execution environment: its core is about to start.
    Dxe,
    /// Boot device selection.
    Bds,
    /// ExitBootServices has returned: memory belongs to what was booted.
    BootServicesExited,
}

impl Phase {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sec => "SEC",
            Self::Dxe => "DXE",
            Self::Bds => "BDS",
            Self::BootServicesExited => "after ExitBootServices",
        }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A MapGPA call was answered.
    Call(Call),
    /// An accept was answered.
    Accept(Accept),
    /// A page was touched through an alias that its state forbids.
    Touch {
        /// GPA in bytes, with the shared bit of the alias used.
        raw_gpa: u64,
        /// The alias.
        alias: Alias,
        /// The page.
        page: u64,
        /// Its state.
        state: PageState,
        /// It is in that state because of a lie that the guest could not detect.
        lied: bool,
    },
    /// The guest marked the begin of a conversation on the channel.
    Begun {
        /// Index of the vCPU.
        vcpu: u32,
        /// The range.
        pages: Pages,
        /// Direction.
        to: Direction,
    },
    /// A conversation ended.
    Closed {
        /// Which, and how it went.
        conversation: Conversation,
        /// How it ended.
        ending: Ending,
        /// The guest marked it on the channel, rather than our heuristic.
        marked: bool,
        /// Pages that the guest says it accepted (marked conversations only).
        reported_accepted: u64,
        /// Pages of the range not in the target alias: the first, and how many.
        missing: Option<Pages>,
        /// Those are missing because of a lie that the guest could not detect.
        lied: bool,
        /// Pages of the range pending acceptance: the first, and how many.
        pending: Option<Pages>,
    },
    /// Pages are pending though the guest took their conversion for done and has gone on since
    /// (unmarked conversations only).
    Unaccepted {
        /// The conversions' range.
        range: Pages,
        /// The first pending page of it, and how many there are.
        pending: Pages,
    },
    /// A firmware has come to a phase.
    Phase {
        /// Which.
        phase: Phase,
        /// When: nanoseconds since the run began.
        at_ns: u64,
    },
    /// RAM that is not private and accepted when boot services have been exited.
    Left {
        /// The pages, all in one state.
        pages: Pages,
        /// Their state.
        state: PageState,
    },
    /// The guest goes on to use a range.
    Use {
        /// The range.
        pages: Pages,
        /// The alias.
        alias: Alias,
    },
    /// The guest panicked deliberately.
    Panic {
        /// What it said.
        text: &'a str,
    },
    /// The guest crashed: an unhandled exception, a triple fault, or an access to nowhere.
    Crash {
        /// What is known of it.
        detail: &'a str,
    },
    /// The guest said a line.
    Text {
        /// The line.
        text: &'a str,
    },
    /// A kernel's console has a line.
    Console {
        /// Index of the vCPU that ended it.
        vcpu: u32,
        /// The line.
        text: &'a str,
        /// What it tells the judge.
        alarm: Option<Alarm>,
    },
    /// The guest sent values.
    Data {
        /// The values.
        values: &'a [u64],
    },
    /// The guest did what is worth a note: an unknown leaf, sub-function or channel message.
    Odd {
        /// What it was.
        detail: &'a str,
    },
    /// A vCPU ended, with success or failure.
    Exit {
        /// Index of the vCPU.
        vcpu: u32,
        /// As the guest says.
        success: bool,
    },
    /// The time-out ended the run.
    Timeout,
}

/// What the consumer of an event wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The run goes on.
    GoOn,
    /// The run is to stop.
    Stop,
}

/// A consumer of events.
pub trait EventSink {
    /// Takes an event.
    fn on(&mut self, event: &Event<'_>) -> Then;

    /// Time passes, with or without events: what is held back may be due.
    fn tick(&mut self) {}
}
