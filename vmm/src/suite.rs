//! The suite: guests times policies, run in parallel, each case held against what is expected.
//!
//! Which thread runs a case, and when, has no effect on it; results are in the order of the cases.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::case::{Case, Ran};
use crate::expect::Expectations;
use crate::interrupt;
use crate::judge::Check;
use crate::one_line;
use crate::report::{RunReport, Verdict};
use crate::workers;

/// The policies of the suite unless the user names others: each behaviour of a host that a guest
/// should meet (docs/policies.md).
pub const POLICIES: &[&str] = &[
    "complete",
    "chunk=4K",
    "chunk=64K",
    "chunk=1M",
    "chunk=64K,stall=1",
    "chunk=64K,stall=2",
    "chunk=64K,stall=3",
    "stall=forever",
    "contention=0.1",
    "contention=0.5",
    "hyperv",
    "qemu-tdx",
    "kvm-6.16",
    "kvm-7.2",
    "r11=end",
    "r11=past-end",
    "r11=below",
    "r11=start-1",
    "r11=unaligned",
    "r11=strip-shared",
    "r11=flip",
    "r11=skip",
    "status=0x8000000000000000",
    "status=0x8000000000000000,after=3",
    "status=0x8000000000000001",
    "status=0x4000000000000000",
    "status=0x8000000000000000,r11=end",
    "lie=success",
    "lie=success,after=3",
    "accept=already",
    "accept=mismatch",
    "accept=exit",
    "accept=busy",
    "accept=stuck",
    "random",
    "hostile-random",
];

/// A case that was run, or could not be.
#[derive(Debug)]
pub struct CaseResult {
    /// Which of the suite's cases, those of other shards included, from 1.
    pub number: usize,
    /// The guest's name.
    pub guest: String,
    /// The policy's name.
    pub policy: String,
    /// Checks that are expected to fail; none: it is expected to pass.
    pub expected: Vec<Check>,
    /// The report, or why there is none.
    pub report: Result<RunReport, String>,
    /// What ended a run early, if something did.
    pub error: Option<String>,
}

impl CaseResult {
    /// The verdict.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.report.as_ref().map_or(Verdict::Error, |report| report.verdict)
    }

    /// The checks that failed.
    #[must_use]
    pub fn failed_checks(&self) -> Vec<Check> {
        self.report.as_ref().map(RunReport::failed_checks).unwrap_or_default()
    }

    /// Whether it went as expected; a case that was not exercised contradicts nothing, and neither does
    /// a check that could not be made.
    #[must_use]
    pub fn as_expected(&self) -> bool {
        match (self.verdict(), &self.report) {
            (Verdict::NotExercised, _) => true,
            (Verdict::Error, _) | (_, Err(_)) => false,
            (Verdict::Pass | Verdict::Fail, Ok(report)) => {
                let made =
                    |check: &Check| !report.checks_off.iter().any(|off| *off == check.info().name);
                let failed = report.failed_checks();
                failed.iter().filter(|c| made(c)).eq(self.expected.iter().filter(|c| made(c)))
            }
        }
    }
}

/// A suite that was run.
#[derive(Debug)]
pub struct SuiteResult {
    /// The cases that were run, in order.
    pub cases: Vec<CaseResult>,
    /// Cases that were not run because the user interrupted the suite, or because it is unfinished.
    pub left_out: usize,
    /// It had not ended when this was written: it still runs, or was killed.
    pub unfinished: bool,
    /// Wall time in nanoseconds.
    pub wall_ns: u64,
}

impl SuiteResult {
    /// How many cases have each verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        self.cases.iter().filter(|case| case.verdict() == verdict).count()
    }

    /// How many cases went otherwise than expected.
    #[must_use]
    pub fn unexpected(&self) -> usize {
        self.cases.iter().filter(|case| !case.as_expected()).count()
    }

    /// The cases of each guest, guests in order of their first case.
    #[must_use]
    pub fn policies(&self) -> Vec<&str> {
        let mut seen = BTreeMap::new();
        for (at, case) in self.cases.iter().enumerate() {
            seen.entry(case.policy.as_str()).or_insert(at);
        }
        let mut policies: Vec<_> = seen.into_iter().collect();
        policies.sort_unstable_by_key(|(_, at)| *at);
        policies.into_iter().map(|(policy, _)| policy).collect()
    }
}

/// Whether the case of `guest` and `policy` belongs to part `index` of `count`, from 1. The hash is
/// FNV-1a of their names, so that a case stays in its part whatever else there is.
#[must_use]
pub fn in_shard(guest: &str, policy: &str, index: u64, count: u64) -> bool {
    let name = guest.bytes().chain(*b"\n").chain(policy.bytes());
    let hash = name.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash % count == index - 1
}

/// Runs `cases`, each with its number, with `jobs` threads; `progress` is called after each.
pub fn run(
    cases: &[(usize, Case)],
    expectations: &Expectations,
    jobs: usize,
    progress: impl Fn(&CaseResult) + Sync,
) -> SuiteResult {
    let started = std::time::Instant::now();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    workers::work(jobs.min(cases.len()), || {
        while !interrupt::requested() {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((number, case)) = cases.get(at) else { return };
            let Some(result) = run_one(*number, case, expectations) else { return };
            progress(&result);
            results.lock().unwrap_or_else(PoisonError::into_inner).insert(at, result);
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    SuiteResult {
        left_out: cases.len() - results.len(),
        unfinished: false,
        cases: results.into_values().collect(),
        wall_ns: u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX),
    }
}

/// Runs one case; nothing if the user interrupted it.
fn run_one(number: usize, case: &Case, expectations: &Expectations) -> Option<CaseResult> {
    let guest = case.guest.name();
    let policy = case.policy.name.clone();
    let expected = expectations.of(&guest, &policy, case.front_end);
    let (report, error) = match case.run() {
        Ok(Ran { interrupted: true, .. }) => return None,
        Ok(Ran { report, error, .. }) => (Ok(report), error.map(|error| one_line(&error))),
        Err(error) => (Err(one_line(&error)), None),
    };
    Some(CaseResult { number, guest, policy, expected, report, error })
}
