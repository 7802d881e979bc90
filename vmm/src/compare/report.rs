//! The report of a comparison: the object of `--json`, and the sums and ratios in it.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{CompareError, Comparison, Run, Series, Step, direction, histogram};
use crate::case::Case;
use crate::report::Host;

/// The version of the comparison object.
pub const SCHEMA: &str = "mapgpa.compare/1";

/// How the runs of a row ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// All runs converted the whole range.
    Completed,
    /// The guest gave up.
    GaveUp,
    /// The guest retried without end, and was ended.
    Endless,
    /// The guest did not end in time.
    TimedOut,
    /// The guest crashed.
    Crashed,
    /// The guest says that all went well, and a check says otherwise.
    Violated,
    /// A run could not be done.
    Error,
}

impl Outcome {
    /// In words.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::GaveUp => "gave up",
            Self::Endless => "endless",
            Self::TimedOut => "timed out",
            Self::Crashed => "crashed",
            Self::Violated => "violation",
            Self::Error => "error",
        }
    }
}

/// A value measured several times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// The spread of `values`; nothing of none.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }
}

/// Single calls as the guest feels them, over all runs of a row, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// The median call.
    pub p50_ns: u64,
    /// Nine of ten are no longer.
    pub p90_ns: u64,
    /// 99 of 100 are no longer.
    pub p99_ns: u64,
    /// 999 of 1000 are no longer.
    pub p999_ns: u64,
    /// The longest call of each run.
    pub longest_ns: Spread,
    /// Pairs of a share of all calls, 0 to 1, and how long that share takes at most.
    pub quantiles: Vec<(f64, u64)>,
}

/// A policy, a guest-side chunk and a direction.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The policy's name.
    pub policy: String,
    /// The most bytes that the guest asks for at a time; null: no limit.
    pub guest_chunk: Option<u64>,
    /// `to-shared` or `to-private`.
    pub direction: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What there is to say of that.
    pub detail: Option<String>,
    /// Runs behind the figures.
    pub runs: usize,
    /// MapGPA calls of a run.
    pub requests: u64,
    /// Replies RETRY of a run.
    pub retries: u64,
    /// Replies RETRY without progress of a run.
    pub no_progress: u64,
    /// Exits of a run, those outside the conversation included.
    pub exits: u64,
    /// Pages converted in a run.
    pub pages: u64,
    /// System calls that conversions and accepts cost the host in a run.
    pub host_calls: u64,
    /// Pages that those dropped.
    pub host_pages: u64,
    /// Time in the VMM's handler of MapGPA, a run, in nanoseconds.
    pub handler_ns: Option<Spread>,
    /// Time from begin to end of the conversations of a run, in nanoseconds; to private with accept.
    pub conversion_ns: Option<Spread>,
    /// GiB converted in a second of that time.
    pub gib_per_s: Option<Spread>,
    /// Single calls.
    pub latency: Option<Latency>,
    /// That time, to that of `complete` without a guest-side chunk in the same repeat.
    pub to_complete: Option<Spread>,
    /// The same time of the bare work: exits and hole punches without an engine, in nanoseconds.
    pub floor_ns: Option<Spread>,
    /// That time, to the bare work's in the same repeat.
    pub to_floor: Option<Spread>,
    /// The calls of the first run, for the strip of page states.
    #[serde(skip)]
    pub steps: Vec<Step>,
}

/// A comparison.
#[derive(Debug, Clone, Serialize)]
pub struct CompareReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// The guest's name, or the file's.
    pub guest: String,
    /// `emulated` or `hosted`.
    pub backend: &'static str,
    /// What stands between the guest and the policy.
    pub front_end: &'static str,
    /// `alias` or `guest-memfd`; `none` where there is no memory behind it.
    pub memory_model: &'static str,
    /// Guest-physical address width in bits.
    pub gpaw: u32,
    /// Seed of the policies' draws.
    pub seed: u64,
    /// Bytes converted in each run.
    pub range: u64,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Runs of each row that were asked for.
    pub repeats: usize,
    /// The user interrupted it: rows have fewer runs.
    pub interrupted: bool,
    /// It had not ended when this was written: it still runs, or was killed. Rows have fewer runs.
    pub unfinished: bool,
    /// The rows, in order.
    pub rows: Vec<Row>,
    /// Nanoseconds that it all took.
    pub wall_ns: u64,
    /// Versions.
    pub host: Host,
}

