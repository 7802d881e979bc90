//! The suite for programs: its JSON object (docs/schemas/suite.schema.json), written when it has ended or
//! case by case while it runs, and read again.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use super::{RunReport, Verdict};
use crate::judge::Check;
use crate::suite::{CaseResult, SuiteResult};

/// The version of the suite object.
pub const SCHEMA: &str = "mapgpa.suite/1";

/// A case in the JSON object: the run object, with what was expected of it.
#[derive(Serialize)]
struct CaseObject<'a> {
    /// Which of the suite's cases, those of other shards included, from 1.
    number: usize,
    #[serde(flatten)]
    report: Option<&'a RunReport>,
    /// Where there is no run object, what identifies the case, and why there is none.
    #[serde(flatten)]
    missing: Option<MissingRun<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    expected: &'a [Check],
    as_expected: bool,
}

#[derive(Serialize)]
struct MissingRun<'a> {
    guest: &'a str,
    policy: &'a str,
    verdict: Verdict,
}

/// What of a case is beside its run object, if it has one.
#[derive(Deserialize)]
struct CaseForm {
    number: usize,
    guest: String,
    policy: String,
    error: Option<String>,
    expected: Vec<Check>,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Summary {
    cases: usize,
    pass: usize,
    fail: usize,
    not_exercised: usize,
    error: usize,
    unexpected: usize,
    left_out: usize,
    wall_ns: u64,
}

#[derive(Serialize)]
struct SuiteObject<C> {
    schema: &'static str,
    unfinished: bool,
    cases: C,
    summary: Summary,
}

#[derive(Deserialize)]
struct SuiteForm {
    unfinished: bool,
    cases: Vec<Value>,
    summary: Summary,
}

impl<'a> CaseObject<'a> {
    fn of(case: &'a CaseResult) -> Self {
        Self {
            number: case.number,
            report: case.report.as_ref().ok(),
            missing: case.report.is_err().then_some(MissingRun {
                guest: &case.guest,
                policy: &case.policy,
                verdict: Verdict::Error,
            }),
            error: case.report.as_ref().err().or(case.error.as_ref()).map(String::as_str),
            expected: &case.expected,
            as_expected: case.as_expected(),
        }
    }
}

impl Summary {
    fn add(&mut self, case: &CaseResult) {
        self.cases += 1;
        let sum = match case.verdict() {
            Verdict::Pass => &mut self.pass,
            Verdict::Fail => &mut self.fail,
            Verdict::NotExercised => &mut self.not_exercised,
            Verdict::Error => &mut self.error,
        };
        *sum += 1;
        self.unexpected += usize::from(!case.as_expected());
    }
}

/// Writes the suite object.
///
/// # Errors
/// The output cannot be written.
pub fn write(out: &mut impl Write, suite: &SuiteResult) -> io::Result<()> {
    let SuiteResult { left_out, unfinished, wall_ns, .. } = *suite;
    let mut summary = Summary { left_out, wall_ns, ..Summary::default() };
    suite.cases.iter().for_each(|case| summary.add(case));
    let cases: Vec<_> = suite.cases.iter().map(CaseObject::of).collect();
    let object = SuiteObject { schema: SCHEMA, unfinished, cases, summary };
    serde_json::to_writer_pretty(&mut *out, &object)?;
    writeln!(out)
}

/// Reads the suite object.
///
/// # Errors
/// It is none.
pub fn read(object: Value) -> Result<SuiteResult, serde_json::Error> {
    let SuiteForm { unfinished, cases, summary } = serde_json::from_value(object)?;
    let cases = cases.into_iter().map(|case| {
        let CaseForm { number, guest, policy, error, expected } = CaseForm::deserialize(&case)?;
        let (report, error) = if case.get("schema").is_some() {
            (Ok(serde_json::from_value(case)?), error)
        } else {
            (Err(error.unwrap_or_default()), None)
        };
        Ok(CaseResult { number, guest, policy, expected, report, error })
    });
    let Summary { left_out, wall_ns, .. } = summary;
    Ok(SuiteResult { cases: cases.collect::<Result<_, _>>()?, left_out, unfinished, wall_ns })
}

/// A suite that runs: the cases so far, each made text once.
#[derive(Debug)]
pub struct SoFar {
    began: Instant,
    cases: BTreeMap<usize, Box<RawValue>>,
    summary: Summary,
    changed: bool,
}

impl SoFar {
    /// Of a suite of so many cases that begins now.
    #[must_use]
    pub fn new(cases: usize) -> Self {
        let summary = Summary { left_out: cases, ..Summary::default() };
        Self { began: Instant::now(), cases: BTreeMap::new(), summary, changed: false }
    }

    /// Adds a case.
    pub fn add(&mut self, case: &CaseResult) {
        // Reports are plain data; the suite's own object says what cannot be written.
        let Ok(text) = to_raw_value(&CaseObject::of(case)) else { return };
        self.cases.insert(case.number, text);
        self.summary.add(case);
        self.summary.left_out = self.summary.left_out.saturating_sub(1);
        self.summary.wall_ns = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.changed = true;
    }

    /// The suite object, if there are cases that the last one had not.
    pub fn news(&mut self) -> Option<Vec<u8>> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let cases: Vec<_> = self.cases.values().collect();
        let object = SuiteObject { schema: SCHEMA, unfinished: true, cases, summary: self.summary };
        serde_json::to_vec(&object).ok()
    }
}
