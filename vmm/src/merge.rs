//! Joins the reports of the shards of one suite, fuzz campaign or sweep.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::fuzz::{FuzzReport, SCHEMA as FUZZ};
use crate::judge::Check;
use crate::report::suite::{self as suite_object, SCHEMA as SUITE};
use crate::suite::{CaseResult, SuiteResult};
use crate::sweep::{SCHEMA as SWEEP, SweepReport};

/// Reports that cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A file cannot be read.
    #[error("{path}: cannot be read")]
    Read {
        /// The file.
        path: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// It is no report that can be joined.
    #[error("{path}: expected what `suite`, `fuzz` or `sweep --json` writes")]
    Form {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: Option<serde_json::Error>,
    },
    /// Two reports are not of one campaign.
    #[error("{path}: {what} is {found}, in {first} it is {expected}")]
    Other {
        /// The file.
        path: String,
        /// What differs.
        what: &'static str,
        /// What was there.
        found: String,
        /// The first file.
        first: String,
        /// What is there.
        expected: String,
    },
    /// Two reports have the same part.
    #[error("{path}: {what} is in {first} already")]
    Twice {
        /// The file.
        path: String,
        /// The part.
        what: String,
        /// The other file.
        first: String,
    },
}

/// A joined report.
#[derive(Debug)]
pub enum Merged {
    /// Of a suite.
    Suite(SuiteResult),
    /// Of a fuzz campaign.
    Fuzz(FuzzReport),
    /// Of a sweep.
    Sweep(SweepReport),
}

/// A report that was read, and its file.
type Part<T> = (String, T);

/// Joins the reports in `files`, each a file's name and its contents; and the names of those that are
/// unfinished.
///
/// # Errors
/// One is no report, or they are not of one campaign, or two have the same part.
pub fn merge(files: Vec<(String, String)>) -> Result<(Merged, Vec<String>), MergeError> {
    let mut parts: Vec<Part<Value>> = Vec::with_capacity(files.len());
    for (path, text) in files {
        match serde_json::from_str(&text) {
            Ok(value) => parts.push((path, value)),
            Err(source) => return Err(MergeError::Form { path, source: Some(source) }),
        }
    }
    let schema = |value: &Value| value["schema"].as_str().unwrap_or_default().to_owned();
    let Some((first, schema_of_first)) =
        parts.first().map(|(path, value)| (path.clone(), schema(value)))
    else {
        return Err(MergeError::Form { path: "merge".to_owned(), source: None });
    };
    for (path, value) in &parts {
        same(path, "the schema", &schema(value), &first, &schema_of_first)?;
    }
    let unfinished = parts.iter().filter(|(_, value)| value["unfinished"] == true);
    let unfinished = unfinished.map(|(path, _)| path.clone()).collect();
    let merged = match schema_of_first.as_str() {
        SUITE => suite(typed(parts, suite_object::read)?).map(Merged::Suite),
        FUZZ => fuzz(typed(parts, serde_json::from_value)?).map(Merged::Fuzz),
        SWEEP => sweep(typed(parts, serde_json::from_value)?).map(Merged::Sweep),
        _ => Err(MergeError::Form { path: first, source: None }),
    };
    Ok((merged?, unfinished))
}

fn typed<T>(
    parts: Vec<Part<Value>>,
    read: impl Fn(Value) -> Result<T, serde_json::Error>,
) -> Result<Vec<Part<T>>, MergeError> {
    let typed = parts.into_iter().map(|(path, value)| match read(value) {
        Ok(report) => Ok((path, report)),
        Err(source) => Err(MergeError::Form { path, source: Some(source) }),
    });
    typed.collect()
}

fn same<T: PartialEq + std::fmt::Display>(
    path: &str,
    what: &'static str,
    found: &T,
    first: &str,
    expected: &T,
) -> Result<(), MergeError> {
    if found == expected {
        return Ok(());
    }
    Err(MergeError::Other {
        path: path.to_owned(),
        what,
        found: found.to_string(),
        first: first.to_owned(),
        expected: expected.to_string(),
    })
}