/// The report of `series`, one for each case of `comparison`, after `wall`; `unfinished` if it goes on.
pub(super) fn make(
    comparison: &Comparison,
    series: &[Series],
    wall: Duration,
    unfinished: bool,
) -> Result<CompareReport, CompareError> {
    let rows = comparison.cases.iter().zip(series);
    let base = |direction_wanted: &str| {
        rows.clone().find(|(case, _)| {
            case.policy.name == "complete"
                && case.guest_chunk == 0
                && direction(case) == direction_wanted
        })
    };
    let first = comparison.cases.first();
    Ok(CompareReport {
        schema: SCHEMA,
        guest: first.map(|case| case.guest.name()).unwrap_or_default(),
        backend: first.map_or("", |case| case.backend.name()),
        front_end: first.map_or("direct", |case| case.front_end.name()),
        memory_model: first.map_or("none", Case::memory_model_name),
        gpaw: first.map_or(0, |case| case.gpaw),
        seed: first.map_or(0, |case| case.seed),
        range: first.map_or(0, |case| case.range),
        vcpus: first.map_or(0, |case| case.vcpus),
        repeats: comparison.repeats,
        interrupted: crate::interrupt::requested(),
        unfinished,
        rows: rows
            .clone()
            .map(|(case, series)| {
                let complete = base(direction(case)).map(|(_, series)| series);
                let mut row = row(series, complete)?;
                row.policy.clone_from(&case.policy.name);
                row.guest_chunk = (case.guest_chunk != 0).then_some(case.guest_chunk);
                row.direction = direction(case);
                Ok(row)
            })
            .collect::<Result<_, CompareError>>()?,
        wall_ns: u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX),
        host: Host::this(),
    })
}

fn row(series: &Series, complete: Option<&Series>) -> Result<Row, CompareError> {
    let completed = series.outcome == Outcome::Completed;
    let runs = &series.runs;
    let spread = |value: &dyn Fn(&Run) -> Option<f64>| {
        Spread::of(runs.iter().filter_map(|(_, run)| value(run)).collect())
    };
    // Times of a conversion that did not end are no times of a conversion.
    let if_done = |value: Option<Spread>| if completed { value } else { None };
    let last = runs.last().map(|(_, run)| run);
    let count = |value: &dyn Fn(&Run) -> u64| last.map_or(0, value);
    let ratio = |value: &dyn Fn(usize, &Run) -> Option<u64>| {
        let ratios = runs.iter().filter_map(|(repeat, run)| {
            Some(conversion(run)? / float(value(*repeat, run).filter(|nanos| *nanos > 0)?))
        });
        if_done(Spread::of(ratios.collect()))
    };
    Ok(Row {
        policy: String::new(),
        guest_chunk: None,
        direction: "",
        outcome: series.outcome,
        detail: series.detail.clone(),
        runs: runs.len(),
        requests: count(&|run| run.measured.requests),
        retries: count(&|run| run.measured.retries),
        no_progress: count(&|run| run.measured.no_progress),
        exits: count(&|run| run.exits),
        pages: count(&|run| run.measured.pages),
        host_calls: count(&|run| run.work.calls),
        host_pages: count(&|run| run.work.pages),
        handler_ns: spread(&|run| Some(float(run.measured.handler_ns))),
        conversion_ns: if_done(spread(&conversion)),
        gib_per_s: if_done(spread(&|run| {
            let gib = float(run.measured.pages) / float(1 << 18);
            Some(gib / (conversion(run)? / 1e9))
        })),
        latency: latency(series)?,
        to_complete: ratio(&|repeat, _| {
            let same = complete?.runs.iter().find(|(other, _)| *other == repeat);
            same.map(|(_, run)| run.measured.conversation_ns)
        }),
        floor_ns: if_done(spread(&|run| run.floor_ns.map(float))),
        to_floor: ratio(&|_, run| run.floor_ns),
        steps: series.steps.clone(),
    })
}

/// The time of a run's conversations, if the guest marked them.
fn conversion(run: &Run) -> Option<f64> {
    (run.measured.conversation_ns > 0).then(|| float(run.measured.conversation_ns))
}

fn latency(series: &Series) -> Result<Option<Latency>, CompareError> {
    let mut all: Histogram<u64> = histogram()?;
    for (_, run) in &series.runs {
        // Both have the same bounds: nothing is out of range.
        if all.add(&run.measured.calls).is_err() {
            return Ok(None);
        }
    }
    let longest = series.runs.iter().map(|(_, run)| float(run.measured.longest_ns)).collect();
    let Some(longest_ns) = Spread::of(longest).filter(|_| !all.is_empty()) else {
        return Ok(None);
    };
    // Half of what is left at each step, down to the last call: as the tail goes on, so do the points.
    let quantiles = all
        .iter_quantiles(2)
        .map(|value| (value.quantile_iterated_to(), value.value_iterated_to()))
        .collect();
    Ok(Some(Latency {
        p50_ns: all.value_at_quantile(0.5),
        p90_ns: all.value_at_quantile(0.9),
        p99_ns: all.value_at_quantile(0.99),
        p999_ns: all.value_at_quantile(0.999),
        longest_ns,
        quantiles,
    }))
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds and counts far below 2^53")]
const fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(vec![]), None);
        let one = Spread::of(vec![2.0]).expect("a value");
        assert_eq!((one.min, one.median, one.max), (2.0, 2.0, 2.0));
        let odd = Spread::of(vec![5.0, 1.0, 3.0]).expect("values");
        assert_eq!((odd.min, odd.median, odd.max), (1.0, 3.0, 5.0));
        let even = Spread::of(vec![1.0, 2.0, 4.0, 9.0]).expect("values");
        assert_eq!((even.min, even.median, even.max), (1.0, 3.0, 9.0));
    }
}
