//! One case: a guest, a policy and their options; checked, run on a backend, and reported.

mod error;
mod guest;
pub mod machine;
mod recipe;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mapgpa_abi::params::{BOUND_OWN, Layout, Params, Plan};
use mapgpa_abi::{Direction, PAGE_SIZE_1G};

use crate::backend::{End, Setup, emulated, hosted, tdx};
use crate::engine::{EventSink, FrontEnd, Settings};
use crate::judge::{Judge, Rules};
use crate::memory::MemoryModel;
use crate::pagemap::Pages;
use crate::policy::Policy;
use crate::report::{Follow, Host, Record, Recorder, RunReport, Totals, Trace, Verdict};

pub(crate) use error::trace_error;
pub use error::{CaseError, RunError};
pub(crate) use guest::read_at_most;
pub use guest::{Backend, GuestSource};
pub use recipe::{KernelForm, Recipe, RunForm, layout_by_name, plan_by_name, until_by_name};

/// A case.
#[derive(Debug, Clone)]
pub struct Case {
    /// The guest.
    pub guest: GuestSource,
    /// The policy.
    pub policy: Policy,
    /// What it runs on.
    pub backend: Backend,
    /// What stands between the guest and the policy.
    pub front_end: FrontEnd,
    /// The policy that this one stands for, and why, if the user's cannot be expressed.
    pub stands_for: Option<String>,
    /// Seed of the policy's draws.
    pub seed: u64,
    /// Guest-physical address width in bits.
    pub gpaw: u32,
    /// Which way the range is converted.
    pub plan: Plan,
    /// How its pages lie.
    pub layout: Layout,
    /// Bytes converted each way, a multiple of 4 KiB.
    pub range: u64,
    /// Bytes of guest memory; nothing: what the range needs.
    pub memory: Option<u64>,
    /// How it is made, on backend `emulated`.
    pub memory_model: MemoryModel,
    /// The guest's bound, as in the parameter page.
    pub bound: u64,
    /// The most bytes that the guest asks for at a time; 0: no limit.
    pub guest_chunk: u64,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// When the guest is ended at the latest.
    pub timeout: Duration,
    /// The judge's limits.
    pub rules: Rules,
    /// Where the trace goes.
    pub trace: Option<PathBuf>,
}

/// When a guest test is ended at the latest, unless the user says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Start of the range where it is less than 1 GiB: above the guest's image, 2 MiB aligned.
const RANGE_GPA: u64 = 16 << 20;
/// The end of memory below the hole that PCs have under 4 GiB.
pub const LOW_END: u64 = mapgpa_abi::layout::HOLE_START;
/// Where memory goes on.
pub const HIGH_START: u64 = mapgpa_abi::layout::HOLE_END;
/// The least memory: the image, its stacks, and a range of 2 MiB.
const MEMORY_MIN: u64 = 32 << 20;
/// The most memory: what the page map is proven for.
const MEMORY_MAX: u64 = 1 << 40;
/// The most vCPUs of a guest test: as many as have a stack.
#[expect(clippy::cast_possible_truncation, reason = "a small number")]
pub const VCPUS_MAX: usize = mapgpa_abi::layout::MAX_VCPUS as usize;
/// Pages touched of a range after its conversion, and before where memory work is not measured.
pub const TOUCHED: u64 = 16;

/// A run's report, and how the run went.
#[derive(Debug)]
pub struct Ran {
    /// The report.
    pub report: RunReport,
    /// The user interrupted it: the report says what there was until then.
    pub interrupted: bool,
    /// What ended it early; the verdict is then `error`.
    pub error: Option<RunError>,
    /// Values that the guest sent.
    pub data: Vec<u64>,
}

/// Name of a plan on the command line.
#[must_use]
pub const fn plan_name(plan: Plan) -> &'static str {
    match plan {
        Plan::One(Direction::ToShared) => "to-shared",
        Plan::One(Direction::ToPrivate) => "to-private",
        Plan::RoundTrip => "round-trip",
    }
}

impl Case {
    /// The case of `guest` and `policy` on backend `hosted` with the defaults of the command line.
    #[must_use]
    pub fn new(guest: GuestSource, policy: Policy) -> Self {
        Self {
            guest,
            policy,
            backend: Backend::Hosted,
            front_end: FrontEnd::Direct,
            stands_for: None,
            seed: 1,
            gpaw: 48,
            plan: Plan::RoundTrip,
            layout: Layout::Contiguous,
            range: mapgpa_abi::PAGE_SIZE_2M,
            memory: None,
            memory_model: MemoryModel::default(),
            bound: BOUND_OWN,
            guest_chunk: 0,
            vcpus: 1,
            timeout: DEFAULT_TIMEOUT,
            rules: Rules::default(),
            trace: None,
        }
    }

