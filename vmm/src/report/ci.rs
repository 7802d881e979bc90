//! The suite for CI systems: JUnit and KTAP.

use std::io::{self, Write};
use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use super::matrix::{found, names};
use super::{RunReport, Verdict};
use crate::suite::{CaseResult, SuiteResult};

/// Why a case that was not exercised is skipped.
const NOT_EXERCISED: &str = "not exercised: what the policy is about never occurred";

/// Writes JUnit XML: one suite a guest, one test a policy.
///
/// # Errors
/// The output cannot be written.
pub fn junit(out: &mut impl Write, suite: &SuiteResult) -> Result<(), quick_junit::SerializeError> {
    let mut report = Report::new("mapgpa");
    report.set_time(Duration::from_nanos(suite.wall_ns));
    let mut suites: Vec<TestSuite> = Vec::new();
    for case in &suite.cases {
        let mut test = TestCase::new(case.policy.as_str(), status(case));
        test.set_classname(case.guest.as_str());
        if let Ok(report) = &case.report {
            test.set_time(Duration::from_nanos(report.totals.wall_ns));
            test.set_system_out(detail(report));
        }
        let at = suites.iter().position(|of| of.name.as_str() == case.guest).unwrap_or_else(|| {
            suites.push(TestSuite::new(case.guest.as_str()));
            suites.len() - 1
        });
        suites[at].add_test_case(test);
    }
    report.add_test_suites(suites);
    report.serialize(out)
}

fn status(case: &CaseResult) -> TestCaseStatus {
    if case.verdict() == Verdict::NotExercised {
        let mut status = TestCaseStatus::skipped();
        status.set_message(NOT_EXERCISED);
        return status;
    }
    if case.as_expected() {
        return TestCaseStatus::success();
    }
    let kind = match case.verdict() {
        Verdict::Error => NonSuccessKind::Error,
        _ => NonSuccessKind::Failure,
    };
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(format!("expected {}, found {}", names(&case.expected), found(case)));
    status
}

fn detail(report: &RunReport) -> String {
    let mut text = format!("class {:?}, result {:?}\n", report.class, report.guest_result);
    for violation in &report.violations {
        let gpa = violation.gpa.map(|gpa| format!(" at {gpa:#x}")).unwrap_or_default();
        text +=
            &format!("{} in call {}{gpa}: {}\n", violation.check, violation.call, violation.detail);
    }
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    text
}

/// Writes KTAP, version 1 (Documentation/dev-tools/ktap.rst): known failures are XFAIL.
///
/// # Errors
/// The output cannot be written.
pub fn ktap(out: &mut impl Write, suite: &SuiteResult) -> io::Result<()> {
    writeln!(out, "KTAP version 1\n1..{}", suite.cases.len())?;
    for (number, case) in (1..).zip(&suite.cases) {
        // '#' would begin a directive.
        let name = format!("{}:{}", case.guest, case.policy).replace('#', "_");
        match (case.verdict(), case.as_expected()) {
            (Verdict::NotExercised, _) => {
                writeln!(out, "ok {number} {name} # SKIP {NOT_EXERCISED}")?;
            }
            (Verdict::Fail, true) => {
                writeln!(out, "ok {number} {name} # XFAIL {}", names(&case.expected))?;
            }
            (_, true) => writeln!(out, "ok {number} {name}")?,
            (_, false) => {
                writeln!(out, "# expected {}, found {}", names(&case.expected), found(case))?;
                writeln!(out, "not ok {number} {name}")?;
            }
        }
    }
    Ok(())
}
