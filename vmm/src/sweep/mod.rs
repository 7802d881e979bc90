//! Sweeping hosts and guests: which bound survives which host.
//!
//! A cell is a host (chunk size, and stall or contention) and a guest (which, its bound, how much it
//! asks for at a time). Its conversion is run on `hosted` with one seed after another, and survives if
//! the guest reports success and all pages are converted. A sample of cells is run in VMs too, and with
//! a real kernel, and has to give the same verdict and the same number of calls ([`verify`]).

mod odds;
mod report;
mod verify;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mapgpa_abi::Direction;
use mapgpa_abi::params::{BOUND_OWN, Plan};
use mapgpa_guests::{Bound, Guest};

pub use odds::{Patience, Trouble, closed_form, positions, wilson};
pub use report::{Cell, SCHEMA, SweepReport, Verified};

use crate::case::{Case, GuestSource, RunError};
use crate::engine::{Ending, Event, EventSink, Then};
use crate::interrupt;
use crate::linux::case::LinuxCase;
use crate::one_line;
use crate::policy::{Policy, PolicyError};
use crate::units::show_size;
use crate::workers;

/// The most seeds that a thread takes at a time.
const SEEDS_AT_ONCE: u64 = 8;

/// A guest of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestSpec {
    /// Which.
    pub guest: Guest,
    /// Its bound, as in the parameter page.
    pub bound: u64,
    /// The most bytes that it asks for at a time; 0: no limit.
    pub guest_chunk: u64,
}

/// A host of a sweep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostSpec {
    /// Bytes that one call converts.
    pub chunk: u64,
    /// What each position meets.
    pub trouble: Trouble,
}

/// What is swept.
#[derive(Debug, Clone)]
pub struct Sweep {
    /// The hosts.
    pub hosts: Vec<HostSpec>,
    /// The guests.
    pub guests: Vec<GuestSpec>,
    /// Bytes converted, to shared.
    pub range: u64,
    /// The first seed.
    pub seed: u64,
    /// Seeds of a cell in which something is drawn; 1 is enough for the others.
    pub seeds: u64,
    /// Threads.
    pub jobs: usize,
    /// Which part of the cells is run: I and N of I/N.
    pub shard: (u64, u64),
    /// When one conversion is ended at the latest.
    pub timeout: Duration,
    /// Cells that are run in VMs too, and as many with a kernel; 0: none.
    pub verify: usize,
    /// Guest-physical address width in bits.
    pub gpaw: u32,
}

/// How one conversion went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Tally {
    calls: u64,
    completed: bool,
    failed: bool,
    timed_out: bool,
}

impl Tally {
    const fn survived(&self) -> bool {
        self.completed && !self.failed
    }
}

impl EventSink for Tally {
    fn on(&mut self, event: &Event<'_>) -> Then {
        match event {
            Event::Call(_) => self.calls += 1,
            Event::Closed { ending: Ending::Completed, missing: None, .. } => self.completed = true,
            Event::Closed { .. }
            | Event::Panic { .. }
            | Event::Crash { .. }
            | Event::Exit { success: false, .. } => self.failed = true,
            Event::Timeout => (self.failed, self.timed_out) = (true, true),
            _ => {}
        }
        Then::GoOn
    }
}

/// Sums over the runs of a cell.
#[derive(Debug, Clone, Default)]
struct Sums {
    runs: u64,
    survived: u64,
    calls: u64,
    calls_survived: u64,
    timed_out: u64,
    /// The run of the sweep's first seed.
    first: Option<Tally>,
    error: Option<String>,
}

impl Sums {
    fn add(&mut self, other: Self) {
        self.first = self.first.or(other.first);
        self.runs += other.runs;
        self.survived += other.survived;
        self.calls += other.calls;
        self.calls_survived += other.calls_survived;
        self.timed_out += other.timed_out;
        self.error = self.error.take().or(other.error);
    }
}

/// What a sweep that runs has found so far.
#[derive(Debug)]
pub struct SoFar(Mutex<Found>);

