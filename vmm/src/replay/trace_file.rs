//! A trace as a recording: its decisions are given to the guest again, and the guest is followed until
//! it does what it did not do then.

use std::sync::Arc;

use mapgpa_abi::Direction;
use mapgpa_abi::tdcall::status;
use serde::Deserialize;

use super::{ReplayError, target};
use crate::case::{Backend, Ran};
use crate::fuzz::Target;
use crate::policy::{Policy, Said, Script};
use crate::report::{Divergence, Follow, Recorded, TRACE_SCHEMA, TraceHeader};
use crate::units;

/// A line of a trace.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LineForm {
    call: u64,
    vcpu: u32,
    gpa: String,
    size: u64,
    to: String,
    converted_pages: u64,
    status: String,
    r11: Option<String>,
    #[expect(dead_code, reason = "time is not replayed")]
    t_ns: u64,
    run: Option<serde_json::Value>,
}

/// A trace that was read.
#[derive(Debug)]
pub struct TraceFile {
    /// The version of mapgpa that wrote it.
    pub mapgpa: String,
    /// The guest's name.
    pub guest: String,
    /// Calls recorded.
    pub calls: usize,
    target: Target,
    follow: Follow,
}

/// How a replay of a trace went.
#[derive(Debug)]
pub struct TraceReplayed {
    /// The first divergence, if there is one.
    pub divergence: Option<Divergence>,
    /// The user interrupted it.
    pub interrupted: bool,
}

impl TraceFile {
    /// Reads the trace in `text`, the contents of the file `path`, to be run on `backend` if that is
    /// not the recorded one.
    ///
    /// # Errors
    /// It is none, or of another version, or what was recorded cannot be run.
    pub fn parse(path: &str, text: &str, backend: Option<Backend>) -> Result<Self, ReplayError> {
        let form = |line: usize, message: String| ReplayError::Form {
            path: path.to_owned(),
            message: format!("line {line}: {message}"),
        };
        let mut header = None;
        let mut recorded: Vec<Vec<Recorded>> = Vec::new();
        let lines = text.lines().count();
        for (number, line) in (1..).zip(text.lines()) {
            let line: LineForm = match serde_json::from_str(line) {
                Ok(line) => line,
                // Of its last line a VMM that was killed may have written a part.
                Err(_) if number > 1 && number == lines && !text.ends_with('\n') => break,
                Err(error) => return Err(form(number, error.to_string())),
            };
            if number == 1 {
                header = line.run;
            }
            let hex = |key: &str, text: &str| {
                units::hexadecimal(text).ok_or_else(|| {
                    form(number, format!("{key}: expected 0x and digits, found \"{text}\""))
                })
            };
            let vcpu = line.vcpu as usize;
            // A number that no run has would cost memory for all below it.
            if vcpu >= crate::linux::case::VCPUS_MAX.max(crate::case::VCPUS_MAX) {
                return Err(form(number, format!("vcpu: {vcpu} is more than there can be")));
            }
            if recorded.len() <= vcpu {
                recorded.resize_with(vcpu + 1, Vec::new);
            }
            let expected = recorded[vcpu].len() as u64 + 1;
            if line.call != expected {
                let message = format!("call: expected {expected}, found {}", line.call);
                return Err(form(number, message));
            }
            recorded[vcpu].push(Recorded {
                gpa: hex("gpa", &line.gpa)?,
                size: line.size,
                to: match line.to.as_str() {
                    "shared" => Direction::ToShared,
                    "private" => Direction::ToPrivate,
                    other => {
                        let message = format!("to: expected shared or private, found \"{other}\"");
                        return Err(form(number, message));
                    }
                },
                converted: line.converted_pages,
                status: hex("status", &line.status)?,
                r11: line.r11.as_deref().map(|text| hex("r11", text)).transpose()?,
            });
        }
        if recorded.is_empty() {
            return Err(ReplayError::EmptyTrace { path: path.to_owned() });
        }
        let header = header.ok_or_else(|| ReplayError::OldTrace { path: path.to_owned() })?;
        let found = header.get("schema").and_then(serde_json::Value::as_str).unwrap_or_default();
        if found != TRACE_SCHEMA {
            let (path, found) = (path.to_owned(), found.to_owned());
            return Err(ReplayError::Schema { path, found, expected: TRACE_SCHEMA });
        }
        let TraceHeader { mapgpa, recipe, .. } =
            serde_json::from_value(header).map_err(|error| form(1, error.to_string()))?;
        let mut target = target(path, &recipe, backend)?;
        let said = |call: &Recorded| Said {
            converted: call.converted,
            status: call.status,
            r11: call.r11.filter(|_| call.status == status::RETRY).unwrap_or(0),
        };
        let script = recorded.iter().map(|calls| calls.iter().map(said).collect()).collect();
        let script = Some(Arc::new(Script::new(script)));
        let policy = match &mut target {
            Target::Test(case) => &mut case.policy,
            Target::Kernel(case) => &mut case.run.policy,
        };
        *policy = Policy { script, ..std::mem::take(policy) };
        let calls = recorded.iter().map(Vec::len).sum();
        let follow = Follow::new(recorded);
        Ok(Self { mapgpa, guest: recipe.guest, calls, target, follow })
    }

    /// Runs the guest again.
    ///
    /// # Errors
    /// The run of the file `path` could not be done.
    pub fn run(&self, path: &str) -> Result<TraceReplayed, ReplayError> {
        let run = |source| ReplayError::Run { path: path.to_owned(), source };
        let Ran { interrupted, error, .. } = match &self.target {
            Target::Test(case) => case.run_followed(Some(self.follow.clone())),
            Target::Kernel(case) => case.run_followed(None, Some(self.follow.clone())),
        }
        .map_err(run)?;
        if let Some(source) = error {
            return Err(run(source));
        }
        let divergence = self.follow.divergence().filter(|_| !interrupted);
        Ok(TraceReplayed { divergence, interrupted })
    }
}
