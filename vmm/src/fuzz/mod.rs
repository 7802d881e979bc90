//! The fuzzer: policies of a class made from seeds, run, and what fails made small.
//!
//! A seed stands for a case, whoever runs it: workers take blocks of seeds in order, and of each check
//! that fails the lowest seed counts. So the findings are the same whatever the number of workers, and
//! shards can be joined. Only with a time limit the machine's speed decides, how many seeds are run and how
//! far findings are made small.

mod campaign;
mod generate;
mod plainer;
mod report;
mod shrink;
mod target;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use campaign::Part;
pub use campaign::{Campaign, Finding, Live, Shrinking};
pub use generate::Fixed;
pub use report::{FindingRow, FuzzReport, SCHEMA};
pub use target::{Outcome, Target};

use crate::case::{Backend, RunError};
use crate::interrupt;
use crate::judge::{CHECKS, Check, Class};
use crate::workers;

/// Seeds that a worker takes at a time on `hosted`.
const BLOCK: u64 = 64;

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

impl FuzzError {
    const fn seed(&self) -> u64 {
        match self {
            Self::Run { seed, .. } | Self::Class { seed, .. } => *seed,
        }
    }
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
    /// All has to end by then.
    pub time: Option<Duration>,
    /// Ends with the lowest seed that fails.
    pub stop: bool,
    /// Runs that making a finding small may take.
    pub shrink_runs: u64,
}

/// What happens in a campaign.
#[derive(Debug, Clone, Copy)]
pub enum Progress {
    /// Seeds were run.
    Searched {
        /// How many in all.
        ran: u64,
        /// MapGPA calls.
        requests: u64,
        /// Checks found to fail.
        found: usize,
    },
    /// A check failed that had not failed before.
    Found {
        /// Which.
        check: Check,
        /// The seed.
        seed: u64,
        /// Rules of its policy.
        rules: usize,
    },
    /// A run that may make a finding smaller.
    Shrinking {
        /// Its check.
        check: Check,
        /// How many there were.
        runs: u64,
        /// Rules of the smallest case by now.
        rules: usize,
    },
}

/// What the workers share.
struct Shared {
    began: Instant,
    /// When all has to end.
    deadline: Option<Instant>,
    /// The next block.
    next: AtomicU64,
    /// The lowest failing index, where the campaign ends with that.
    stop_at: AtomicU64,
    /// When the search has to end, in nanoseconds, so that there is time to make findings small.
    search_ns: AtomicU64,
    /// How long that took so far, which is no part of the search.
    shrink_ns: AtomicU64,
    over: AtomicBool,
    /// The lowest seed that fails each check.
    lowest: [AtomicU64; CHECKS.len()],
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

    /// Runs it; `live` is what was found so far. `progress` is called now and then, from any thread.
    pub fn run(&self, live: &Live, progress: impl Fn(Progress) + Sync) {
        let began = Instant::now();
        let shared = Shared {
            began,
            deadline: self.time.and_then(|time| began.checked_add(time)),
            next: AtomicU64::new(0),
            stop_at: AtomicU64::new(u64::MAX),
            search_ns: AtomicU64::new(self.time.map_or(u64::MAX, nanos)),
            shrink_ns: AtomicU64::new(0),
            over: AtomicBool::new(false),
            lowest: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
        };
        loop {
            workers::work(self.jobs, || self.work(&shared, live, &progress));
            let stop_at = shared.stop_at.load(Ordering::Relaxed);
            let searched = began.elapsed();
            let (found, failed) = live.change(|campaign| {
                if self.stop && stop_at != u64::MAX {
                    // Others may have run further; what counts is the lowest.
                    let seed = self.seed_at(stop_at);
                    campaign.findings.retain(|finding| finding.seed == seed);
                    campaign.findings.iter_mut().for_each(|finding| finding.count = 1);
                    (campaign.ran, campaign.left_out) = (stop_at + 1, 0);
                }
                (campaign.findings.len(), campaign.error.is_some())
            });
            for at in 0..found {
                self.make_small(at, live, shared.deadline, &progress);
            }
            // The search ended early, to leave time for what took less: it goes on.
            let (Some(time), false, false) = (self.time, self.stop, failed) else { break };
            shared.shrink_ns.fetch_add(nanos(began.elapsed() - searched), Ordering::Relaxed);
            shared.search_ns.store(nanos(time), Ordering::Relaxed);
            let began_all = shared.next.load(Ordering::Relaxed) * self.block() >= self.seeds_here();
            if began_all || found == 0 || began.elapsed() >= time || interrupt::requested() {
                break;
            }
        }
        live.change(|campaign| {
            campaign.interrupted = interrupt::requested();
            campaign.unfinished = false;
        });
    }

