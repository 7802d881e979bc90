//! The suite for people: a matrix of guests and policies, and what went otherwise than expected.

use std::io::{self, Write};

use super::Verdict;
use crate::judge::{CHECKS, Check};
use crate::suite::{CaseResult, SuiteResult};
use crate::units::show_nanos;

/// Writes the matrix, its legend, and the summary.
///
/// # Errors
/// The output cannot be written.
pub fn write(out: &mut impl Write, suite: &SuiteResult) -> io::Result<()> {
    let policies = suite.policies();
    let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
    for case in &suite.cases {
        let column = policies.iter().position(|policy| *policy == case.policy).unwrap_or(0);
        let at = rows.iter().position(|(guest, _)| *guest == case.guest).unwrap_or_else(|| {
            rows.push((&case.guest, vec![String::new(); policies.len()]));
            rows.len() - 1
        });
        rows[at].1[column] = cell(case);
    }
    let widths: Vec<usize> = (0..policies.len())
        .map(|column| {
            let cells = rows.iter().map(|(_, cells)| cells[column].len());
            cells.max().unwrap_or(0).max((column + 1).to_string().len())
        })
        .collect();
    let name_width = rows.iter().map(|(guest, _)| guest.len()).max().unwrap_or(0);
    write!(out, "{:name_width$}", "")?;
    for (column, width) in (1..).zip(&widths) {
        write!(out, " {column:>width$}")?;
    }
    writeln!(out)?;
    for (guest, cells) in &rows {
        write!(out, "{guest:<name_width$}")?;
        for (cell, width) in cells.iter().zip(&widths) {
            write!(out, " {cell:>width$}")?;
        }
        writeln!(out)?;
    }
    legend(out, suite, &policies)?;
    unexpected(out, suite)?;
    summary(out, suite)
}

/// The cell of a case: a letter for each check that failed, and `!` if that was not expected.
fn cell(case: &CaseResult) -> String {
    let mut cell: String = match case.verdict() {
        Verdict::Pass => ".".to_owned(),
        Verdict::NotExercised => "-".to_owned(),
        Verdict::Error => "E".to_owned(),
        Verdict::Fail => case.failed_checks().iter().map(|check| check.info().letter).collect(),
    };
    if !case.as_expected() {
        cell.push('!');
    }
    cell
}

fn legend(out: &mut impl Write, suite: &SuiteResult, policies: &[&str]) -> io::Result<()> {
    writeln!(out)?;
    let width = policies.iter().map(|policy| policy.len()).max().unwrap_or(0) + 5;
    let columns = (100 / width).max(1);
    let lines = policies.len().div_ceil(columns);
    for line in 0..lines {
        let row = (0..columns).filter_map(|column| {
            let at = column * lines + line;
            policies.get(at).map(|policy| format!("{:>3} {policy:<1$}", at + 1, width - 4))
        });
        writeln!(out, "{}", row.collect::<String>().trim_end())?;
    }
    writeln!(out)?;
    let failed: Vec<Check> = suite.cases.iter().flat_map(CaseResult::failed_checks).collect();
    let mut meanings = vec![". pass".to_owned()];
    if suite.count(Verdict::NotExercised) > 0 {
        meanings.push("- not exercised".to_owned());
    }
    if suite.count(Verdict::Error) > 0 {
        meanings.push("E could not be run".to_owned());
    }
    let seen = CHECKS.iter().filter(|info| failed.contains(&info.check));
    meanings.extend(seen.map(|info| format!("{} {}", info.letter, info.name)));
    if suite.unexpected() > 0 {
        meanings.push("! not as expected".to_owned());
    }
    let mut line = String::new();
    for meaning in meanings {
        if line.len() + meaning.len() > 98 {
            writeln!(out, "{}", line.trim_end())?;
            line.clear();
        }
        line.push_str(&meaning);
        line.push_str("   ");
    }
    writeln!(out, "{}", line.trim_end())
}

fn unexpected(out: &mut impl Write, suite: &SuiteResult) -> io::Result<()> {
    for case in suite.cases.iter().filter(|case| !case.as_expected()) {
        writeln!(
            out,
            "not as expected: {} under {}: expected {}, found {}",
            case.guest,
            case.policy,
            names(&case.expected),
            found(case)
        )?;
    }
    Ok(())
}

/// What happened in a case, in words.
pub(super) fn found(case: &CaseResult) -> String {
    match (&case.report, &case.error) {
        (Err(error), _) | (_, Some(error)) => format!("an error: {error}"),
        (Ok(report), None) => match report.verdict {
            Verdict::NotExercised => "not exercised".to_owned(),
            _ => names(&report.failed_checks()),
        },
    }
}

/// Checks by name, or `pass` for none.
pub(super) fn names(checks: &[Check]) -> String {
    if checks.is_empty() {
        return "pass".to_owned();
    }
    checks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn summary(out: &mut impl Write, suite: &SuiteResult) -> io::Result<()> {
    write!(
        out,
        "{} cases in {}: {} pass, {} fail, {} not exercised",
        suite.cases.len(),
        show_nanos(suite.wall_ns),
        suite.count(Verdict::Pass),
        suite.count(Verdict::Fail),
        suite.count(Verdict::NotExercised),
    )?;
    let errors = suite.count(Verdict::Error);
    if errors > 0 {
        write!(out, ", {errors} could not be run")?;
    }
    match suite.unexpected() {
        0 => write!(out, "; all as expected")?,
        n => write!(out, "; {n} not as expected")?,
    }
    if suite.left_out > 0 {
        let why = if suite.unfinished { "unfinished" } else { "interrupted" };
        write!(out, "; {why} with {} cases to go", suite.left_out)?;
    }
    writeln!(out)
}
