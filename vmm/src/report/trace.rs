//! The trace: one line of JSON a MapGPA call, in the order in which they were answered. The first line
//! also has what the run was made of, so that the trace can be replayed.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use mapgpa_abi::Direction;
use serde::{Deserialize, Serialize};

use crate::case::Recipe;
use crate::engine::Call;

/// How long a line may stay in memory: a crash of the VMM loses no more than this.
const FLUSH_EVERY: Duration = Duration::from_millis(50);

/// A trace being written.
#[derive(Debug)]
pub struct Trace {
    file: BufWriter<File>,
    /// For the first line, which is yet to come.
    header: Option<Box<TraceHeader>>,
    flushed: Instant,
    error: Option<io::Error>,
}

/// The version of traces.
pub const SCHEMA: &str = "mapgpa.trace/1";

/// What the first line of a trace has more than others.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TraceHeader {
    /// [`SCHEMA`].
    pub schema: String,
    /// Version of mapgpa.
    pub mapgpa: String,
    /// What the run was made of.
    #[serde(flatten)]
    pub recipe: Recipe,
}

impl Trace {
    /// Creates the file `path`, or empties it, for a run made of `recipe`; nothing, if it cannot be
    /// replayed.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path, recipe: Option<Recipe>) -> io::Result<Self> {
        let file = BufWriter::new(File::create(path)?);
        let mapgpa = env!("CARGO_PKG_VERSION").to_owned();
        let header = recipe
            .map(|recipe| Box::new(TraceHeader { schema: SCHEMA.to_owned(), mapgpa, recipe }));
        Ok(Self { file, header, flushed: Instant::now(), error: None })
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
        write!(self.file, ",\"t_ns\":{at_ns}")?;
        if let Some(header) = self.header.take() {
            write!(self.file, ",\"run\":")?;
            serde_json::to_writer(&mut self.file, &header)?;
        }
        writeln!(self.file, "}}")?;
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
