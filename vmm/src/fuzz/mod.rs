//! The fuzzer: policies of a class made from seeds, run, and what fails made small.
//!
//! A seed stands for a case, whoever runs it: workers take blocks of seeds in order, and of each check
//! that fails the lowest seed counts. So the findings are the same whatever the number of workers, and
//! shards can be joined. With a time limit the seeds that were run are the first so many.

mod generate;
mod report;
mod shrink;
mod target;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use generate::Fixed;
pub use report::{FindingRow, FuzzReport, SCHEMA};
pub use target::{Outcome, Target};

use crate::case::{Backend, RunError};
use crate::interrupt;
use crate::judge::{Check, Class};
use crate::workers;

/// Seeds that a worker takes at a time on `hosted`.
const BLOCK: u64 = 256;

/// What ends a campaign early.
#[derive(Debug, thiserror::Error)]
pub enum FuzzError {
    /// A run could not be done.
    #[error("seed {seed}")]
    Run {
        /// Its seed.
        seed: u64,
        /// Why not.
        source: RunError,
    },
    /// A generated policy did what its class forbids: a mistake of the fuzzer, not of the guest.
    #[error("seed {seed}: a {asked:?} policy was asked for, and the replies were {found:?}")]
    Class {
        /// Its seed.
        seed: u64,
        /// What was asked for.
        asked: Class,
        /// What the judge says.
        found: Class,
    },
}

/// A campaign to be run.
#[derive(Debug, Clone)]
pub struct Fuzz {
    /// The guest, its backend and limits; rules, range and the like are made from seeds.
    pub target: Target,
    /// The class of the policies.
    pub class: Class,
    /// What is not to be drawn.
    pub fixed: Fixed,
    /// The first seed.
    pub seed: u64,
    /// How many seeds, all shards together.
    pub seeds: u64,
    /// Which part of them is run here: I and N of I/N.
    pub shard: (u64, u64),
    /// Threads.
    pub jobs: usize,
    /// No seed is begun after this time.
    pub time: Option<Duration>,
    /// Ends with the lowest seed that fails.
    pub stop: bool,
    /// Runs that making a finding small may take.
    pub shrink_runs: u64,
}

/// A check that failed.
#[derive(Debug)]
pub struct Finding {
    /// Which.
    pub check: Check,
    /// The lowest seed that fails it.
    pub seed: u64,
    /// How many seeds fail it.
    pub count: u64,
    /// Rules of that seed's policy.
    pub rules: usize,
    /// The small case.
    pub target: Target,
    /// How it fails.
    pub outcome: Outcome,
}

/// What a campaign found.
#[derive(Debug)]
pub struct Campaign {
    /// Seeds that were run here.
    pub ran: u64,
    /// Of those, whose replies really were of the class.
    pub reached: u64,
    /// MapGPA calls.
    pub requests: u64,
    /// Time of the search, without making findings small.
    pub search: Duration,
    /// One of each check that failed, in order of their list.
    pub findings: Vec<Finding>,
    /// The user interrupted it, or the time limit did: seeds are left out.
    pub left_out: u64,
    /// It was the user.
    pub interrupted: bool,
    /// What ended it early.
    pub error: Option<FuzzError>,
}

/// How far a campaign is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Seeds run.
    pub ran: u64,
    /// MapGPA calls.
    pub requests: u64,
    /// Checks found to fail.
    pub found: usize,
}

/// What the workers share.
#[derive(Default)]
struct Shared {
    /// The next block.
    next: AtomicU64,
    /// The lowest failing index, where the campaign ends with that.
    stop_at: AtomicU64,
    over: AtomicBool,
    sums: Mutex<Sums>,
}

#[derive(Default)]
struct Sums {
    ran: u64,
    reached: u64,
    requests: u64,
    /// Lowest seed, and number of seeds, by check.
    found: BTreeMap<Check, (u64, u64)>,
    error: Option<FuzzError>,
}

impl Sums {
    fn add(&mut self, other: Self) {
        self.ran += other.ran;
        self.reached += other.reached;
        self.requests += other.requests;
        for (check, (seed, count)) in other.found {
            let entry = self.found.entry(check).or_insert((seed, 0));
            *entry = (entry.0.min(seed), entry.1 + count);
        }
        // Of several errors that of the lowest seed, as with one worker.
        let seed_of = |error: &FuzzError| match error {
            FuzzError::Run { seed, .. } | FuzzError::Class { seed, .. } => *seed,
        };
        if let Some(error) = other.error
            && self.error.as_ref().is_none_or(|first| seed_of(&error) < seed_of(first))
        {
            self.error = Some(error);
        }
    }
}

impl Fuzz {
    /// The `index`-th seed of this shard.
    const fn seed_at(&self, index: u64) -> u64 {
        self.seed.wrapping_add(index * self.shard.1 + (self.shard.0 - 1))
    }

