//! Where a suite's results go, run here or joined of shards: the files that the user names, and stdout.

use std::io;
use std::path::Path;

use super::args::{Format, SuiteFilesArgs};
use super::output::{self, Output};
use super::{CliError, Found};
use crate::report::{Verdict, ci, matrix, suite as object};
use crate::suite::SuiteResult;

/// The files, tried before anything runs.
pub(super) struct SuiteFiles<'a> {
    junit: Option<Output<'a>>,
    ktap: Option<Output<'a>>,
    /// Written while the suite runs, too.
    pub(super) json: Option<Output<'a>>,
    format: Format,
}

impl<'a> SuiteFiles<'a> {
    /// Opens the files that `args` names.
    pub(super) fn open(args: &'a SuiteFilesArgs) -> Result<Self, CliError> {
        Ok(Self {
            junit: Output::create("--junit", args.junit.as_deref())?,
            ktap: Output::create("--ktap", args.ktap.as_deref())?,
            json: Output::create("--json", args.json.as_deref())?,
            format: args.format,
        })
    }

    /// Writes them, and to stdout the matrix or the object.
    pub(super) fn write(self, result: &SuiteResult) -> Result<(), CliError> {
        if let Some(output) = self.junit {
            output.write(|out| ci::junit(out, result).map_err(io::Error::other))?;
        }
        if let Some(output) = self.ktap {
            output.write(|out| ci::ktap(out, result))?;
        }
        if let Some(output) = self.json {
            output.write(|out| object::write(out, result))?;
        }
        output::stdout(|out| match self.format {
            Format::Text => matrix::write(out, result),
            Format::Json => object::write(out, result),
        })
    }
}

/// Refuses files of `args`, or a bundle, that are the same.
pub(super) fn apart(args: &SuiteFilesArgs, bundle: Option<&Path>) -> Result<(), CliError> {
    output::apart(&[
        ("--junit", args.junit.as_deref()),
        ("--ktap", args.ktap.as_deref()),
        ("--json", args.json.as_deref()),
        ("--bundle", bundle),
    ])
}

/// What the exit code of a suite is made of.
pub(super) fn found(result: &SuiteResult) -> Found {
    if result.left_out > 0 || result.unfinished {
        Found::Interrupted
    } else if result.unexpected() > result.count(Verdict::Error) {
        Found::Violations
    } else if result.unexpected() > 0 {
        Found::HostCannot
    } else {
        Found::Expected
    }
}
