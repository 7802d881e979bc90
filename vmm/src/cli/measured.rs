//! Where `compare` and `sweep` put their figures: the files that the user names, and stdout.

use std::io;

use serde::Serialize;

use super::CliError;
use super::args::Format;
use super::measure_args::ReportArgs;
use super::output::{self, Output};

/// The files, opened before the runs.
pub(super) struct Files<'a> {
    csv: Option<Output<'a>>,
    html: Option<Output<'a>>,
    json: Option<Output<'a>>,
    format: Format,
}

/// What writes one form of a report.
type Body<'a> = &'a dyn Fn(&mut dyn io::Write) -> io::Result<()>;

impl<'a> Files<'a> {
    /// Opens the files that `args` names.
    pub(super) fn open(args: &'a ReportArgs) -> Result<Self, CliError> {
        let (csv, html, json) = (args.csv.as_deref(), args.html.as_deref(), args.json.as_deref());
        output::apart(&[("--csv", csv), ("--html", html), ("--json", json)])?;
        Ok(Self {
            csv: Output::create("--csv", csv)?,
            html: Output::create("--html", html)?,
            json: Output::create("--json", json)?,
            format: args.format,
        })
    }

    /// Writes what there is of the object while the command runs.
    pub(super) fn keep(&self, object: &impl Serialize) {
        if let Some(json) = &self.json {
            json.keep(|out| serde_json::to_writer(out, object).map_err(io::Error::from));
        }
    }

    /// Writes them, and to stdout the text or the object.
    pub(super) fn write(
        self,
        object: &impl Serialize,
        csv: Body<'_>,
        html: Body<'_>,
        text: Body<'_>,
    ) -> Result<(), CliError> {
        if let Some(output) = self.csv {
            output.write(|out| csv(out))?;
        }
        if let Some(output) = self.html {
            output.write(|out| html(out))?;
        }
        if let Some(output) = self.json {
            output.write(|out| output::json(out, object))?;
        }
        output::stdout(|out| match self.format {
            Format::Text => text(out),
            Format::Json => output::json(out, object),
        })
    }
}
