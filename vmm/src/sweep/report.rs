//! The report of a sweep: the object of `--json`, which `compare --sweep` reads.

use serde::{Deserialize, Serialize};

use super::{Found, Sweep};
use crate::report::Host;

/// The version of the sweep object.
pub const SCHEMA: &str = "mapgpa.sweep/1";

/// A host, a guest, and how its conversions went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Which of the sweep's cells, those of other shards included, from 1.
    pub number: u64,
    /// The guest's name.
    pub guest: String,
    /// Replies in a row without progress at which it gives up; null: never, or it does not retry.
    pub bound: Option<u64>,
    /// That is the guest's own bound.
    pub own_bound: bool,
    /// It follows a RETRY at all.
    pub retries: bool,
    /// The most bytes that it asks for at a time; null: no limit.
    pub guest_chunk: Option<u64>,
    /// The host's policy.
    pub policy: String,
    /// Bytes that one call converts.
    pub chunk: u64,
    /// Replies without progress at each position.
    pub stall: Option<u64>,
    /// Probability that a reply makes no progress.
    pub contention: Option<f64>,
    /// Positions of the conversion: calls that it takes without stall or contention.
    pub positions: u64,
    /// Conversions that were run.
    pub runs: u64,
    /// Those that ended with all pages converted, and the guest saying so.
    pub survived: u64,
    /// The probability to survive is at least this, with 95 % confidence (Wilson).
    pub low: f64,
    /// And at most this.
    pub high: f64,
    /// What the guest's bound alone gives: (1-p^b)^n.
    pub closed_form: f64,
    /// Mean calls of a conversion.
    pub calls: Option<f64>,
    /// Mean calls of one that survived.
    pub calls_survived: Option<f64>,
    /// Runs that hit the time-out; after one the cell is not run again.
    pub timed_out: u64,
    /// A run that could not be done.
    pub error: Option<String>,
}

impl Cell {
    /// The share that survived, 0 to 1; nothing if none was run.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a share of a few runs")]
    pub fn share(&self) -> Option<f64> {
        (self.runs > 0).then(|| self.survived as f64 / self.runs as f64)
    }

    /// Whether the measurement speaks against the closed form: that is outside the interval.
    #[must_use]
    pub fn contradicts(&self) -> bool {
        // Where a billionth is lost on the way to 1 nothing is contradicted.
        self.runs > 0 && !(self.low - 1e-9..=self.high + 1e-9).contains(&self.closed_form)
    }
}

/// A cell that was run in a VM too, with one seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// The guest's name.
    pub guest: String,
    /// The file of the kernel that was run in the VM; null: the guest itself.
    pub kernel: Option<String>,
    /// The host's policy.
    pub policy: String,
    /// As in [`Cell`].
    pub bound: Option<u64>,
    /// As in [`Cell`].
    pub guest_chunk: Option<u64>,
    /// The seed.
    pub seed: u64,
    /// Whether the conversion on `hosted` survived.
    pub survived: bool,
    /// Its calls.
    pub calls: u64,
    /// Whether the one in the VM did; null if it could not be run.
    pub vm_survived: Option<bool>,
    /// Its calls.
    pub vm_calls: Option<u64>,
    /// Why it could not be run.
    pub error: Option<String>,
}

impl Verified {
    /// Whether both agree, exactly.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.vm_survived == Some(self.survived) && self.vm_calls == Some(self.calls)
    }
}

/// A sweep.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SweepReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// Bytes converted, to shared.
    pub range: u64,
    /// The first seed.
    pub seed: u64,
    /// Seeds of a cell in which something is drawn.
    pub seeds: u64,
    /// The cells, guests first.
    pub cells: Vec<Cell>,
    /// Cells that were run in VMs too.
    pub verified: Vec<Verified>,
    /// Why none was.
    pub not_verified: Option<String>,
    /// The user interrupted it: cells are missing, or have fewer runs.
    pub interrupted: bool,
    /// It had not ended when this was written: it still runs, or was killed.
    pub unfinished: bool,
    /// Nanoseconds that it took.
    pub wall_ns: u64,
    /// Version of mapgpa.
    pub mapgpa: String,
}

impl SweepReport {
    pub(super) fn new(sweep: &Sweep, cells: Vec<Cell>, found: &Found) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            range: sweep.range,
            seed: sweep.seed,
            seeds: sweep.seeds,
            cells,
            verified: found.verified.clone(),
            not_verified: found.not_verified.clone(),
            interrupted: crate::interrupt::requested(),
            unfinished: !found.ended,
            wall_ns: u64::try_from(found.wall.as_nanos()).unwrap_or(u64::MAX),
            mapgpa: Host::this().mapgpa.into_owned(),
        }
    }
}
