//! Report files that the user names: opened before anything runs, written at the end.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use super::CliError;

/// A report file, opened before the runs, so that an unwritable one costs none.
pub(super) struct Output<'a> {
    option: &'static str,
    path: &'a Path,
    file: File,
    /// The file was not there before, and nothing is in it yet: it goes if it stays so.
    fresh: bool,
}

impl Drop for Output<'_> {
    fn drop(&mut self) {
        if self.fresh {
            // What cannot be removed is an empty file that stays.
            let _ = std::fs::remove_file(self.path);
        }
    }
}

impl<'a> Output<'a> {
    /// Creates the file that `option` names, if it names one; one that is there already keeps what it
    /// has until [`Output::write`].
    pub(super) fn create(
        option: &'static str,
        path: Option<&'a Path>,
    ) -> Result<Option<Self>, CliError> {
        let Some(path) = path else { return Ok(None) };
        let (fresh, opened) = match OpenOptions::new().write(true).create_new(true).open(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                (false, OpenOptions::new().write(true).open(path))
            }
            created => (true, created),
        };
        match opened {
            Ok(file) => Ok(Some(Self { option, path, file, fresh })),
            Err(source) => Err(write_error(option, path, source)),
        }
    }

    /// Writes it.
    pub(super) fn write(
        mut self,
        body: impl FnOnce(&mut io::BufWriter<&File>) -> io::Result<()>,
    ) -> Result<(), CliError> {
        self.fresh = false;
        // A pipe or a device has no length to cut.
        let regular = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        let emptied = if regular { self.file.set_len(0) } else { Ok(()) };
        let mut out = io::BufWriter::new(&self.file);
        emptied
            .and_then(|()| body(&mut out))
            .and_then(|()| out.flush())
            .map_err(|source| write_error(self.option, self.path, source))
    }
}

/// Refuses two options that name the same file.
pub(super) fn apart(options: &[(&'static str, Option<&Path>)]) -> Result<(), CliError> {
    let named = || options.iter().filter_map(|(option, path)| Some((*option, (*path)?)));
    for (at, (option, path)) in named().enumerate() {
        if let Some((other, _)) = named().take(at).find(|(_, other)| *other == path) {
            let path = path.display().to_string();
            return Err(CliError::SameFile { option, other, path });
        }
    }
    Ok(())
}

fn write_error(option: &'static str, path: &Path, source: io::Error) -> CliError {
    CliError::Write { option, path: path.display().to_string(), source }
}

/// Writes to stdout. Whoever reads it may close it: that is no failure of ours to report.
pub(super) fn stdout(
    body: impl FnOnce(&mut io::BufWriter<io::StdoutLock<'static>>) -> io::Result<()>,
) -> Result<(), CliError> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match body(&mut out).and_then(|()| out.flush()) {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::Io("stdout", source))
        }
        _ => Ok(()),
    }
}

/// Writes `value` as JSON with a line's end.
pub(super) fn json(out: &mut impl Write, value: &impl serde::Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(io::Error::from)?;
    writeln!(out)
}

/// Writes a line to stderr, which nobody may read.
pub(super) fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