#[derive(Debug)]
struct Found {
    sums: BTreeMap<usize, Sums>,
    verified: Vec<Verified>,
    not_verified: Option<String>,
    ended: bool,
    began: Instant,
    /// The last change, since then.
    wall: Duration,
    changes: u64,
}

impl SoFar {
    /// Of a sweep that begins now.
    #[must_use]
    pub fn begin() -> Self {
        Self(Mutex::new(Found {
            sums: BTreeMap::new(),
            verified: Vec::new(),
            not_verified: None,
            ended: false,
            began: Instant::now(),
            wall: Duration::ZERO,
            changes: 0,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Found)) {
        let mut found = self.lock();
        change(&mut found);
        found.wall = found.began.elapsed();
        found.changes += 1;
    }
}

impl HostSpec {
    /// The spec string of its policy.
    #[must_use]
    pub fn spec(&self) -> String {
        let chunk = show_size(self.chunk);
        match self.trouble {
            Trouble::Stall(0) => format!("chunk={chunk}"),
            Trouble::Contention(p) if p <= 0.0 => format!("chunk={chunk}"),
            Trouble::Stall(stall) => format!("chunk={chunk},stall={stall}"),
            Trouble::Contention(p) => format!("chunk={chunk},contention={p}"),
        }
    }
}

impl GuestSpec {
    /// How it retries.
    #[must_use]
    pub fn patience(&self) -> Patience {
        let info = self.guest.info();
        let bound = Bound::from_param(self.bound).or(info.own_bound);
        Patience { retries: info.retries, bound }
    }
}

impl Sweep {
    /// The cells, as cases on `hosted`, guests first.
    ///
    /// # Errors
    /// A chunk or a probability makes no policy.
    pub fn cases(&self) -> Result<Vec<Case>, PolicyError> {
        let mut cases = Vec::with_capacity(self.guests.len() * self.hosts.len());
        for guest in &self.guests {
            for host in &self.hosts {
                let policy = Policy::parse(&host.spec())?;
                cases.push(Case {
                    seed: self.seed,
                    gpaw: self.gpaw,
                    plan: Plan::One(Direction::ToShared),
                    range: self.range,
                    bound: guest.bound,
                    guest_chunk: guest.guest_chunk,
                    timeout: self.timeout,
                    ..Case::new(GuestSource::BuiltIn(guest.guest), policy)
                });
            }
        }
        Ok(cases)
    }

    /// The guest and the host of cell `at` of [`Sweep::cases`].
    fn specs(&self, at: usize) -> (GuestSpec, HostSpec) {
        (self.guests[at / self.hosts.len()], self.hosts[at % self.hosts.len()])
    }

    /// Runs `cases`, made by [`Sweep::cases`] and checked, and adds what it finds to `so_far`; `progress` is
    /// called with how many of how many parts are done. A sample is run in VMs, and with `kernel`, which the first guest models and
    /// whose first conversion is of the sweep's range.
    pub fn run(
        &self,
        cases: &[Case],
        kernel: Option<LinuxCase>,
        so_far: &SoFar,
        progress: impl Fn(usize, usize) + Sync,
    ) {
        let parts = self.parts(cases.len());
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        workers::work(self.jobs.min(parts.len()), || {
            while !interrupt::requested() {
                let part = parts.get(next.fetch_add(1, Ordering::Relaxed));
                let Some(&(at, first, count)) = part else { return };
                // A cell that hangs is not waited for again.
                let hangs = so_far.lock().sums.get(&at).is_some_and(|sums| sums.timed_out > 0);
                if !hangs {
                    let part = runs(&cases[at], first, count, self.seed);
                    so_far.change(|found| found.sums.entry(at).or_default().add(part));
                }
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, parts.len());
            }
        });
        let sums = so_far.lock().sums.clone();
        let not_verified = self.verify(cases, &sums, kernel, |verified| {
            so_far.change(|found| found.verified.push(verified));
        });
        so_far.change(|found| (found.not_verified, found.ended) = (not_verified, true));
    }

    /// What was found so far, if that is more than after `seen` changes, which is set.
    #[must_use]
    pub fn news(&self, so_far: &SoFar, seen: &mut u64) -> Option<SweepReport> {
        let changes = so_far.lock().changes;
        (std::mem::replace(seen, changes) != changes).then(|| self.report(so_far))
    }

    /// The report of what was found so far.
    #[must_use]
    pub fn report(&self, so_far: &SoFar) -> SweepReport {
        let found = so_far.lock();
        let cells = found.sums.iter().map(|(at, sums)| self.cell(*at, sums)).collect();
        SweepReport::new(self, cells, &found)
    }

    /// Cell, first seed and number of seeds of each part of the work; a cell's first part comes
    /// before its others, so that it has the first seed.
    fn parts(&self, cells: usize) -> Vec<(usize, u64, u64)> {
        let mut parts = Vec::new();
        let (index, count) = self.shard;
        for at in (0..cells).filter(|at| *at as u64 % count == index - 1) {
            let drawn = matches!(self.specs(at).1.trouble, Trouble::Contention(_));
            let seeds = if drawn { self.seeds } else { 1 };
            let mut first = 0;
            while first < seeds {
                let count = SEEDS_AT_ONCE.min(seeds - first);
                parts.push((at, self.seed.wrapping_add(first), count));
                first += count;
            }
        }
        parts
    }

    fn cell(&self, at: usize, sums: &Sums) -> Cell {
        let (guest, host) = self.specs(at);
        let patience = guest.patience();
        let whole = if guest.guest_chunk == 0 { self.range } else { guest.guest_chunk };
        let n = positions(self.range, guest.guest_chunk, host.chunk);
        let pieces = self.range.div_ceil(whole);
        let closed_form = closed_form(host.trouble, patience, n, pieces);
        let interval = match host.trouble {
            // Nothing is drawn: one run says all.
            Trouble::Stall(_) if sums.runs > 0 => {
                let exact = f64::from(u8::from(sums.survived > 0));
                (exact, exact)
            }
            _ => wilson(sums.survived, sums.runs),
        };
        Cell {
            number: at as u64 + 1,
            guest: guest.guest.info().name.to_owned(),
            bound: (patience.bound != u64::MAX && patience.retries).then_some(patience.bound),
            own_bound: guest.bound == BOUND_OWN,
            retries: patience.retries,
            guest_chunk: (guest.guest_chunk != 0).then_some(guest.guest_chunk),
            policy: host.spec(),
            chunk: host.chunk,
            stall: match host.trouble {
                Trouble::Stall(stall) => Some(stall),
                Trouble::Contention(_) => None,
            },
            contention: match host.trouble {
                Trouble::Stall(_) => None,
                Trouble::Contention(p) => Some(p),
            },
            positions: n,
            runs: sums.runs,
            survived: sums.survived,
            low: interval.0,
            high: interval.1,
            closed_form,
            calls: mean(sums.calls, sums.runs),
            calls_survived: mean(sums.calls_survived, sums.survived),
            timed_out: sums.timed_out,
            error: sums.error.clone(),
        }
    }
}

/// Runs of a cell with `count` seeds from `first` on; that of seed `kept` is kept.
fn runs(case: &Case, first: u64, count: u64, kept: u64) -> Sums {
    let mut sums = Sums::default();
    for seed in (0..count).map(|n| first.wrapping_add(n)) {
        if interrupt::requested() {
            break;
        }
        match one(&Case { seed, ..case.clone() }) {
            Ok(tally) => {
                if seed == kept {
                    sums.first = Some(tally);
                }
                let survived = u64::from(tally.survived());
                sums.runs += 1;
                sums.survived += survived;
                sums.calls += tally.calls;
                sums.calls_survived += tally.calls * survived;
                if tally.timed_out {
                    sums.timed_out += 1;
                    break;
                }
            }
            Err(error) => sums.error = Some(one_line(&error)),
        }
    }
    sums
}

/// One conversion.
fn one(case: &Case) -> Result<Tally, RunError> {
    let end = case.run_into(Tally::default(), 0)?;
    match end.error {
        Some(error) => Err(error),
        None => Ok(end.sink),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a mean of counts")]
fn mean(sum: u64, count: u64) -> Option<f64> {
    (count > 0).then(|| sum as f64 / count as f64)
}
