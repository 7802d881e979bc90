//! `suite --bundle`: all that a suite has found in one file, to send to others.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use flate2::Compression;
use flate2::write::GzEncoder;

use super::CliError;
use super::output::Output;
use crate::case::Case;
use crate::host;
use crate::report::{matrix, suite};
use crate::suite::SuiteResult;

/// A bundle that is being filled.
pub(super) struct Bundle<'a> {
    output: Output<'a>,
    traces: Traces,
}

/// Where the cases of a suite write their traces, until they are in the bundle.
struct Traces(PathBuf);

impl Drop for Traces {
    fn drop(&mut self) {
        // What cannot be removed is left among temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl<'a> Bundle<'a> {
    /// Opens the bundle at `path`, if there is to be one, and has each case write a trace for it.
    pub(super) fn open(
        path: Option<&'a Path>,
        cases: &mut [(usize, Case)],
    ) -> Result<Option<Self>, CliError> {
        let Some(output) = Output::create("--bundle", path)? else { return Ok(None) };
        let directory = std::env::temp_dir().join(format!("mapgpa-bundle-{}", std::process::id()));
        std::fs::create_dir(&directory).map_err(|source| CliError::Write {
            option: "--bundle",
            path: directory.display().to_string(),
            source,
        })?;
        for (number, case) in cases {
            case.trace = Some(directory.join(format!("{number:04}.jsonl")));
        }
        Ok(Some(Self { output, traces: Traces(directory) }))
    }

    /// Writes it: README, host facts, matrix, the suite's object, and the trace of each case by its
    /// number there.
    pub(super) fn write(self, result: &SuiteResult) -> Result<(), CliError> {
        let Self { output, traces } = self;
        let facts = host::look();
        output.write(|out| {
            let mut archive = Archive::new(out);
            archive.add("README.txt", readme().as_bytes())?;
            archive.add_with("host.json", |file| writeln!(file, "{:#}", facts.to_json()))?;
            archive.add_with("host.txt", |file| facts.write(file))?;
            archive.add_with("matrix.txt", |file| matrix::write(file, result))?;
            archive.add_with("suite.json", |file| suite::write(file, result))?;
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&traces.0)? {
                names.push(entry?.file_name());
            }
            names.sort_unstable();
            for name in names {
                let bytes = std::fs::read(traces.0.join(&name))?;
                archive.add(&format!("traces/{}", name.to_string_lossy()), &bytes)?;
            }
            archive.finish()
        })
    }
}

/// What a reader of the bundle wants to know first.
fn readme() -> String {
    let command: Vec<String> =
        std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    format!(
        "Made by mapgpa {} with: {}\n\n\
         host.txt, host.json  what the machine can do, and its versions\n\
         matrix.txt           guests and policies: a letter for each check that failed\n\
         suite.json           a report of each case, with its number\n\
         traces/NNNN.jsonl    the MapGPA calls of case NNNN, a line for each call and reply\n",
        env!("CARGO_PKG_VERSION"),
        command.join(" ")
    )
}

/// A compressed archive of files, all below one directory.
struct Archive<W: Write> {
    tar: tar::Builder<GzEncoder<W>>,
    time: u64,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            tar: tar::Builder::new(GzEncoder::new(out, Compression::default())),
            time: now.map_or(0, |since| since.as_secs()),
        }
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(self.time);
        self.tar.append_data(&mut header, format!("mapgpa-bundle/{name}"), bytes)
    }

    fn add_with(
        &mut self,
        name: &str,
        body: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        body(&mut bytes)?;
        self.add(name, &bytes)
    }

    fn finish(self) -> io::Result<()> {
        self.tar.into_inner()?.finish()?;
        Ok(())
    }
}
