//! The trace: one line of JSON a MapGPA call, in the order in which they were answered.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use mapgpa_abi::Direction;

use crate::engine::Call;

/// How long a line may stay in memory: a crash of the VMM loses no more than this.
const FLUSH_EVERY: Duration = Duration::from_millis(50);

/// A trace being written.
#[derive(Debug)]
pub struct Trace {
    file: BufWriter<File>,
    flushed: Instant,
    error: Option<io::Error>,
}

impl Trace {
    /// Creates the file `path`, or empties it.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = BufWriter::new(File::create(path)?);
        Ok(Self { file, flushed: Instant::now(), error: None })
    }

    /// Writes the line of `call`. The first error is kept for [`Trace::close`].
    pub fn write(&mut self, call: &Call) {
        if self.error.is_none() {
            self.error = self.line(call).err();
        }
    }

    fn line(&mut self, call: &Call) -> io::Result<()> {
        let Call { vcpu, raw_gpa, size, converted, status, at_ns, .. } = call;
        let to = match call.to {
            Direction::ToShared => "shared",
            Direction::ToPrivate => "private",
        };
        write!(
            self.file,
            "{{\"call\":{},\"vcpu\":{vcpu},\"gpa\":\"{raw_gpa:#x}\",\"size\":{size},\
             \"to\":\"{to}\",\"converted_pages\":{converted},\"status\":\"{status:#x}\",\"r11\":",
            call.call
        )?;
        if call.r11_defined() {
            write!(self.file, "\"{:#x}\"", call.r11)?;
        } else {
            write!(self.file, "null")?;
        }
        writeln!(self.file, ",\"t_ns\":{at_ns}}}")?;
        if self.flushed.elapsed() >= FLUSH_EVERY {
            self.file.flush()?;
            self.flushed = Instant::now();
        }
        Ok(())
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// A line could not be written.
    pub fn close(mut self) -> io::Result<()> {
        match self.error.take() {
            Some(error) => Err(error),
            None => self.file.flush(),
        }
    }
}