    /// Where the range lies: the whole of it, with what is between scattered pages.
    fn span(&self) -> Pages {
        let scattered = self.layout == Layout::Scattered;
        let size = if scattered { 2 * self.range } else { self.range };
        let start = if size < PAGE_SIZE_1G { RANGE_GPA } else { PAGE_SIZE_1G };
        let start = if start + size <= LOW_END { start } else { HIGH_START };
        Pages::of_bytes(start, size)
    }

    /// GPA of the range in bytes, without the shared bit.
    #[must_use]
    pub fn range_gpa(&self) -> u64 {
        self.span().gpa()
    }

    /// Bytes of memory that reach up to the end of the range.
    fn needs(&self) -> u64 {
        let end = self.span().end() * mapgpa_abi::PAGE_SIZE;
        if end <= LOW_END { end } else { end - (HIGH_START - LOW_END) }.max(MEMORY_MIN)
    }

    fn memory(&self) -> u64 {
        self.memory.unwrap_or_else(|| self.needs())
    }

    /// The memory model in reports.
    #[must_use]
    pub const fn memory_model_name(&self) -> &'static str {
        match self.backend {
            Backend::Emulated => self.memory_model.name(),
            Backend::Tdx => MemoryModel::GuestMemfd.name(),
            Backend::Hosted => "none",
        }
    }

    /// Checks what can be checked without running.
    ///
    /// # Errors
    /// The case cannot be run as asked.
    pub fn check(&self) -> Result<(), CaseError> {
        let info = match self.guest {
            GuestSource::BuiltIn(guest) => Some(guest.info()),
            GuestSource::Elf { .. } => None,
        };
        if self.backend == Backend::Hosted && !info.is_some_and(|info| info.hosted) {
            return Err(CaseError::VmOnly { guest: self.guest.name() });
        }
        if info.is_some_and(|info| !info.runs_with_gpaw(self.gpaw)) {
            return Err(CaseError::GuestGpaw { guest: self.guest.name(), gpaw: self.gpaw });
        }
        let memory = self.memory.unwrap_or(MEMORY_MIN);
        if !(MEMORY_MIN..=MEMORY_MAX).contains(&memory) {
            return Err(CaseError::Memory(memory));
        }
        let scattered = self.layout == Layout::Scattered;
        let most_range = if scattered { MEMORY_MAX / 2 } else { MEMORY_MAX };
        let needs = if self.range > most_range { u64::MAX } else { self.needs() };
        if needs > MEMORY_MAX {
            return Err(CaseError::Largest { range: self.range, scattered });
        }
        let memory = self.memory.unwrap_or(needs);
        if needs > memory {
            return Err(CaseError::Range { range: self.range, scattered, needs, memory });
        }
        let pages = usize::try_from(self.range / mapgpa_abi::PAGE_SIZE).unwrap_or(usize::MAX);
        let most = pages.min(VCPUS_MAX);
        if !(1..=most).contains(&self.vcpus) {
            return Err(CaseError::Vcpus { vcpus: self.vcpus, most });
        }
        let to_private = self.plan == Plan::One(Direction::ToPrivate);
        if self.layout == Layout::Overlapping && (to_private || self.vcpus < 2) {
            return Err(CaseError::Overlapping);
        }
        let top = if memory > LOW_END { memory + (HIGH_START - LOW_END) } else { memory };
        let least = 64 - (top - 1).leading_zeros() + 1;
        if !(least..=52).contains(&self.gpaw) {
            return Err(CaseError::Gpaw { gpaw: self.gpaw, least });
        }
        // Last what a suite bears with.
        if let Some(info) = info.filter(|info| self.bound != BOUND_OWN && !info.takes_bound()) {
            return Err(CaseError::NoBound { guest: info.name.to_owned() });
        }
        if let Some(why) = self.cannot_apply() {
            let (policy, direction) = (self.policy.name.clone(), plan_name(self.plan));
            return Err(CaseError::CannotApply { policy, direction, why });
        }
        Ok(())
    }

    /// Why the policy cannot do what it is about in this case's directions.
    #[must_use]
    pub fn cannot_apply(&self) -> Option<&'static str> {
        let both = [Direction::ToShared, Direction::ToPrivate];
        match &self.plan {
            Plan::One(direction) => self.policy.cannot_apply(std::slice::from_ref(direction)),
            Plan::RoundTrip => self.policy.cannot_apply(&both),
        }
    }

    /// Runs the case, which has been checked, and judges it.
    ///
    /// # Errors
    /// The run could not begin.
    pub fn run(&self) -> Result<Ran, RunError> {
        self.run_followed(None)
    }

    /// As [`Case::run`], with its calls held against recorded ones.
    ///
    /// # Errors
    /// The run could not begin.
    pub fn run_followed(&self, follow: Option<Follow>) -> Result<Ran, RunError> {
        let fresh = self.trace.as_ref().is_some_and(|path| !path.exists());
        let trace = match &self.trace {
            Some(path) => Some(
                Trace::create(path, Some(Recipe::of_test(self)))
                    .map_err(|source| trace_error(path, source))?,
            ),
            None => None,
        };
        let recorder = Recorder::new(self.judge(), trace).following(follow);
        let started = Instant::now();
        let end = self.run_into(recorder, TOUCHED).inspect_err(|_| {
            // A run that did not begin leaves nothing behind.
            if let Some(path) = self.trace.as_ref().filter(|_| fresh) {
                let _ = std::fs::remove_file(path);
            }
        })?;
        let wall = started.elapsed();
        let record = end.sink.finish().map_err(|source| {
            trace_error(self.trace.as_deref().unwrap_or(Path::new("")), source)
        })?;
        Ok(self.ran(record, end.exits, end.interrupted, end.checks_off, end.error, wall))
    }

    /// A judge of this case's runs.
    #[must_use]
    pub fn judge(&self) -> Judge {
        Judge::new(self.rules, self.policy.is_special())
    }

    /// Runs the case, which has been checked, with its events going to `sink`; the guest writes to
    /// `touch_before` pages of each range before its conversion.
    ///
    /// # Errors
    /// The run could not begin; what fails later is in [`End::error`].
    pub fn run_into<S: EventSink + Send>(
        &self,
        sink: S,
        touch_before: u64,
    ) -> Result<End<S, RunError>, RunError> {
        let settings = Settings {
            policy: self.policy.clone(),
            seed: self.seed,
            gpaw: self.gpaw,
            vcpus: self.vcpus,
            timing: true,
            front_end: self.front_end,
        };
        let setup = self.setup(touch_before);
        Ok(match self.backend {
            Backend::Emulated => flatten(emulated::run(&setup, settings, sink)?),
            Backend::Tdx => flatten(tdx::run(&setup, settings, sink)?),
            Backend::Hosted => flatten(hosted::run(&setup, settings, sink)?),
        })
    }

    /// The guest and its machine, as [`Case::run_into`] sets them up.
    #[must_use]
    pub fn setup(&self, touch_before: u64) -> Setup<'_> {
        let span = self.span();
        let (guest, image) = match &self.guest {
            GuestSource::BuiltIn(guest) => (guest.index(), emulated::GUESTS_IMAGE),
            GuestSource::Elf { image, .. } => (0, image.as_slice()),
        };
        Setup {
            image,
            params: Params {
                guest,
                gpa: span.gpa(),
                size: self.range,
                plan: self.plan,
                layout: self.layout,
                bound: self.bound,
                guest_chunk: self.guest_chunk,
                vcpus: self.vcpus as u64,
                touch: TOUCHED,
                touch_before,
                mark_replies: false,
            },
            memory: self.memory(),
            memory_model: self.memory_model,
            shared: (self.plan == Plan::One(Direction::ToPrivate)).then_some(span),
            timeout: self.timeout,
        }
    }

    fn ran(
        &self,
        record: Record,
        exits: u64,
        interrupted: bool,
        checks_off: &[&'static str],
        error: Option<RunError>,
        wall: Duration,
    ) -> Ran {
        let judgement = record.judgement;
        let verdict = Verdict::of(&judgement, error.is_none() && !interrupted);
        let wall_ns = u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX);
        let report = RunReport {
            schema: crate::report::RUN_SCHEMA.into(),
            guest: self.guest.name(),
            policy: self.policy.name.clone(),
            class: judgement.class,
            backend: self.backend.name().into(),
            front_end: self.front_end.name().into(),
            memory_model: self.memory_model_name().into(),
            gpaw: self.gpaw,
            seed: self.seed,
            direction: plan_name(self.plan).into(),
            range: self.range,
            reproducible: self.policy.is_reproducible() && self.layout != Layout::Overlapping,
            verdict,
            guest_result: judgement.result,
            violations: judgement.violations,
            notes: self.stands_for.iter().cloned().chain(judgement.notes).collect(),
            checks_off: checks_off.iter().map(|check| (*check).into()).collect(),
            conversations: record.conversations,
            totals: Totals { exits, wall_ns, ..record.totals },
            kernel: None,
            firmware: None,
            phases: Vec::new(),
            console: None,
            host: Host::this(),
        };
        Ran { report, interrupted, error, data: record.data }
    }
}

fn flatten<S, E: Into<RunError>>(end: End<S, E>) -> End<S, RunError> {
    let End { sink, exits, work, interrupted, checks_off, error } = end;
    End { sink, exits, work, interrupted, checks_off, error: error.map(Into::into) }
}
