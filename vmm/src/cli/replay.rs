//! The command `replay`.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use super::args::{BackendArg, Format};
use super::fuzz_args::ReplayArgs;
use super::output;
use super::{CliError, Found};
use crate::backend::emulated;
use crate::case::Backend;
use crate::replay::{CaseFile, ReplayError, TraceFile};
use crate::report::Divergence;

/// The version of the replay object.
const SCHEMA: &str = "mapgpa.replay/1";

/// A file that was replayed.
#[derive(Debug, Serialize)]
struct Row {
    file: String,
    kind: &'static str,
    guest: String,
    /// What it is about: the checks of a case, the number of calls of a trace.
    about: String,
    /// Version of mapgpa that wrote it.
    mapgpa: String,
    reproduced: bool,
    /// In what a case differs, a line each.
    differences: Vec<String>,
    /// Where the guest of a trace first did something else.
    divergence: Option<Divergence>,
}

#[derive(Serialize)]
struct ReplayObject<'a> {
    schema: &'static str,
    files: &'a [Row],
    reproduced: usize,
}

/// `mapgpa replay`
pub(super) fn replay(args: &ReplayArgs) -> Result<Found, CliError> {
    let backend = match args.backend {
        None => None,
        Some(BackendArg::Hosted) => Some(Backend::Hosted),
        Some(BackendArg::Auto | BackendArg::Emulated) => {
            emulated::default_gpaw().map_err(|error| CliError::Backend {
                backend: "emulated",
                why: crate::one_line(&error),
            })?;
            Some(Backend::Emulated)
        }
        Some(BackendArg::Tdx) => {
            let why = "a TD cannot be given recorded decisions call by call".to_owned();
            return Err(CliError::Backend { backend: "tdx", why });
        }
    };
    // All are read before the first is run: what is wrong with one costs no run.
    let files = args.files.iter().map(|path| File::read(path, backend));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let mut rows = Vec::with_capacity(files.len());
    let mut interrupted = false;
    for file in &files {
        match file.run()? {
            Some(row) => rows.push(row),
            None => {
                interrupted = true;
                break;
            }
        }
    }
    let reproduced = rows.iter().filter(|row| row.reproduced).count();
    output::stdout(|out| match args.format {
        Format::Text => rows.iter().try_for_each(|row| row.write(out)),
        Format::Json => {
            output::json(out, &ReplayObject { schema: SCHEMA, files: &rows, reproduced })
        }
    })?;
    Ok(if interrupted {
        Found::Interrupted
    } else if reproduced == rows.len() {
        Found::Expected
    } else {
        Found::Violations
    })
}

/// A file that can be replayed.
struct File {
    path: String,
    kind: Kind,
}

enum Kind {
    Case(Box<CaseFile>),
    Trace(TraceFile),
}

impl File {
    fn read(path: &Path, backend: Option<Backend>) -> Result<Self, ReplayError> {
        let name = path.display().to_string();
        let text = || {
            std::fs::read_to_string(path)
                .map_err(|source| ReplayError::Read { path: name.clone(), source })
        };
        let kind = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => Kind::Case(Box::new(CaseFile::parse(&name, &text()?, backend)?)),
            Some("jsonl") => Kind::Trace(TraceFile::parse(&name, &text()?, backend)?),
            _ => return Err(ReplayError::Kind { path: name }),
        };
        Ok(Self { path: name, kind })
    }

    /// Replays it; nothing if the user interrupted that.
    fn run(&self) -> Result<Option<Row>, ReplayError> {
        let file = self.path.clone();
        match &self.kind {
            Kind::Case(case) => {
                let run = |source| ReplayError::Run { path: self.path.clone(), source };
                let outcome = case.target.run().map_err(run)?;
                let differences = case.differences(&outcome);
                let checks = case.expected.checks.iter().map(ToString::to_string);
                let about: Vec<_> = checks.collect();
                Ok((!outcome.interrupted).then(|| Row {
                    file,
                    kind: "case",
                    guest: case.guest.clone(),
                    about: about.join(" "),
                    mapgpa: case.mapgpa.clone(),
                    reproduced: differences.is_empty(),
                    differences,
                    divergence: None,
                }))
            }
            Kind::Trace(trace) => {
                let replayed = trace.run(&self.path)?;
                Ok((!replayed.interrupted).then(|| Row {
                    file,
                    kind: "trace",
                    guest: trace.guest.clone(),
                    about: format!("{} calls", trace.calls),
                    mapgpa: trace.mapgpa.clone(),
                    reproduced: replayed.divergence.is_none(),
                    differences: Vec::new(),
                    divergence: replayed.divergence,
                }))
            }
        }
    }
}

impl Row {
    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        let word = if self.reproduced { "reproduced" } else { "DIFFERS   " };
        writeln!(out, "{word}  {}: {}, {}", self.file, self.guest, self.about)?;
        for line in &self.differences {
            writeln!(out, "  {line}")?;
        }
        if let Some(Divergence { vcpu, call, field, recorded, found }) = &self.divergence {
            let at = format!("call {call} of vCPU {vcpu}");
            match *field {
                "call" => writeln!(out, "  {at}: recorded {recorded}, found {found}")?,
                field => writeln!(out, "  {at}: {field}: recorded {recorded}, found {found}")?,
            }
        }
        Ok(())
    }
}