    /// Seeds of this shard.
    #[must_use]
    pub const fn seeds_here(&self) -> u64 {
        let (index, count) = self.shard;
        (self.seeds + count - index) / count
    }

    /// Makes the case of a seed out of `target`, a clone of this campaign's.
    pub fn make(&self, seed: u64, target: &mut Target) {
        match target {
            Target::Test(case) => generate::generate(seed, self.class, &self.fixed, case),
            Target::Kernel(case) => {
                let run = &mut case.run;
                run.seed = seed;
                generate::generate_rules(seed, self.class, run.vcpus, &mut run.policy.rules);
            }
        }
    }

    /// Runs it; `progress` is called now and then, from any thread.
    pub fn run(&self, progress: impl Fn(Progress) + Sync) -> Campaign {
        let began = Instant::now();
        let shared = Shared { stop_at: u64::MAX.into(), ..Shared::default() };
        workers::work(self.jobs, || self.work(&shared, began, &progress));
        let search = began.elapsed();
        let mut sums = shared.sums.into_inner().unwrap_or_else(PoisonError::into_inner);
        let stop_at = shared.stop_at.into_inner();
        if self.stop && stop_at != u64::MAX {
            // Others may have run further; what counts is the lowest.
            let seed = self.seed_at(stop_at);
            sums.found.retain(|_, found| found.0 == seed);
            sums.found.values_mut().for_each(|found| found.1 = 1);
            sums.ran = stop_at + 1;
        }
        let mut campaign = Campaign {
            ran: sums.ran,
            reached: sums.reached,
            requests: sums.requests,
            search,
            findings: Vec::new(),
            left_out: if self.stop { 0 } else { self.seeds_here() - sums.ran },
            interrupted: interrupt::requested(),
            error: sums.error,
        };
        for (check, (seed, count)) in sums.found {
            match self.finding(check, seed, count) {
                Ok(finding) => campaign.findings.push(finding),
                Err(source) => {
                    campaign.error.get_or_insert(FuzzError::Run { seed, source });
                }
            }
        }
        campaign
    }

    /// Seeds that a worker takes at a time.
    fn block(&self) -> u64 {
        match &self.target {
            Target::Test(case) if case.backend == Backend::Hosted => BLOCK,
            _ => 1,
        }
    }

    fn work(&self, shared: &Shared, began: Instant, progress: &impl Fn(Progress)) {
        let mut target = self.target.clone();
        let (block, seeds) = (self.block(), self.seeds_here());
        loop {
            let late = self.time.is_some_and(|time| began.elapsed() >= time);
            if late || interrupt::requested() || shared.over.load(Ordering::Relaxed) {
                return;
            }
            let first = shared.next.fetch_add(1, Ordering::Relaxed).saturating_mul(block);
            if first >= seeds || first > shared.stop_at.load(Ordering::Relaxed) {
                return;
            }
            let mut sums = Sums::default();
            for index in first..seeds.min(first + block) {
                let seed = self.seed_at(index);
                self.make(seed, &mut target);
                match self.one(seed, &target, &mut sums) {
                    Ok(false) => {}
                    Ok(true) if self.stop => {
                        shared.stop_at.fetch_min(index, Ordering::Relaxed);
                        break;
                    }
                    Ok(true) => {}
                    Err(error) => {
                        sums.error = Some(error);
                        shared.over.store(true, Ordering::Relaxed);
                        break;
                    }
                }
            }
            let mut all = shared.sums.lock().unwrap_or_else(PoisonError::into_inner);
            all.add(sums);
            let now = Progress { ran: all.ran, requests: all.requests, found: all.found.len() };
            drop(all);
            progress(now);
        }
    }

    /// Runs the case of one seed; whether a check failed.
    fn one(&self, seed: u64, target: &Target, sums: &mut Sums) -> Result<bool, FuzzError> {
        let outcome = target.run().map_err(|source| FuzzError::Run { seed, source })?;
        if outcome.interrupted {
            return Ok(false);
        }
        if outcome.class > self.class {
            return Err(FuzzError::Class { seed, asked: self.class, found: outcome.class });
        }
        sums.ran += 1;
        sums.reached += u64::from(outcome.class == self.class);
        sums.requests += outcome.requests;
        if outcome.violations.is_empty() {
            return Ok(false);
        }
        for check in outcome.checks() {
            sums.found.entry(check).or_insert((seed, 0)).1 += 1;
        }
        Ok(true)
    }

    fn finding(&self, check: Check, seed: u64, count: u64) -> Result<Finding, RunError> {
        let mut target = self.target.clone();
        self.make(seed, &mut target);
        let rules = target.rules().len();
        let outcome = target.run()?;
        let (target, outcome) = shrink::shrink(target, outcome, check, self.shrink_runs)?;
        Ok(Finding { check, seed, count, rules, target, outcome })
    }
}
