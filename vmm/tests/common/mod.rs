//! What tests on a VM share: whether there is KVM, the probe's scripts, and a record of events.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
#![allow(clippy::expect_used, reason = "test code")]
#![allow(missing_docs, reason = "the names say it")]

use std::time::Duration;

use mapgpa::backend::emulated::{self, EmulatedError, PROBE_IMAGE};
use mapgpa::backend::{End, Setup};
use mapgpa::engine::{Call, Event, EventSink, FrontEnd, Settings, Then};
use mapgpa::memory::MemoryModel;
use mapgpa::pagemap::{PageState, Pages};
use mapgpa::policy::Policy;
use mapgpa_abi::Alias;
use mapgpa_abi::params::{BOUND_OWN, Layout, Params, Plan};

/// Where tests convert memory: above the image, 2 MiB aligned.
pub const GPA: u64 = 16 << 20;
/// A page.
pub const K4: u64 = 4096;
/// A large page.
pub const M2: u64 = 2 << 20;

/// The guest's shared bit here.
pub fn shared_bit() -> u64 {
    mapgpa_abi::shared_bit(emulated::default_gpaw().expect("checked before"))
}

/// A probe script of one vCPU, operation by operation (guest-tests/images/src/bin/probe.rs).
#[derive(Debug, Clone, Default)]
pub struct Script(Vec<u64>);

impl Script {
    pub fn new() -> Self {
        Self::default()
    }

    fn op(mut self, words: &[u64]) -> Self {
        self.0.extend_from_slice(words);
        self
    }

    /// DATA: the 14 registers afterwards.
    pub fn tdcall(self, regs: [u64; 14]) -> Self {
        self.op(&[1]).op(&regs)
    }

    /// MapGPA with raw R12 and R13; DATA: the 14 registers afterwards.
    pub fn map_gpa(self, r12: u64, r13: u64) -> Self {
        self.tdcall([0, 0, 0xfc00, 0, 0, 0, 0, 0, 0, 0x10001, r12, r13, 0, 0])
    }

    /// DATA: the value.
    pub fn read(self, alias: Alias, gpa: u64) -> Self {
        self.op(&[2, side(alias), gpa])
    }

    pub fn write(self, alias: Alias, gpa: u64, value: u64) -> Self {
        self.op(&[3, side(alias), gpa, value])
    }

    pub fn ud2(self) -> Self {
        self.op(&[4])
    }

    pub fn spin(self) -> Self {
        self.op(&[5])
    }

    /// `count` 0: without end.
    pub fn out(self, port: u64, count: u64) -> Self {
        self.op(&[6, port, count])
    }

    pub fn barrier(self) -> Self {
        self.op(&[7])
    }

    /// DATA: how many succeeded at once.
    pub fn convert(self, gpa: u64, count: u64, stride: u64, size: u64, shared: bool) -> Self {
        self.op(&[8, gpa, count, stride, size, u64::from(shared), shared_bit()])
    }

    /// DATA: how many succeeded.
    pub fn accept(self, gpa: u64, count: u64, stride: u64, level: u64) -> Self {
        self.op(&[9, gpa, count, stride, level])
    }

    /// Writes each GPA to itself.
    pub fn fill(self, alias: Alias, gpa: u64, count: u64, stride: u64) -> Self {
        self.op(&[10, side(alias), gpa, count, stride])
    }

    /// DATA: how many are zero, how many as `fill` wrote.
    pub fn check(self, alias: Alias, gpa: u64, count: u64, stride: u64) -> Self {
        self.op(&[11, side(alias), gpa, count, stride])
    }

    pub fn overflow(self) -> Self {
        self.op(&[12])
    }
}

fn side(alias: Alias) -> u64 {
    u64::from(alias == Alias::Shared)
}

/// What was seen of a run.
#[derive(Debug, Default)]
pub struct Seen {
    pub calls: Vec<Call>,
    /// GPA with shared bit, alias, page state.
    pub touches: Vec<(u64, Alias, PageState)>,
    pub data: Vec<u64>,
    pub crashes: Vec<String>,
    pub panics: Vec<String>,
    pub odd: Vec<String>,
    pub exits: Vec<(u32, bool)>,
    pub timeouts: u32,
    pub stop_at_touch: bool,
}

impl EventSink for Seen {
    fn on(&mut self, event: &Event<'_>) -> Then {
        match *event {
            Event::Call(call) => self.calls.push(call),
            Event::Touch { raw_gpa, alias, state, .. } => {
                self.touches.push((raw_gpa, alias, state));
                if self.stop_at_touch {
                    return Then::Stop;
                }
            }
            Event::Data { values } => self.data.extend_from_slice(values),
            Event::Crash { detail } => self.crashes.push(detail.to_owned()),
            Event::Panic { text } => self.panics.push(text.to_owned()),
            Event::Odd { detail } => self.odd.push(detail.to_owned()),
            Event::Exit { vcpu, success } => self.exits.push((vcpu, success)),
            Event::Timeout => self.timeouts += 1,
            _ => {}
        }
        Then::GoOn
    }
}

/// How a probe runs.
#[derive(Debug, Clone)]
pub struct Probe {
    pub policy: &'static str,
    pub memory: u64,
    pub memory_model: MemoryModel,
    pub timeout: Duration,
    pub shared: Option<Pages>,
    pub stop_at_touch: bool,
    pub image: Vec<u8>,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            policy: "complete",
            memory: 32 << 20,
            memory_model: MemoryModel::default(),
            timeout: Duration::from_secs(20),
            shared: None,
            stop_at_touch: false,
            image: PROBE_IMAGE.to_vec(),
        }
    }
}

impl Probe {
    /// Runs a script a vCPU, to the end; the run itself must not fail.
    pub fn run(&self, scripts: &[Script]) -> Seen {
        let end = self.try_run(scripts).expect("the run begins");
        assert!(end.error.is_none(), "{:?}", end.error);
        end.sink
    }

    /// Runs a script a vCPU.
    pub fn try_run(&self, scripts: &[Script]) -> Result<End<Seen, EmulatedError>, EmulatedError> {
        let mut words = vec![0; 16];
        for (vcpu, script) in scripts.iter().enumerate() {
            words[vcpu] = words.len() as u64;
            words.extend_from_slice(&script.0);
            words.push(0);
        }
        let input: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let setup = Setup {
            image: &self.image,
            params: Params {
                guest: 0,
                gpa: GPA,
                size: M2,
                plan: Plan::RoundTrip,
                layout: Layout::Contiguous,
                bound: BOUND_OWN,
                guest_chunk: 0,
                vcpus: scripts.len() as u64,
                touch: 0,
                touch_before: 0,
                mark_replies: false,
            },
            memory: self.memory,
            memory_model: self.memory_model,
            shared: self.shared,
            timeout: self.timeout,
        };
        let settings = Settings {
            policy: Policy::parse(self.policy).expect("a policy"),
            seed: 0,
            gpaw: emulated::default_gpaw()?,
            vcpus: scripts.len(),
            timing: false,
            front_end: FrontEnd::Direct,
        };
        let seen = Seen { stop_at_touch: self.stop_at_touch, ..Seen::default() };
        emulated::run_with_input(&setup, &input, settings, seen)
    }
}
