//! Replay: a case is run again and held against how it went; a trace's decisions are given again, and
//! the guest is followed call by call.

mod case_file;
mod trace_file;

use std::path::Path;
use std::time::Duration;

use mapgpa_abi::params::{BOUND_NONE, BOUND_OWN, Layout};
use mapgpa_guests::Guest;

pub use case_file::{CASE_SCHEMA, CaseFile, Expected, write_case};
pub use trace_file::{TraceFile, TraceReplayed};

use crate::case::machine::TIMEOUT;
use crate::case::{
    Backend, Case, CaseError, GuestSource, Recipe, RunError, RunForm, layout_by_name, plan_by_name,
    until_by_name,
};
use crate::engine::FrontEnd;
use crate::fuzz::Target;
use crate::judge::Rules;
use crate::linux::case::{LinuxCase, LinuxError, MEMORY, Options};
use crate::memory::MemoryModel;
use crate::policy::{Policy, TomlError, rules};
use crate::units;

/// What cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file cannot be read.
    #[error("{path}: cannot be read")]
    Read {
        /// The file.
        path: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// It is no case and no trace.
    #[error("{path}: expected a case (*.toml) or a trace (*.jsonl)")]
    Kind {
        /// The file.
        path: String,
    },
    /// It has not the form of one.
    #[error("{path}: {}", message.trim_end().replace('\n', " | "))]
    Form {
        /// The file.
        path: String,
        /// Where and what.
        message: String,
    },
    /// The schema is another one.
    #[error("{path}: schema is \"{found}\", expected \"{expected}\"")]
    Schema {
        /// The file.
        path: String,
        /// What was there.
        found: String,
        /// What would have been right.
        expected: &'static str,
    },
    /// A trace that does not say what it is one of.
    #[error(
        "{path}: its first line has no \"run\", which says what was run: it is a firmware's, which \
         cannot be replayed, or older than \"{}\"; then write it again with --trace",
        crate::report::TRACE_SCHEMA
    )]
    OldTrace {
        /// The file.
        path: String,
    },
    /// A trace without a line.
    #[error("{path}: expected a line for each MapGPA call, found none")]
    EmptyTrace {
        /// The file.
        path: String,
    },
    /// A value that is none of its kind.
    #[error("{path}: {key} = \"{found}\": expected {expected}")]
    Value {
        /// The file.
        path: String,
        /// Its key.
        key: &'static str,
        /// What was there.
        found: String,
        /// What would have been right.
        expected: String,
    },
    /// The rules are malformed.
    #[error(transparent)]
    Rules(#[from] TomlError),
    /// A file that it names cannot be read.
    #[error("{path}: guest {guest}: cannot be read")]
    Guest {
        /// The file.
        path: String,
        /// The guest's file.
        guest: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// The guest cannot be run so.
    #[error("{path}")]
    Case {
        /// The file.
        path: String,
        /// What is wrong.
        source: CaseError,
    },
    /// The kernel cannot be run so.
    #[error("{path}")]
    Linux {
        /// The file.
        path: String,
        /// What is wrong.
        source: LinuxError,
    },
    /// A decision that cannot be given again.
    #[error("{path}: a trace of front-end {front_end}: its decisions are KVM's, not a policy's")]
    FrontEnd {
        /// The file.
        path: String,
        /// The front-end.
        front_end: String,
    },
    /// The run could not be done.
    #[error("{path}: cannot be run")]
    Run {
        /// The file.
        path: String,
        /// Why not.
        source: RunError,
    },
}

/// Makes what `recipe` says, for a run on `backend` if that is not the recorded one.
///
/// # Errors
/// The recipe of the file `path` is of no run.
fn target(path: &str, recipe: &Recipe, backend: Option<Backend>) -> Result<Target, ReplayError> {
    let run = &recipe.run;
    let value = |key, found: &str, expected: &str| ReplayError::Value {
        path: path.to_owned(),
        key,
        found: found.to_owned(),
        expected: expected.to_owned(),
    };
    let size = |key, text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => units::size(text).map(Some).map_err(|error| value(key, text, error.expected)),
    };
    let policy = Policy { name: path.to_owned(), rules: rules(path, &recipe.rule)?, script: None };
    if let Some(front_end) = run.front_end.as_ref().filter(|name| *name != "direct") {
        return Err(ReplayError::FrontEnd { path: path.to_owned(), front_end: front_end.clone() });
    }
    if let Some(form) = &recipe.kernel {
        let until = form.until.as_deref().map(|name| {
            until_by_name(name)
                .ok_or_else(|| value("until", name, "userspace, conversions or exit"))
        });
        let options = Options {
            kernel: recipe.guest.clone().into(),
            initrd: form.initrd.clone(),
            cmdline: form.cmdline.clone(),
            swiotlb: size("swiotlb", &form.swiotlb)?,
            modules: form.module.clone(),
            kexec: form.kexec,
            memory: size("memory", &run.memory)?.unwrap_or(MEMORY),
            until: until.transpose()?,
        };
        let linux = |source| ReplayError::Linux { path: path.to_owned(), source };
        let mut case = LinuxCase::load(&options, policy).map_err(linux)?;
        case.run.seed = run.seed;
        case.run.gpaw = run.gpaw;
        case.run.vcpus = run.vcpus.unwrap_or(1);
        case.run.rules = limits(run);
        case.run.timeout = timeout(path, run)?.unwrap_or(TIMEOUT);
        case.check().map_err(linux)?;
        return Ok(Target::Kernel(Box::new(case)));
    }
    let recorded = [Backend::Hosted, Backend::Emulated]
        .into_iter()
        .find(|backend| backend.name() == run.backend);
    let backend =
        backend.or(recorded).ok_or_else(|| value("backend", &run.backend, "hosted or emulated"))?;
    let memory_model = match run.memory_model.as_deref() {
        // Elsewhere there is no memory that could be made so.
        Some(name) if backend == Backend::Emulated => MemoryModel::by_name(name)
            .ok_or_else(|| value("memory-model", name, "alias or guest-memfd"))?,
        _ => MemoryModel::default(),
    };
    let plan = run.direction.as_deref().unwrap_or("round-trip");
    let layout = run.layout.as_deref().unwrap_or("contiguous");
    let default = Case::new(guest(path, &recipe.guest)?, policy);
    let case = Case {
        backend,
        front_end: FrontEnd::Direct,
        seed: run.seed,
        gpaw: run.gpaw,
        plan: plan_by_name(plan)
            .ok_or_else(|| value("direction", plan, "to-shared, to-private or round-trip"))?,
        layout: layout_by_name(layout)
            .filter(|layout| *layout != Layout::Overlapping)
            .ok_or_else(|| value("layout", layout, "contiguous or scattered"))?,
        range: match &run.range {
            None => default.range,
            Some(text) => {
                units::page_size(text).map_err(|error| value("range", text, error.expected))?
            }
        },
        memory: size("memory", &run.memory)?,
        memory_model,
        bound: match run.bound.as_deref() {
            None => BOUND_OWN,
            Some("none") => BOUND_NONE,
            Some(text) => {
                units::number(text).ok_or_else(|| value("bound", text, "a number, or none"))?
            }
        },
        guest_chunk: size("guest-chunk", &run.guest_chunk)?.unwrap_or(0),
        vcpus: run.vcpus.unwrap_or(1),
        timeout: timeout(path, run)?.unwrap_or(default.timeout),
        rules: limits(run),
        ..default
    };
    match case.check() {
        // A case may be about a policy that has nothing to do.
        Ok(()) | Err(CaseError::CannotApply { .. }) => Ok(Target::Test(Box::new(case))),
        Err(source) => Err(ReplayError::Case { path: path.to_owned(), source }),
    }
}

fn limits(run: &RunForm) -> Rules {
    let default = Rules::default();
    Rules {
        max_no_progress: run.max_no_progress.unwrap_or(default.max_no_progress),
        max_calls: run.max_calls.unwrap_or(default.max_calls),
        stop: false,
    }
}

fn timeout(path: &str, run: &RunForm) -> Result<Option<Duration>, ReplayError> {
    let Some(text) = &run.timeout else { return Ok(None) };
    units::time_limit(text).map(Some).map_err(|error| ReplayError::Value {
        path: path.to_owned(),
        key: "timeout",
        found: text.clone(),
        expected: error.expected.to_owned(),
    })
}

fn guest(path: &str, name: &str) -> Result<GuestSource, ReplayError> {
    if let Some(guest) = Guest::by_name(name) {
        return Ok(GuestSource::BuiltIn(guest));
    }
    let failed =
        |source| ReplayError::Guest { path: path.to_owned(), guest: name.to_owned(), source };
    GuestSource::of_file(Path::new(name)).map_err(failed)
}