fn fuzz(parts: Vec<Part<FuzzReport>>) -> Result<FuzzReport, MergeError> {
    let mut parts = parts.into_iter();
    let Some((first, mut all)) = parts.next() else {
        return Err(MergeError::Form { path: "merge".to_owned(), source: None });
    };
    for (path, part) in parts {
        same(&path, "the guest", &part.guest, &first, &all.guest)?;
        same(&path, "the class", &part.class, &first, &all.class)?;
        same(&path, "the backend", &part.backend, &first, &all.backend)?;
        same(&path, "the first seed", &part.seed, &first, &all.seed)?;
        same(&path, "the number of seeds", &part.seeds, &first, &all.seeds)?;
        same(&path, "the version of mapgpa", &part.mapgpa, &first, &all.mapgpa)?;
        for shard in part.shards {
            if all.shards.contains(&shard) {
                return Err(MergeError::Twice { path, what: format!("shard {shard}"), first });
            }
            all.shards.push(shard);
        }
        all.ran += part.ran;
        all.reached += part.reached;
        all.left_out += part.left_out;
        all.requests += part.requests;
        all.search_ns = all.search_ns.max(part.search_ns);
        all.interrupted |= part.interrupted;
        all.unfinished |= part.unfinished;
        all.error = all.error.or(part.error);
        for finding in part.findings {
            match all.findings.iter_mut().find(|other| other.check == finding.check) {
                None => all.findings.push(finding),
                Some(other) => {
                    let count = other.count + finding.count;
                    if finding.seed < other.seed {
                        *other = finding;
                    }
                    other.count = count;
                }
            }
        }
    }
    all.findings.sort_by_key(|finding| Check::by_name(&finding.check));
    all.shards = whole(all.shards);
    Ok(all)
}

/// The shards in order, or one that is the whole if none is missing.
fn whole(mut shards: Vec<String>) -> Vec<String> {
    let parse = |shard: &String| {
        let (index, count) = shard.split_once('/')?;
        Some((count.parse::<u64>().ok()?, index.parse::<u64>().ok()?))
    };
    shards.sort_by_key(parse);
    let counts: BTreeSet<_> = shards.iter().map(|shard| parse(shard).map(|(n, _)| n)).collect();
    match counts.first() {
        Some(Some(count)) if counts.len() == 1 && *count == shards.len() as u64 => {
            vec!["1/1".to_owned()]
        }
        _ => shards,
    }
}

fn sweep(parts: Vec<Part<SweepReport>>) -> Result<SweepReport, MergeError> {
    let mut parts = parts.into_iter();
    let Some((first, mut all)) = parts.next() else {
        return Err(MergeError::Form { path: "merge".to_owned(), source: None });
    };
    for (path, part) in parts {
        same(&path, "the range", &part.range, &first, &all.range)?;
        same(&path, "the first seed", &part.seed, &first, &all.seed)?;
        same(&path, "the number of seeds", &part.seeds, &first, &all.seeds)?;
        same(&path, "the version of mapgpa", &part.mapgpa, &first, &all.mapgpa)?;
        for cell in part.cells {
            if all.cells.iter().any(|other| other.number == cell.number) {
                let what = format!("cell {} ({} under {})", cell.number, cell.guest, cell.policy);
                return Err(MergeError::Twice { path, what, first });
            }
            all.cells.push(cell);
        }
        all.verified.extend(part.verified);
        all.not_verified = all.not_verified.or(part.not_verified);
        all.interrupted |= part.interrupted;
        all.unfinished |= part.unfinished;
        all.wall_ns = all.wall_ns.max(part.wall_ns);
    }
    all.cells.sort_by_key(|cell| cell.number);
    Ok(all)
}

fn suite(parts: Vec<Part<SuiteResult>>) -> Result<SuiteResult, MergeError> {
    let first = parts.first().map(|(path, _)| path.clone()).unwrap_or_default();
    let mut all = SuiteResult { cases: Vec::new(), left_out: 0, unfinished: false, wall_ns: 0 };
    let (mut numbers, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (path, part) in parts {
        for case in part.cases {
            let name = (case.guest.clone(), case.policy.clone());
            if !numbers.insert(case.number) || !names.insert(name) {
                let CaseResult { number, guest, policy, .. } = case;
                let what = format!("case {number} ({guest} under {policy})");
                return Err(MergeError::Twice { path, what, first });
            }
            all.cases.push(case);
        }
        all.left_out += part.left_out;
        all.unfinished |= part.unfinished;
        all.wall_ns = all.wall_ns.max(part.wall_ns);
    }
    all.cases.sort_by_key(|case| case.number);
    Ok(all)
}
