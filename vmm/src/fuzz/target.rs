//! What the fuzzer runs: a guest test on `hosted`, at full speed and without a report, a guest test in
//! VMs, or a kernel.

use std::time::{Duration, Instant};

use crate::backend::{End, hosted};
use crate::case::{Backend, Case, RunError};
use crate::engine::{Event, EventSink, Settings, Then};
use crate::judge::{Check, Class, GuestResult, Judge, Judgement, Violation};
use crate::linux::case::LinuxCase;
use crate::policy::Rule;

/// A guest, and all that is decided of its run.
#[derive(Debug, Clone)]
pub enum Target {
    /// A guest test.
    Test(Box<Case>),
    /// A kernel.
    Kernel(Box<LinuxCase>),
}

/// What a run showed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The judge's class.
    pub class: Class,
    /// How the guest ended.
    pub result: GuestResult,
    /// Checks that failed, as in a report.
    pub violations: Vec<Violation>,
    /// MapGPA calls.
    pub requests: u64,
    /// The user interrupted it.
    pub interrupted: bool,
}

impl Outcome {
    /// The checks that failed, each once, in order of their list.
    #[must_use]
    pub fn checks(&self) -> Vec<Check> {
        let mut checks: Vec<_> = self.violations.iter().map(|violation| violation.check).collect();
        checks.sort_unstable();
        checks.dedup();
        checks
    }

    fn new(judgement: Judgement, requests: u64, interrupted: bool) -> Self {
        let Judgement { class, result, violations, .. } = judgement;
        Self { class, result, violations, requests, interrupted }
    }
}

/// A judge, and a count of requests.
struct Watch {
    judge: Judge,
    requests: u64,
}

impl EventSink for Watch {
    fn on(&mut self, event: &Event<'_>) -> Then {
        self.requests += u64::from(matches!(event, Event::Call(_)));
        self.judge.on(event)
    }
}

impl Target {
    /// The rules of its policy.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        match self {
            Self::Test(case) => &case.policy.rules,
            Self::Kernel(case) => &case.run.policy.rules,
        }
    }

    /// The rules of its policy, to be changed.
    pub fn rules_mut(&mut self) -> &mut Vec<Rule> {
        match self {
            Self::Test(case) => &mut case.policy.rules,
            Self::Kernel(case) => &mut case.run.policy.rules,
        }
    }

    /// When it is ended at the latest.
    fn timeout_mut(&mut self) -> &mut Duration {
        match self {
            Self::Test(case) => &mut case.timeout,
            Self::Kernel(case) => &mut case.run.timeout,
        }
    }

    /// Runs it until `deadline` at the latest; nothing, if that ended it, or the user did.
    ///
    /// # Errors
    /// The run could not be done.
    pub fn run_until(&mut self, deadline: Option<Instant>) -> Result<Option<Outcome>, RunError> {
        let own = *self.timeout_mut();
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let cut = left.filter(|left| *left < own);
        if cut == Some(Duration::ZERO) {
            return Ok(None);
        }
        *self.timeout_mut() = cut.unwrap_or(own);
        let ran = self.run();
        *self.timeout_mut() = own;
        // A guest that was ended before its own time-out says nothing.
        let is_cut = cut.is_some() && deadline.is_some_and(|at| Instant::now() >= at);
        Ok(Some(ran?).filter(|outcome| !outcome.interrupted && !is_cut))
    }

    /// Runs it.
    ///
    /// # Errors
    /// The run could not be done.
    pub fn run(&self) -> Result<Outcome, RunError> {
        match self {
            Self::Test(case) => run_test(case),
            Self::Kernel(case) => {
                let ran = case.run(None)?;
                if let Some(error) = ran.error {
                    return Err(error);
                }
                let report = ran.report;
                Ok(Outcome {
                    class: report.class,
                    result: report.guest_result,
                    violations: report.violations,
                    requests: report.totals.calls,
                    interrupted: ran.interrupted,
                })
            }
        }
    }
}

fn run_test(case: &Case) -> Result<Outcome, RunError> {
    let sink = Watch { judge: case.judge(), requests: 0 };
    let touched = crate::case::TOUCHED;
    let end = if case.backend == Backend::Hosted {
        // Without times, which nobody reads here.
        let Case { seed, gpaw, vcpus, front_end, .. } = *case;
        let policy = case.policy.clone();
        let settings = Settings { policy, seed, gpaw, vcpus, timing: false, front_end };
        let End { sink, exits, work, interrupted, checks_off, error } =
            hosted::run(&case.setup(touched), settings, sink)?;
        End { sink, exits, work, interrupted, checks_off, error: error.map(Into::into) }
    } else {
        case.run_into(sink, touched)?
    };
    match end.error {
        Some(error) => Err(error),
        None => Ok(Outcome::new(end.sink.judge.finish(), end.sink.requests, end.interrupted)),
    }
}
