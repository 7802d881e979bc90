//! The command line: arguments in, cases run, reports and an exit code out.

mod args;
mod bundle;
mod commands;
mod compare;
mod firmware;
mod fuzz;
mod fuzz_args;
mod fuzz_watch;
mod keep;
mod linux;
mod lists;
mod machine_args;
mod measure_args;
mod measured;
mod merge;
mod output;
mod replay;
mod resolve;
mod shard;
mod suite;
mod suite_files;
mod sweep;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use crate::case::{CaseError, RunError};
use crate::compare::CompareError;
use crate::expect::ExpectError;
use crate::express::Inexpressible;
use crate::firmware::case::FirmwareCaseError;
use crate::fuzz::FuzzError;
use crate::linux::case::LinuxError;
use crate::memory::MemoryError;
use crate::merge::MergeError;
use crate::one_line;
use crate::policy::PolicyError;
use crate::replay::ReplayError;
use args::{Cli, Command};

/// What ends a command without a result, and its exit code.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// No guest has the name, and no file.
    #[error("no guest is named \"{0}\", nor is there such a file (`mapgpa list guests`)")]
    UnknownGuest(String),
    /// No built-in guest has the name.
    #[error("no built-in guest is named \"{0}\" (`mapgpa list guests`)")]
    UnknownBuiltIn(String),
    /// The policy is malformed.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The expectations are malformed.
    #[error(transparent)]
    Expect(#[from] ExpectError),
    /// The case is.
    #[error(transparent)]
    Case(#[from] CaseError),
    /// Two of a list are the same.
    #[error("{what} \"{name}\" is named twice")]
    Twice { what: &'static str, name: String },
    /// A file that was named cannot be read.
    #[error("{path}: cannot be read")]
    Read { path: String, source: std::io::Error },
    /// A file that was named is no report of a sweep.
    #[error("--sweep {path}: expected what `mapgpa sweep --json` writes")]
    NoSweep { path: String, source: Option<serde_json::Error> },
    /// A file that was named cannot be written.
    #[error("{option} {path}: cannot be written")]
    Write { option: &'static str, path: String, source: std::io::Error },
    /// Two options name the same file.
    #[error("{option} {path}: {other} names the same file")]
    SameFile { option: &'static str, other: &'static str, path: String },
    /// The backend is not to be had here.
    #[error("--backend {backend}: {why}")]
    Backend { backend: &'static str, why: String },
    /// A KVM cannot express the policy.
    #[error(transparent)]
    Inexpressible(#[from] Inexpressible),
    /// This host's KVM cannot express the policy.
    #[error("--backend tdx: {0}; --backend emulated expresses every policy")]
    TdxInexpressible(Inexpressible),
    /// The user's ELF cannot be run.
    #[error("{file}: cannot be run as a guest")]
    Elf { file: String, source: RunError },
    /// A run could not be done.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A kernel cannot be run as asked.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// A firmware cannot be run as asked.
    #[error(transparent)]
    Firmware(#[from] FirmwareCaseError),
    /// Options that do not go together.
    #[error("{0}")]
    Conflict(&'static str),
    /// Nothing can be measured.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// A file cannot be replayed.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// Reports that cannot be joined.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The fuzzer made a mistake.
    #[error("fuzz")]
    Fuzz(#[source] FuzzError),
    /// Stdout is gone, or a signal handler is refused.
    #[error("{0}")]
    Io(&'static str, #[source] std::io::Error),
}

impl From<MemoryError> for CliError {
    fn from(error: MemoryError) -> Self {
        Self::Run(error.into())
    }
}

impl CliError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Run(RunError::Trace { .. } | RunError::Module(_) | RunError::Firmware(_)) => 2,
            Self::Backend { .. }
            | Self::TdxInexpressible(_)
            | Self::Run(_)
            | Self::Replay(ReplayError::Run { .. }) => 3,
            Self::Io(..) | Self::Compare(_) | Self::Fuzz(_) => 4,
            _ => 2,
        }
    }
}

/// The exit code by which `git bisect run` skips a commit.
const NOT_TESTED: u8 = 125;

/// What a command found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// All is as expected.
    Expected,
    /// Violations, or a difference from what was expected.
    Violations,
    /// A run could not be done here.
    HostCannot,
    /// The user interrupted it.
    Interrupted,
}

impl From<Found> for ExitCode {
    fn from(found: Found) -> Self {
        Self::from(match found {
            Found::Expected => 0,
            Found::Violations => 1,
            Found::HostCannot => 3,
            Found::Interrupted => 130,
        })
    }
}

/// Help and version as clap prints them; what is wrong with the arguments in one line, like all that
/// is wrong.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::from(4),
            _ => ExitCode::SUCCESS,
        };
    }
    let text = error.render().to_string();
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        output::complain(text.trim_end());
        return ExitCode::from(2);
    }
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let line = lines.join(" ");
    let line = crate::printable(line.trim_start_matches("error: "));
    output::complain(&format!("mapgpa: {line}"));
    ExitCode::from(2)
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let parsed = Cli::command()
        .try_get_matches()
        .and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error),
    };
    let matches = matches.subcommand().map_or(&matches, |(_, matches)| matches);
    let bisect = matches!(&cli.command, Command::Run(args) if args.git_bisect);
    let result = crate::interrupt::install()
        .map_err(|source| CliError::Io("cannot handle signals", source))
        .and_then(|()| match cli.command {
            Command::Host { format } => commands::host(format),
            Command::List { what, format } => commands::list(what, format),
            Command::Explain { policy, range, direction, front_end, seed, calls } => {
                commands::explain(&policy, front_end.into(), range, direction, seed, calls)
            }
            Command::Run(args) => commands::run(&args),
            Command::Suite(args) => suite::suite(&args),
            Command::Compare(args) => compare::compare(&args),
            Command::Sweep(args) => sweep::sweep(&args),
            Command::Fuzz(args) => fuzz::fuzz(&args, matches),
            Command::Replay(args) => replay::replay(&args),
            Command::Merge(args) => merge::merge(&args),
        });
    match result {
        Ok(Found::HostCannot) | Err(_) if bisect => {
            if let Err(error) = result {
                eprintln!("mapgpa: {}", one_line(&error));
            }
            ExitCode::from(NOT_TESTED)
        }
        Ok(found) => found.into(),
        // Whoever read our output has closed it: that is no failure of ours to report.
        Err(CliError::Io(_, source)) if source.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            output::complain(&format!("mapgpa: {}", one_line(&error)));
            ExitCode::from(error.exit_code())
        }
    }
}