    /// Makes finding number `at` small, unless it is.
    fn make_small(
        &self,
        at: usize,
        live: &Live,
        deadline: Option<Instant>,
        progress: &impl Fn(Progress),
    ) {
        let found = live.change(|campaign| {
            let Finding { check, seed, target, outcome, shrinking, .. } = &campaign.findings[at];
            let is_small = *shrinking != Shrinking::Unfinished;
            (!is_small).then(|| (*check, *seed, target.clone(), outcome.clone()))
        });
        let Some((check, seed, target, outcome)) = found else { return };
        let ended = shrink::shrink(target, outcome, check, self.shrink_runs, deadline, |step| {
            let rules = live.change(|campaign| {
                let finding = &mut campaign.findings[at];
                if let Some((target, outcome)) = step.smaller {
                    finding.target.clone_from(target);
                    finding.outcome.clone_from(outcome);
                }
                finding.target.rules().len()
            });
            progress(Progress::Shrinking { check, runs: step.runs, rules });
        });
        live.change(|campaign| match ended {
            Ok(shrinking) => campaign.findings[at].shrinking = shrinking,
            Err(source) => campaign.fail(FuzzError::Run { seed, source }),
        });
    }

    /// Seeds that a worker takes at a time.
    fn block(&self) -> u64 {
        match &self.target {
            Target::Test(case) if case.backend == Backend::Hosted => BLOCK,
            _ => 1,
        }
    }

    fn work(&self, shared: &Shared, live: &Live, progress: &impl Fn(Progress)) {
        let mut target = self.target.clone();
        let (block, seeds) = (self.block(), self.seeds_here());
        loop {
            let late = nanos(shared.began.elapsed()) >= shared.search_ns.load(Ordering::Relaxed);
            if late || interrupt::requested() || shared.over.load(Ordering::Relaxed) {
                return;
            }
            let first = shared.next.fetch_add(1, Ordering::Relaxed).saturating_mul(block);
            if first >= seeds || first > shared.stop_at.load(Ordering::Relaxed) {
                return;
            }
            let mut part = Part::default();
            for index in first..seeds.min(first + block) {
                let seed = self.seed_at(index);
                self.make(seed, &mut target);
                match self.one(seed, &mut target, shared, &mut part) {
                    Ok(false) => {}
                    Ok(true) if self.stop => {
                        shared.stop_at.fetch_min(index, Ordering::Relaxed);
                        break;
                    }
                    Ok(true) => {}
                    Err(error) => {
                        part.error = Some(error);
                        shared.over.store(true, Ordering::Relaxed);
                        break;
                    }
                }
            }
            let shrinking = Duration::from_nanos(shared.shrink_ns.load(Ordering::Relaxed));
            let search = shared.began.elapsed().saturating_sub(shrinking);
            let (new, now, large) = live.change(|all| {
                let new = all.add(part);
                all.search = search;
                let Campaign { ran, requests, ref findings, .. } = *all;
                let large = |finding: &&Finding| finding.shrinking == Shrinking::Unfinished;
                let count = findings.iter().filter(large).count();
                (new, (ran, requests, findings.len()), count)
            });
            let (ran, requests, found) = now;
            if let Some(time) = self.time {
                let left = time.saturating_sub(shrinking);
                let reserve = self.reserve(ran, large, search).min(left / 2);
                shared.search_ns.store(nanos(time - reserve), Ordering::Relaxed);
            }
            for (check, seed, rules) in new {
                progress(Progress::Found { check, seed, rules });
            }
            progress(Progress::Searched { ran, requests, found });
        }
    }

    /// The time that making `large` findings small may take, by that of the `ran` runs of the search.
    fn reserve(&self, ran: u64, large: usize, search: Duration) -> Duration {
        let runs = (large as u64).saturating_mul(self.shrink_runs);
        let jobs = self.jobs as u64;
        let took = u128::from(nanos(search)) * u128::from(jobs) / u128::from(ran.max(1));
        let all = took.saturating_mul(u128::from(runs));
        Duration::from_nanos(u64::try_from(all).unwrap_or(u64::MAX))
    }

    /// Runs the case of one seed; whether a check failed.
    fn one(
        &self,
        seed: u64,
        target: &mut Target,
        shared: &Shared,
        part: &mut Part,
    ) -> Result<bool, FuzzError> {
        let ran = target.run_until(shared.deadline);
        let Some(outcome) = ran.map_err(|source| FuzzError::Run { seed, source })? else {
            return Ok(false);
        };
        if outcome.class > self.class {
            return Err(FuzzError::Class { seed, asked: self.class, found: outcome.class });
        }
        part.ran += 1;
        part.reached += u64::from(outcome.class == self.class);
        part.requests += outcome.requests;
        for check in outcome.checks() {
            *part.counts.entry(check).or_default() += 1;
            if shared.lowest[check as usize].fetch_min(seed, Ordering::Relaxed) > seed {
                part.first.push(Finding {
                    check,
                    seed,
                    count: 1,
                    rules: target.rules().len(),
                    target: target.clone(),
                    outcome: outcome.clone(),
                    shrinking: Shrinking::Unfinished,
                });
            }
        }
        Ok(!outcome.violations.is_empty())
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
