//! Report files that the user names: tried before anything runs, and never seen half written.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::CliError;

/// A report file that could be written before the runs, so that an unwritable one costs none.
pub(super) struct Output<'a> {
    option: &'static str,
    path: &'a Path,
    way: Way,
}

/// How a file is written.
enum Way {
    /// A new file takes the place of the one with this name, if there is one, when it is complete: a
    /// VMM that is killed leaves the old one, or nothing.
    Replace(PathBuf),
    /// A pipe, a device, or a file in a directory that takes no new one.
    Through(File),
}

impl<'a> Output<'a> {
    /// Tries whether the file that `option` names, if it names one, can be written; what is there
    /// already stays until [`Output::write`].
    pub(super) fn create(
        option: &'static str,
        path: Option<&'a Path>,
    ) -> Result<Option<Self>, CliError> {
        let Some(path) = path else { return Ok(None) };
        match way(path) {
            Ok(way) => Ok(Some(Self { option, path, way })),
            Err(source) => Err(write_error(option, path, source)),
        }
    }

    /// Writes what there is of it while the command runs. Where a reader would take that for all of it, and
    /// where it cannot be written, nothing happens: [`Output::write`] comes.
    pub(super) fn keep(&self, body: impl FnOnce(&mut io::BufWriter<&File>) -> io::Result<()>) {
        if let Way::Replace(path) = &self.way {
            let _ = replace(path, body);
        }
    }

    /// Writes it.
    pub(super) fn write(
        self,
        body: impl FnOnce(&mut io::BufWriter<&File>) -> io::Result<()>,
    ) -> Result<(), CliError> {
        let written = match &self.way {
            Way::Through(file) => through(file, body),
            Way::Replace(path) => replace(path, body),
        };
        written.map_err(|source| write_error(self.option, self.path, source))
    }
}

fn way(path: &Path) -> io::Result<Way> {
    let there = match OpenOptions::new().write(true).open(path) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let Some(file) = there else {
        new_file(path)?;
        return Ok(Way::Replace(path.to_owned()));
    };
    // What a link points to is replaced, not the link.
    let path = path.canonicalize()?;
    let regular = file.metadata()?.is_file();
    Ok(if regular && new_file(&path).is_ok() { Way::Replace(path) } else { Way::Through(file) })
}

/// A file without a name of the user's, beside `path`; it goes unless it takes that name.
fn new_file(path: &Path) -> io::Result<NamedTempFile> {
    if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(ErrorKind::IsADirectory.into());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    tempfile::Builder::new()
        .prefix(".mapgpa-")
        // As any new file, by the umask.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder.unwrap_or(Path::new(".")))
        .map_err(without_name)
}

/// The host's error alone: the name of the new file is in it otherwise, which nobody knows.
fn without_name(error: io::Error) -> io::Error {
    let cause = error.get_ref().and_then(|named| named.source()?.downcast_ref::<io::Error>());
    cause.and_then(io::Error::raw_os_error).map_or(error, io::Error::from_raw_os_error)
}

/// Writes the file at `path` in one step.
pub(super) fn replace(
    path: &Path,
    body: impl FnOnce(&mut io::BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let file = new_file(path)?;
    if let Ok(metadata) = std::fs::metadata(path) {
        file.as_file().set_permissions(metadata.permissions())?;
    }
    written(file.as_file(), body)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn through(
    file: &File,
    body: impl FnOnce(&mut io::BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    // A pipe or a device has no length to cut.
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    written(file, body)
}

fn written(
    file: &File,
    body: impl FnOnce(&mut io::BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let mut out = io::BufWriter::new(file);
    body(&mut out)?;
    out.flush()
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

/// Says that the report in the file `path` is not all of it.
pub(super) fn unfinished(path: &str) {
    complain(&format!("mapgpa: {path}: unfinished: its run was killed, or goes on"));
}
