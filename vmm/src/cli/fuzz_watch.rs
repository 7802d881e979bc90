//! What `fuzz` shows while it runs, and what it keeps for the case that it is killed.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::output::{self, Output};
use super::suite;
use crate::fuzz::{Fuzz, FuzzReport, Live, Progress, Target};
use crate::report::fuzz::rate;

/// The pause between two changes of the bar, which costs more than a block of seeds.
const BAR: Duration = Duration::from_millis(100);
/// The pause between two lines where stderr is no terminal.
const LINE: Duration = Duration::from_secs(30);

/// How far a campaign is, on stderr.
pub(super) struct Shown {
    bar: ProgressBar,
    began: Instant,
    last: Mutex<Duration>,
    seeds: u64,
    shrink_runs: u64,
    /// A run takes seconds: each is worth a line.
    slow: bool,
}

impl Shown {
    pub(super) fn new(fuzz: &Fuzz) -> Self {
        let seeds = fuzz.seeds_here();
        Self {
            bar: suite::progress_bar(usize::try_from(seeds).unwrap_or(usize::MAX)),
            began: Instant::now(),
            last: Mutex::new(Duration::ZERO),
            seeds,
            shrink_runs: fuzz.shrink_runs,
            slow: matches!(fuzz.target, Target::Kernel(_)),
        }
    }

    /// Shows what has happened.
    pub(super) fn on(&self, progress: Progress) {
        let lines = self.bar.is_hidden();
        let now = self.began.elapsed();
        let event = self.slow && !matches!(progress, Progress::Searched { .. });
        if !event {
            let Ok(mut last) = self.last.try_lock() else { return };
            if now - *last < if lines { LINE } else { BAR } {
                return;
            }
            *last = now;
        }
        let text = match progress {
            Progress::Searched { ran, requests, found } => {
                self.bar.set_position(ran);
                let ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
                let rate = rate(requests, ns);
                let text =
                    format!("{rate:.2} million requests a second, checks that fail: {found}");
                if lines { format!("{ran} of {} seeds, {text}", self.seeds) } else { text }
            }
            Progress::Found { check, seed, rules } => {
                format!("seed {seed} fails {check}, rules: {rules}")
            }
            Progress::Shrinking { check, runs, rules } => {
                let most = self.shrink_runs;
                format!("making {check} small: run {runs} of at most {most}, rules left: {rules}")
            }
        };
        match progress {
            _ if lines => output::complain(&format!("mapgpa: {text}")),
            Progress::Found { .. } => self.bar.println(text),
            _ => self.bar.set_message(text),
        }
    }

    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// What a campaign that is killed leaves: its report, and a case of each check that fails.
pub(super) struct Kept<'a> {
    json: Option<&'a Output<'a>>,
    dir: &'a Path,
    cases: BTreeMap<PathBuf, String>,
    seen: u64,
}

impl<'a> Kept<'a> {
    pub(super) const fn new(json: Option<&'a Output<'a>>, dir: &'a Path) -> Self {
        Self { json, dir, cases: BTreeMap::new(), seen: 0 }
    }

    /// Writes what is new. What cannot be written is complained about at the end.
    pub(super) fn keep(&mut self, fuzz: &Fuzz, live: &Live) {
        let Some(campaign) = live.news(&mut self.seen) else { return };
        let report = FuzzReport::new(fuzz, &campaign);
        drop(campaign);
        for finding in &report.findings {
            let path = self.dir.join(report.unfinished_name(finding));
            let is_new = self.cases.get(&path) != Some(&finding.case);
            if is_new && std::fs::create_dir_all(self.dir).is_ok() {
                let written = output::replace(&path, |out| out.write_all(finding.case.as_bytes()));
                if written.is_ok() {
                    self.cases.insert(path, finding.case.clone());
                }
            }
        }
        if let Some(json) = self.json {
            json.keep(|out| output::json(out, &report));
        }
    }

    /// The small cases have been written: the others go.
    pub(super) fn discard_cases(&self) {
        for path in self.cases.keys() {
            // What cannot be removed is a case all the same.
            let _ = std::fs::remove_file(path);
        }
    }
}
