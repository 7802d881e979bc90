//! The command `merge`.

use std::io::{self, IsTerminal};

use serde::Serialize;

use super::args::Format;
use super::fuzz_args::MergeArgs;
use super::output::{self, Output};
use super::suite_files::{self, SuiteFiles};
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
    let (merged, unfinished) = join(args.files.iter().map(read).collect::<Result<_, _>>()?)?;
    let files = &args.reports;
    if args.cases.is_some() && !matches!(merged, Merged::Fuzz(_)) {
        return Err(CliError::Conflict("--cases: only a fuzz campaign has cases to write"));
    }
    let is_for_suites = files.junit.is_some() || files.ktap.is_some();
    if is_for_suites && !matches!(merged, Merged::Suite(_)) {
        return Err(CliError::Conflict("--junit, --ktap: only a suite has such a report"));
    }
    suite_files::apart(files, None)?;
    for path in unfinished {
        output::unfinished(&path);
    }
    match &merged {
        Merged::Suite(suite) => {
            SuiteFiles::open(files)?.write(suite)?;
            Ok(suite_files::found(suite))
        }
        Merged::Fuzz(report) => {
            let json = Output::create("--json", files.json.as_deref())?;
            if let Some(dir) = &args.cases {
                fuzz::write_cases(report, dir)?;
            }
            let cases = args.cases.as_ref().map(|dir| dir.display().to_string());
            write(json, files.format, report, |out| {
                fuzz_report::write(out, report, cases.as_deref())
            })?;
            Ok(match report {
                _ if report.error.is_some() => Found::HostCannot,
                _ if report.interrupted || report.unfinished => Found::Interrupted,
                _ if report.findings.is_empty() => Found::Expected,
                _ => Found::Violations,
            })
        }
        Merged::Sweep(report) => {
            let json = Output::create("--json", files.json.as_deref())?;
            let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            write(json, files.format, report, |out| sweep_report::write(out, report, colour))?;
            Ok(sweep::found(report))
        }
    }
}

/// Writes `report` to the file, if there is one, and it or its text to stdout.
fn write(
    json: Option<Output<'_>>,
    format: Format,
    report: &impl Serialize,
    text: impl FnOnce(&mut io::BufWriter<io::StdoutLock<'static>>) -> io::Result<()>,
) -> Result<(), CliError> {
    if let Some(output) = json {
        output.write(|out| output::json(out, report))?;
    }
    output::stdout(|out| match format {
        Format::Json => output::json(out, report),
        Format::Text => text(out),
    })
}
