//! What tests of the core share: an engine over made-up memory, its events, and cases on `hosted`.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

pub mod command;
pub mod stream;

use std::time::Duration;

use mapgpa::case::{Case, GuestSource};
use mapgpa::engine::{
    Accept, Call, Conversation, Ending, Engine, Event, EventSink, FrontEnd, Reply, Settings, Then,
};
use mapgpa::memory::{Memory, MemoryError};
use mapgpa::pagemap::{PageMap, PageState, Pages};
use mapgpa::policy::Policy;
use mapgpa_abi::tdcall::{Regs, leaf};
use mapgpa_abi::{Direction, shared_bit};
use mapgpa_guests::Guest;

pub const GPAW: u32 = 48;
pub const BIT: u64 = shared_bit(GPAW);
pub const GPA: u64 = 16 << 20;
pub const K4: u64 = 4096;
pub const M2: u64 = 2 << 20;

/// This many cases of a property; one that fails is printed, and no file is left behind.
pub fn cases(cases: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config { cases, failure_persistence: None, ..Default::default() }
}

/// What the engine asked of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Convert(Pages, Direction, bool),
    Accept(Pages),
}

/// Memory that only remembers what it was asked for; it can be made to fail.
#[derive(Debug, Default)]
pub struct MadeUpMemory {
    pub asked: Vec<Asked>,
    pub broken: bool,
}

impl MadeUpMemory {
    fn note(&mut self, asked: Asked, run: Pages) -> Result<(), MemoryError> {
        self.asked.push(asked);
        if !self.broken {
            return Ok(());
        }
        let source = std::io::ErrorKind::OutOfMemory.into();
        Err(MemoryError { call: "made up", gpa: run.gpa(), size: run.count * K4, source })
    }
}

impl Memory for MadeUpMemory {
    fn convert(
        &mut self,
        run: Pages,
        to: Direction,
        keep: bool,
        _: &PageMap,
    ) -> Result<(), MemoryError> {
        self.note(Asked::Convert(run, to, keep), run)
    }

    fn accept(&mut self, run: Pages, _: &PageMap) -> Result<(), MemoryError> {
        self.note(Asked::Accept(run), run)
    }
}

/// A conversation that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    pub conversation: Conversation,
    pub ending: Ending,
    pub marked: bool,
    pub missing: Option<Pages>,
    pub lied: bool,
    pub pending: Option<Pages>,
}

/// The events that tests look at.
#[derive(Debug, Default)]
pub struct Events {
    pub calls: Vec<Call>,
    pub accepts: Vec<Accept>,
    pub closed: Vec<Closed>,
    /// Touches against the state: whether the host had lied.
    pub touches: Vec<bool>,
    pub exits: Vec<(u32, bool)>,
    pub texts: Vec<String>,
    /// Ranges with pages that lack an accept, and these.
    pub unaccepted: Vec<(Pages, Pages)>,
    /// What is not private and accepted after ExitBootServices.
    pub left: Vec<(Pages, PageState)>,
}

impl EventSink for Events {
    fn on(&mut self, event: &Event<'_>) -> Then {
        match *event {
            Event::Call(call) => self.calls.push(call),
            Event::Accept(accept) => self.accepts.push(accept),
            Event::Touch { lied, .. } => self.touches.push(lied),
            Event::Closed { conversation, ending, marked, missing, lied, pending, .. } => {
                self.closed.push(Closed { conversation, ending, marked, missing, lied, pending });
            }
            Event::Unaccepted { range, pending } => self.unaccepted.push((range, pending)),
            Event::Left { pages, state } => self.left.push((pages, state)),
            Event::Exit { vcpu, success } => self.exits.push((vcpu, success)),
            Event::Panic { text } | Event::Text { text } => self.texts.push(text.to_owned()),
            Event::Crash { detail } | Event::Odd { detail } => self.texts.push(detail.to_owned()),
            _ => {}
        }
        Then::GoOn
    }
}

/// An engine under test.
pub struct Bench {
    pub engine: Engine<MadeUpMemory, Shared>,
    pub events: std::rc::Rc<std::cell::RefCell<Events>>,
}

/// A sink whose events the test can look at while the engine has it.
#[derive(Debug)]
pub struct Shared(std::rc::Rc<std::cell::RefCell<Events>>);

impl EventSink for Shared {
    fn on(&mut self, event: &Event<'_>) -> Then {
        self.0.borrow_mut().on(event)
    }
}

impl Bench {
    pub fn new(policy: &str) -> Self {
        Self::with(policy, 1, 1, GPAW)
    }

    pub fn with(policy: &str, seed: u64, vcpus: usize, gpaw: u32) -> Self {
        Self::behind(FrontEnd::Direct, policy, seed, vcpus, gpaw)
    }

    pub fn behind(front_end: FrontEnd, policy: &str, seed: u64, vcpus: usize, gpaw: u32) -> Self {
        let policy = Policy::parse(policy).expect(policy);
        let events = std::rc::Rc::default();
        let sink = Shared(std::rc::Rc::clone(&events));
        let settings = Settings { policy, seed, gpaw, vcpus, timing: false, front_end };
        Self { engine: Engine::new(settings, MadeUpMemory::default(), sink), events }
    }

    /// MapGPA on vCPU 0.
    pub fn map(&mut self, raw_gpa: u64, size: u64) -> Reply {
        self.map_on(0, raw_gpa, size)
    }

    pub fn map_on(&mut self, vcpu: u32, raw_gpa: u64, size: u64) -> Reply {
        self.engine.map_gpa(vcpu, raw_gpa, size).expect("memory does not fail")
    }

    pub fn accept(&mut self, gpa: u64, level: u64) -> Option<u64> {
        self.engine.accept(0, gpa | level).expect("memory does not fail").0
    }

    pub fn tdcall(&mut self, regs: &mut Regs) {
        mapgpa::tdcall::tdcall(
            &mut self.engine,
            0,
            regs,
            &mapgpa::platform::Bare,
            &mapgpa::platform::NoCpu,
        )
        .expect("memory does not fail");
    }

    /// A channel message.
    pub fn say(&mut self, vcpu: u32, words: &[u32]) {
        for word in words {
            self.engine.channel_word(vcpu, *word);
        }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.events.borrow().calls.clone()
    }

    pub fn last(&self) -> Call {
        *self.events.borrow().calls.last().expect("a call")
    }

    pub fn accepts(&self) -> Vec<Accept> {
        self.events.borrow().accepts.clone()
    }

    pub fn closed(&self) -> Vec<Closed> {
        self.events.borrow().closed.clone()
    }
}

/// The registers of an accept.
pub fn accept_regs(rcx: u64) -> Regs {
    Regs { rax: leaf::MEM_PAGE_ACCEPT, rcx, ..Regs::default() }
}

/// A case on backend `hosted`: 2 MiB, round trip, one vCPU, seed 1.
pub fn hosted(guest: Guest, policy: &str) -> Case {
    let policy = Policy::parse(policy).expect(policy);
    let timeout = Duration::from_secs(30);
    Case { gpaw: GPAW, timeout, ..Case::new(GuestSource::BuiltIn(guest), policy) }
}

/// A directory of this test that is removed with it.
pub struct Scratch(std::path::PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mapgpa-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a scratch directory");
        Self(path)
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.join(name)
    }

    /// The names of the files in it, sorted.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the scratch directory");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
