//! The trace: one line of JSON a MapGPA call, in the order in which they were answered. The first line
//! also has what the run was made of, so that the trace can be replayed.
//!
//! Lines are kept for a moment and written whole, many by one system call, so that the trace costs a call
//! next to nothing and a VMM that is killed leaves lines that can be read, all but the last few.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use mapgpa_abi::Direction;
use serde::{Deserialize, Serialize};

use crate::case::Recipe;
use crate::engine::Call;

/// How old a line may become before it is written, while calls come or a backend ticks, which it does
/// every 50 ms: a VMM that is killed loses no more than the last 100 ms.
const FLUSH_EVERY: Duration = Duration::from_millis(40);
/// Bytes of lines at which they are written at once.
const LINES_MAX: usize = 64 << 10;

/// A trace being written.
#[derive(Debug)]
pub struct Trace {
    file: File,
    lines: Vec<u8>,
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
        let file = File::create(path)?;
        let mapgpa = env!("CARGO_PKG_VERSION").to_owned();
        let header = recipe
            .map(|recipe| Box::new(TraceHeader { schema: SCHEMA.to_owned(), mapgpa, recipe }));
        Ok(Self { file, lines: Vec::new(), header, flushed: Instant::now(), error: None })
    }

    /// Writes the line of `call`. The first error is kept for [`Trace::close`].
    pub fn write(&mut self, call: &Call) {
        if self.error.is_some() {
            return;
        }
        self.error = self.line(call).err();
        if self.lines.len() >= LINES_MAX {
            self.flush();
        } else {
            self.tick();
        }
    }

    /// Writes the lines that are due.
    pub fn tick(&mut self) {
        if !self.lines.is_empty() && self.flushed.elapsed() >= FLUSH_EVERY {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.error.is_none() {
            self.error = self.file.write_all(&self.lines).err();
        }
        self.lines.clear();
        self.flushed = Instant::now();
    }

    fn line(&mut self, call: &Call) -> io::Result<()> {
        let Call { vcpu, raw_gpa, size, converted, status, at_ns, .. } = call;
        let to = match call.to {
            Direction::ToShared => "shared",
            Direction::ToPrivate => "private",
        };
        write!(
            self.lines,
            "{{\"call\":{},\"vcpu\":{vcpu},\"gpa\":\"{raw_gpa:#x}\",\"size\":{size},\
             \"to\":\"{to}\",\"converted_pages\":{converted},\"status\":\"{status:#x}\",\"r11\":",
            call.call
        )?;
        if call.r11_defined() {
            write!(self.lines, "\"{:#x}\"", call.r11)?;
        } else {
            write!(self.lines, "null")?;
        }
        write!(self.lines, ",\"t_ns\":{at_ns}")?;
        if let Some(header) = self.header.take() {
            write!(self.lines, ",\"run\":")?;
            serde_json::to_writer(&mut self.lines, &header)?;
        }
        writeln!(self.lines, "}}")
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// A line could not be written.
    pub fn close(mut self) -> io::Result<()> {
        self.flush();
        self.error.take().map_or(Ok(()), Err)
    }
}
