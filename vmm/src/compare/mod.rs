//! Comparing policies: the same conversion under each, in turn and repeated, with all its memory
//! work, measured.
//!
//! Each repeat runs every row once, so that a drift of the machine hits all alike; every other repeat
//! goes through them backwards. Ratios are those of neighbours in one repeat.

mod meter;
mod report;

use std::time::Instant;

use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::params::Plan;

pub use meter::{Measured, Meter, Step, histogram};
pub use report::{CompareReport, Latency, Outcome, Row, SCHEMA, Spread};

use crate::backend::End;
use crate::backend::emulated::floor::{self, Answer};
use crate::case::{Backend, Case, RunError};
use crate::interrupt;
use crate::judge::{Check, GuestResult, Judgement};
use crate::memory::HostWork;
use crate::one_line;

/// What is compared, and how often.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// The rows: cases of one direction each, checked.
    pub cases: Vec<Case>,
    /// Runs of each row, 1 or more.
    pub repeats: usize,
    /// Also runs the bare work of each: its exits and hole punches, without an engine.
    pub floor: bool,
}

/// The runs of a row.
#[derive(Debug)]
struct Series {
    outcome: Outcome,
    detail: Option<String>,
    /// With the repeat that each belongs to.
    runs: Vec<(usize, Run)>,
    steps: Vec<Step>,
}

/// One run.
#[derive(Debug)]
struct Run {
    measured: Measured,
    exits: u64,
    work: HostWork,
    /// From begin to end of the conversations of the bare work, in nanoseconds.
    floor_ns: Option<u64>,
}

/// A measurement that could not begin.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// No histogram.
    #[error("cannot make a histogram")]
    Histogram(#[from] hdrhistogram::CreationError),
}

impl Comparison {
    /// Runs it all; before each run `progress` is called with the row, and with what makes the report of
    /// those that there were.
    ///
    /// # Errors
    /// Nothing could be measured. A row that fails or hangs is reported as such, and not repeated.
    pub fn run(
        &self,
        mut progress: impl FnMut(&Case, &dyn Fn() -> Result<CompareReport, CompareError>),
    ) -> Result<CompareReport, CompareError> {
        let started = Instant::now();
        let mut series: Vec<Series> = Vec::new();
        series.resize_with(self.cases.len(), || Series {
            outcome: Outcome::Completed,
            detail: None,
            runs: Vec::new(),
            steps: Vec::new(),
        });
        'repeats: for repeat in 0..self.repeats {
            for at in 0..self.cases.len() {
                let at = if repeat % 2 == 0 { at } else { self.cases.len() - 1 - at };
                let case = &self.cases[at];
                if series[at].outcome != Outcome::Completed {
                    continue;
                }
                if interrupt::requested() {
                    break 'repeats;
                }
                progress(case, &|| report::make(self, &series, started.elapsed(), true));
                self.measure(case, repeat, &mut series[at])?;
            }
        }
        report::make(self, &series, started.elapsed(), false)
    }

    /// One run of a row and, after it, of its bare work.
    fn measure(&self, case: &Case, repeat: usize, row: &mut Series) -> Result<(), CompareError> {
        let first = row.runs.is_empty();
        let meter = Meter::new(case, first)?;
        let end = match case.run_into(meter, populated(case)) {
            Ok(end) => end,
            Err(error) => {
                row.outcome = Outcome::Error;
                row.detail = Some(one_line(&error));
                return Ok(());
            }
        };
        let End { sink, exits, work, interrupted, error, .. } = end;
        let (mut measured, judgement) = sink.finish();
        if interrupted {
            return Ok(());
        }
        (row.outcome, row.detail) = outcome(&judgement, error.as_ref());
        if first {
            row.steps = std::mem::take(&mut measured.steps);
        }
        let completed = row.outcome == Outcome::Completed;
        let floor_ns = if self.floor && completed {
            match bare(case, &row.steps) {
                Ok(nanos) => nanos,
                Err(error) => {
                    row.detail = Some(format!("no floor: {}", one_line(&error)));
                    None
                }
            }
        } else {
            None
        };
        row.runs.push((repeat, Run { measured, exits, work, floor_ns }));
        Ok(())
    }
}

/// Pages that the guest writes before the conversion: all, where there is memory behind them.
const fn populated(case: &Case) -> u64 {
    match case.backend {
        Backend::Emulated | Backend::Tdx => case.range / PAGE_SIZE,
        Backend::Hosted => 0,
    }
}

/// The bare work of a run of `case` that made these steps: nothing if the guest took another way.
fn bare(case: &Case, steps: &[Step]) -> Result<Option<u64>, RunError> {
    let mut replies = steps.iter();
    let mut strayed = false;
    let answer = |r12: u64, r13: u64| match replies.next() {
        Some(step) => {
            Answer { status: step.status, r11: step.r11, punch: step.converted * PAGE_SIZE }
        }
        None => {
            strayed = true;
            Answer::chunk(r12, r13, r13, false)
        }
    };
    let floor = floor::calls(&case.setup(populated(case)), case.gpaw, answer)?;
    let nanos = u64::try_from(floor.conversations.as_nanos()).unwrap_or(u64::MAX);
    Ok((!strayed && floor.calls == steps.len() as u64).then_some(nanos))
}

/// How a run ended, and what there is to say of it.
fn outcome(judgement: &Judgement, error: Option<&RunError>) -> (Outcome, Option<String>) {
    let endless = judgement.violations.iter().find(|v| v.check == Check::Unbounded);
    let detail = judgement.violations.first().map(|v| format!("{}: {}", v.check, v.detail));
    match (error, judgement.result) {
        (Some(error), _) => (Outcome::Error, Some(one_line(error))),
        (None, GuestResult::Timeout) => (Outcome::TimedOut, detail),
        (None, _) if endless.is_some() => {
            (Outcome::Endless, endless.map(|violation| violation.detail.clone()))
        }
        (None, GuestResult::Crash) => (Outcome::Crashed, detail),
        (None, GuestResult::Failure) => (Outcome::GaveUp, detail),
        (None, GuestResult::None) => (Outcome::Error, detail),
        (None, GuestResult::Success) if detail.is_some() => (Outcome::Violated, detail),
        (None, GuestResult::Success) => (Outcome::Completed, None),
    }
}

/// The one direction of a row.
const fn direction(case: &Case) -> &'static str {
    crate::case::plan_name(case.plan)
}

/// The cases of a plan, split by direction: a comparison measures them apart.
#[must_use]
pub fn directions(plan: Plan) -> Vec<Plan> {
    use mapgpa_abi::Direction::{ToPrivate, ToShared};
    match plan {
        Plan::One(_) => vec![plan],
        Plan::RoundTrip => vec![Plan::One(ToShared), Plan::One(ToPrivate)],
    }
}
