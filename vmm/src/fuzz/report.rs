//! The report of a campaign: the object of `mapgpa fuzz --json` (docs/schemas/fuzz.schema.json).

use serde::{Deserialize, Serialize};

use super::{Campaign, Fuzz, Shrinking, Target};
use crate::one_line;
use crate::replay::write_case;

/// The version of the fuzz object.
pub const SCHEMA: &str = "mapgpa.fuzz/1";

/// A check that failed, and the small case of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindingRow {
    /// The check.
    pub check: String,
    /// The lowest seed that fails it.
    pub seed: u64,
    /// How many seeds fail it.
    pub count: u64,
    /// Rules of that seed's policy.
    pub rules_found: usize,
    /// Rules of the small case.
    pub rules: usize,
    /// How far it has been made small.
    pub shrinking: Shrinking,
    /// The class of the small case.
    pub class: String,
    /// What happened.
    pub detail: String,
    /// Spec strings of its rules.
    pub policy: Vec<String>,
    /// The case, as TOML: what `mapgpa replay` reads.
    pub case: String,
}

/// A campaign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FuzzReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// The guest.
    pub guest: String,
    /// The class asked for.
    pub class: String,
    /// What it ran on.
    pub backend: String,
    /// The first seed.
    pub seed: u64,
    /// Seeds of all shards.
    pub seeds: u64,
    /// Which parts of them are in here, as I/N.
    pub shards: Vec<String>,
    /// Seeds that were run.
    pub ran: u64,
    /// Of those, whose replies really were of the class.
    pub reached: u64,
    /// Seeds that were not run: the time was up, the user interrupted, or it is not finished.
    pub left_out: u64,
    /// MapGPA calls.
    pub requests: u64,
    /// Nanoseconds of the search; of several shards the longest.
    pub search_ns: u64,
    /// One of each check that failed, in order of the checks' list.
    pub findings: Vec<FindingRow>,
    /// The user interrupted it.
    pub interrupted: bool,
    /// It had not ended when this was written: it still runs, or was killed.
    pub unfinished: bool,
    /// What ended it early.
    pub error: Option<String>,
    /// Version of mapgpa.
    pub mapgpa: String,
}

impl FuzzReport {
    /// The report of `fuzz`, which found `campaign`.
    #[must_use]
    pub fn new(fuzz: &Fuzz, campaign: &Campaign) -> Self {
        let (guest, backend) = match &fuzz.target {
            Target::Test(case) => (case.guest.name(), case.backend.name()),
            Target::Kernel(case) => (case.options.kernel.display().to_string(), "emulated"),
        };
        let findings = campaign.findings.iter().map(|finding| {
            let of_check = |violation: &&crate::judge::Violation| violation.check == finding.check;
            let violation = finding.outcome.violations.iter().find(of_check);
            FindingRow {
                check: finding.check.to_string(),
                seed: finding.seed,
                count: finding.count,
                rules_found: finding.rules,
                rules: finding.target.rules().len(),
                shrinking: finding.shrinking,
                class: finding.outcome.class.name().to_owned(),
                detail: violation.map(|violation| violation.detail.clone()).unwrap_or_default(),
                policy: finding.target.rules().iter().map(|rule| rule.action.to_string()).collect(),
                case: write_case(
                    &finding.target,
                    &finding.outcome,
                    Some(finding.check),
                    fuzz.class,
                    Some(finding.seed),
                ),
            }
        });
        Self {
            schema: SCHEMA.to_owned(),
            guest,
            class: fuzz.class.name().to_owned(),
            backend: backend.to_owned(),
            seed: fuzz.seed,
            seeds: fuzz.seeds,
            shards: vec![format!("{}/{}", fuzz.shard.0, fuzz.shard.1)],
            ran: campaign.ran,
            reached: campaign.reached,
            left_out: campaign.left_out,
            requests: campaign.requests,
            search_ns: u64::try_from(campaign.search.as_nanos()).unwrap_or(u64::MAX),
            findings: findings.collect(),
            interrupted: campaign.interrupted,
            unfinished: campaign.unfinished,
            error: campaign.error.as_ref().map(|error| one_line(error)),
            mapgpa: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The name of a finding's case file.
    #[must_use]
    pub fn case_name(&self, finding: &FindingRow) -> String {
        format!("{}-{}-{}.toml", self.file_name(), finding.class, finding.check)
    }

    /// The name of the file of a finding that is being made small: its class may still change.
    #[must_use]
    pub fn unfinished_name(&self, finding: &FindingRow) -> String {
        format!("{}-{}.unfinished.toml", self.file_name(), finding.check)
    }

    fn file_name(&self) -> &str {
        self.guest.rsplit('/').next().unwrap_or_default()
    }
}
