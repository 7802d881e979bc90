//! What a campaign has found: the sums, and one finding of each check. While it runs, others can look.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Fuzz, FuzzError, Outcome, Target};
use crate::judge::Check;

/// How far a finding has been made small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shrinking {
    /// Nothing that was tried makes it smaller.
    Done,
    /// All runs that it may take were used.
    OutOfRuns,
    /// The time was up, or the campaign ended: a smaller case is likely.
    Unfinished,
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
    /// The smallest case so far.
    pub target: Target,
    /// How it fails.
    pub outcome: Outcome,
    /// How far that went.
    pub shrinking: Shrinking,
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
    /// Seeds that were not run: the user interrupted it, or the time was up, or it goes on.
    pub left_out: u64,
    /// It was the user.
    pub interrupted: bool,
    /// It has not ended.
    pub unfinished: bool,
    /// What ended it early.
    pub error: Option<FuzzError>,
    /// How many seeds fail each check.
    counts: BTreeMap<Check, u64>,
}

/// What a block of seeds adds.
#[derive(Default)]
pub(super) struct Part {
    pub(super) ran: u64,
    pub(super) reached: u64,
    pub(super) requests: u64,
    /// How many seeds fail each check.
    pub(super) counts: BTreeMap<Check, u64>,
    /// A finding of each check of which no lower seed was known to fail it.
    pub(super) first: Vec<Finding>,
    pub(super) error: Option<FuzzError>,
}

impl Campaign {
    pub(super) fn new(seeds: u64) -> Self {
        Self {
            ran: 0,
            reached: 0,
            requests: 0,
            search: Duration::ZERO,
            findings: Vec::new(),
            left_out: seeds,
            interrupted: false,
            unfinished: true,
            error: None,
            counts: BTreeMap::new(),
        }
    }

    /// Adds `part`; the checks that are new, with their seeds and the rules of their policies.
    pub(super) fn add(&mut self, part: Part) -> Vec<(Check, u64, usize)> {
        self.ran += part.ran;
        self.left_out -= part.ran;
        self.reached += part.reached;
        self.requests += part.requests;
        let mut new = Vec::new();
        for first in part.first {
            match self.findings.binary_search_by_key(&first.check, |finding| finding.check) {
                Ok(at) if first.seed < self.findings[at].seed => self.findings[at] = first,
                Ok(_) => {}
                Err(at) => {
                    new.push((first.check, first.seed, first.rules));
                    self.findings.insert(at, first);
                }
            }
        }
        // A worker may count a check whose first seed another worker is still at.
        for (check, count) in part.counts {
            *self.counts.entry(check).or_default() += count;
        }
        for finding in &mut self.findings {
            finding.count = self.counts.get(&finding.check).copied().unwrap_or(1);
        }
        // Of several errors that of the lowest seed, as with one worker.
        if let Some(error) = part.error {
            self.fail(error);
        }
        new
    }

    pub(super) fn fail(&mut self, error: FuzzError) {
        if self.error.as_ref().is_none_or(|first| error.seed() < first.seed()) {
            self.error = Some(error);
        }
    }
}

/// A campaign that runs, for others to look at.
#[derive(Debug)]
pub struct Live {
    campaign: Mutex<Campaign>,
    changes: AtomicU64,
}

impl Live {
    /// Of `fuzz`, which has not begun.
    #[must_use]
    pub fn new(fuzz: &Fuzz) -> Self {
        let campaign = Campaign::new(fuzz.seeds_here());
        Self { campaign: Mutex::new(campaign), changes: AtomicU64::new(0) }
    }

    /// What was found so far, if that is more than after `seen` changes, which is set.
    pub fn news(&self, seen: &mut u64) -> Option<MutexGuard<'_, Campaign>> {
        let changes = self.changes.load(Ordering::Acquire);
        (std::mem::replace(seen, changes) != changes).then(|| self.lock())
    }

    /// What was found in all.
    #[must_use]
    pub fn into_campaign(self) -> Campaign {
        self.campaign.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// To change it.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Campaign) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changes.fetch_add(1, Ordering::Release);
        changed
    }

    fn lock(&self) -> MutexGuard<'_, Campaign> {
        self.campaign.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
