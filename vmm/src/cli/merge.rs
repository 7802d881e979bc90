//! The command `merge`.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;

use super::args::Format;
use super::fuzz_args::MergeArgs;
use super::output::{self, Output};
use super::{CliError, Found, fuzz, sweep};
use crate::merge::{MergeError, Merged, merge as join};
use crate::report::{fuzz as fuzz_report, sweep as sweep_report};

/// `mapgpa merge`
pub(super) fn merge(args: &MergeArgs) -> Result<Found, CliError> {
    let read = |path: &std::path::PathBuf| {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Ok((name, text)),
            Err(source) => Err(MergeError::Read { path: name, source }),
        }
    };
    let merged = join(args.files.iter().map(read).collect::<Result<_, _>>()?)?;
    if args.cases.is_some() && !matches!(merged, Merged::Fuzz(_)) {
        return Err(CliError::Conflict("--cases: only a fuzz campaign has cases to write"));
    }
    let json = Output::create("--json", args.json.as_deref())?;
    if let (Some(dir), Merged::Fuzz(report)) = (&args.cases, &merged) {
        fuzz::write_cases(report, dir)?;
    }
    if let Some(output) = json {
        output.write(|out| write_json(out, &merged))?;
    }
    output::stdout(|out| match args.format {
        Format::Json => write_json(out, &merged),
        Format::Text => write_text(out, &merged, args),
    })?;
    Ok(match merged {
        Merged::Suite(suite) => found_in_suite(&suite["summary"]),
        Merged::Fuzz(report) if report.error.is_some() => Found::HostCannot,
        Merged::Fuzz(report) if report.interrupted || report.unfinished => Found::Interrupted,
        Merged::Fuzz(report) if report.findings.is_empty() => Found::Expected,
        Merged::Fuzz(_) => Found::Violations,
        Merged::Sweep(report) => sweep::found(&report),
    })
}

fn write_json(out: &mut impl Write, merged: &Merged) -> io::Result<()> {
    match merged {
        Merged::Suite(report) => output::json(out, report),
        Merged::Fuzz(report) => output::json(out, report),
        Merged::Sweep(report) => output::json(out, report),
    }
}

fn write_text(out: &mut impl Write, merged: &Merged, args: &MergeArgs) -> io::Result<()> {
    match merged {
        Merged::Suite(report) => suite(out, report),
        Merged::Fuzz(report) => {
            let cases = args.cases.as_ref().map(|dir| dir.display().to_string());
            fuzz_report::write(out, report, cases.as_deref())
        }
        Merged::Sweep(report) => {
            let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            sweep_report::write(out, report, colour)
        }
    }
}

fn number(summary: &Value, key: &str) -> u64 {
    summary[key].as_u64().unwrap_or(0)
}

/// The cases that went otherwise than expected, and the sums.
fn suite(out: &mut impl Write, report: &Value) -> io::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for case in report["cases"].as_array().into_iter().flatten() {
        if case["as_expected"] == true {
            continue;
        }
        let (guest, policy, verdict) =
            (text(&case["guest"]), text(&case["policy"]), text(&case["verdict"]));
        let expected: Vec<_> =
            case["expected"].as_array().into_iter().flatten().map(text).collect();
        let violations = case["violations"].as_array().into_iter().flatten();
        let mut found: Vec<_> = violations.map(|violation| text(&violation["check"])).collect();
        found.dedup();
        writeln!(
            out,
            "not as expected: {guest} under {policy}: {verdict}, expected [{}], found [{}]",
            expected.join(" "),
            found.join(" ")
        )?;
    }
    let summary = &report["summary"];
    let sum = |key| number(summary, key);
    writeln!(
        out,
        "{} cases: {} pass, {} fail, {} not exercised, {} error; {} not as expected",
        sum("cases"),
        sum("pass"),
        sum("fail"),
        sum("not_exercised"),
        sum("error"),
        sum("unexpected")
    )
}

fn found_in_suite(summary: &Value) -> Found {
    let sum = |key| number(summary, key);
    if sum("left_out") > 0 {
        Found::Interrupted
    } else if sum("unexpected") > sum("error") {
        Found::Violations
    } else if sum("unexpected") > 0 {
        Found::HostCannot
    } else {
        Found::Expected
    }
}
