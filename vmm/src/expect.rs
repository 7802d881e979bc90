//! Expectations: which guests are known to fail which checks under which policies.
//!
//! ```toml
//! schema = "mapgpa.expectations/1"
//! [[known]]
//! guests = ["linux-5.19"]
//! policies = ["chunk=64K"]
//! checks = ["gave-up"]
//! why = "no retry loop before v6.7"
//! ```
//! What is not listed is expected to pass. An entry with `front_end = "kvm-7.2"` is for that front-end
//! alone, where it goes before one without.

use std::collections::BTreeMap;
use std::path::Path;

use mapgpa_guests::Guest;
use mapgpa_kvm_model::Kernel;
use serde::Deserialize;

use crate::engine::FrontEnd;
use crate::judge::Check;
use crate::policy::{Policy, PolicyError};

const SCHEMA: &str = "mapgpa.expectations/1";
const BUILT_IN: &str = include_str!("../../fixtures/expectations.toml");

/// An expectation file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ExpectError {
    /// The file cannot be read.
    #[error("expectations {path}: cannot be read")]
    Read {
        /// The file.
        path: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// It is not TOML, or has a key or value that expectations have not.
    #[error("expectations {path}: {}", message.trim_end().replace('\n', " | "))]
    Form {
        /// The file.
        path: String,
        /// Where and what.
        message: String,
    },
    /// The schema is another one.
    #[error("expectations {path}: schema is \"{found}\", expected \"{SCHEMA}\"")]
    Schema {
        /// The file.
        path: String,
        /// What was there.
        found: String,
    },
    /// A name that nothing has.
    #[error(
        "expectations {path}: entry {entry}: no {what} is named \"{name}\" (`mapgpa list {what}s`)"
    )]
    Unknown {
        /// The file.
        path: String,
        /// Which [[known]], from 1.
        entry: usize,
        /// `guest` or `check`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// No checks, or the same one twice.
    #[error("expectations {path}: entry {entry}: checks: {what}")]
    Checks {
        /// The file.
        path: String,
        /// Which [[known]], from 1.
        entry: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A policy that is none.
    #[error("expectations {path}: entry {entry}")]
    Policy {
        /// The file.
        path: String,
        /// Which [[known]], from 1.
        entry: usize,
        /// What is wrong with it.
        source: Box<PolicyError>,
    },
    /// Two entries for one case.
    #[error("expectations {path}: entry {entry}: {guest} under {policy} has an entry already")]
    Twice {
        /// The file.
        path: String,
        /// Which [[known]], from 1.
        entry: usize,
        /// The guest.
        guest: String,
        /// The policy.
        policy: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: String,
    #[serde(default)]
    known: Vec<Known>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    guests: Vec<String>,
    policies: Vec<String>,
    checks: Vec<String>,
    front_end: Option<FrontEndName>,
    #[expect(dead_code, reason = "for the reader of the file")]
    why: String,
}

/// The front-end that an entry is about alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
enum FrontEndName {
    #[serde(rename = "direct")]
    Direct,
    #[serde(rename = "kvm-6.16")]
    Kvm6_16,
    #[serde(rename = "kvm-7.2")]
    Kvm7_2,
}

impl From<FrontEnd> for FrontEndName {
    fn from(front_end: FrontEnd) -> Self {
        match front_end {
            FrontEnd::Direct => Self::Direct,
            FrontEnd::Kvm(Kernel::V6_16) => Self::Kvm6_16,
            FrontEnd::Kvm(Kernel::V7_2) => Self::Kvm7_2,
        }
    }
}

/// A case: guest, policy, and the front-end if the entry is about one alone.
type Key = (String, String, Option<FrontEndName>);

/// What is expected of each case.
#[derive(Debug, Clone, Default)]
pub struct Expectations {
    checks: BTreeMap<Key, Vec<Check>>,
}

impl Expectations {
    /// Those that come with mapgpa.
    ///
    /// # Errors
    /// They are malformed; a test holds that they are not.
    pub fn built_in() -> Result<Self, ExpectError> {
        Self::parse("(built in)", BUILT_IN)
    }

    /// Those of a file.
    ///
    /// # Errors
    /// The file cannot be read or used.
    pub fn read(path: &Path) -> Result<Self, ExpectError> {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&name, &text),
            Err(source) => Err(ExpectError::Read { path: name, source }),
        }
    }

    /// Those of the text of a file; `path` is what errors call it.
    ///
    /// # Errors
    /// The text cannot be used.
    pub fn parse(path: &str, text: &str) -> Result<Self, ExpectError> {
        let path = || path.to_owned();
        let file: File = toml::from_str(text)
            .map_err(|error| ExpectError::Form { path: path(), message: error.to_string() })?;
        if file.schema != SCHEMA {
            return Err(ExpectError::Schema { path: path(), found: file.schema });
        }
        let mut all = Self::default();
        for (entry, known) in (1..).zip(file.known) {
            let unknown = |what, name: &String| ExpectError::Unknown {
                path: path(),
                entry,
                what,
                name: name.clone(),
            };
            let mut checks = known
                .checks
                .iter()
                .map(|name| Check::by_name(name).ok_or_else(|| unknown("check", name)))
                .collect::<Result<Vec<_>, _>>()?;
            checks.sort_unstable();
            if checks.is_empty() {
                return Err(ExpectError::Checks { path: path(), entry, what: "expected a check" });
            }
            if checks.windows(2).any(|pair| pair[0] == pair[1]) {
                return Err(ExpectError::Checks {
                    path: path(),
                    entry,
                    what: "a check is named twice",
                });
            }
            for guest in &known.guests {
                if Guest::by_name(guest).is_none() {
                    return Err(unknown("guest", guest));
                }
            }
            for policy in &known.policies {
                // Results have the name that a policy file gives itself.
                let Policy { name: policy, .. } = Policy::parse(policy).map_err(|source| {
                    ExpectError::Policy { path: path(), entry, source: Box::new(source) }
                })?;
                for guest in &known.guests {
                    let case = (guest.clone(), policy.clone(), known.front_end);
                    if all.checks.insert(case, checks.clone()).is_some() {
                        let (guest, policy) = (guest.clone(), policy.clone());
                        return Err(ExpectError::Twice { path: path(), entry, guest, policy });
                    }
                }
            }
        }
        Ok(all)
    }

    /// The checks that are expected to fail, in order of their list; none: a pass is expected.
    #[must_use]
    pub fn of(&self, guest: &str, policy: &str, front_end: FrontEnd) -> Vec<Check> {
        let find =
            |front_end| self.checks.get(&(guest.to_owned(), policy.to_owned(), front_end)).cloned();
        find(Some(front_end.into())).or_else(|| find(None)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(known: &str) -> String {
        let text = format!("schema = \"{SCHEMA}\"\n{known}");
        crate::one_line(&Expectations::parse("e.toml", &text).expect_err(known))
    }

    #[test]
    fn the_built_in_ones_are_well_formed() {
        Expectations::built_in().expect("well formed");
    }

    #[test]
    fn an_entry_for_a_front_end_goes_first() {
        let text = format!(
            "schema = \"{SCHEMA}\"\n\
             [[known]]\nguests=[\"svsm\"]\npolicies=[\"complete\"]\nchecks=[\"crash\"]\nwhy=\"\"\n\
             [[known]]\nguests=[\"svsm\"]\npolicies=[\"complete\"]\nchecks=[\"gave-up\"]\nwhy=\"\"\n\
             front_end=\"kvm-7.2\"\n"
        );
        let all = Expectations::parse("e.toml", &text).expect("well formed");
        let of = |front_end| all.of("svsm", "complete", front_end);
        assert_eq!(of(FrontEnd::Direct), [Check::Crash]);
        assert_eq!(of(FrontEnd::Kvm(Kernel::V6_16)), [Check::Crash]);
        assert_eq!(of(FrontEnd::Kvm(Kernel::V7_2)), [Check::GaveUp]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let entry = |guest: &str, policy: &str, check: &str| {
            format!(
                "[[known]]\nguests=[\"{guest}\"]\npolicies=[\"{policy}\"]\nchecks=[\"{check}\"]\nwhy=\"\"\n"
            )
        };
        assert!(error(&entry("windows", "complete", "crash")).contains("named \"windows\""));
        assert!(error(&entry("svsm", "complete", "crush")).contains("no check is named \"crush\""));
        assert!(error(&entry("svsm", "chunk=1", "crash")).contains("at character 7"));
        let twice = entry("svsm", "complete", "crash").repeat(2);
        assert!(error(&twice).contains("entry 2") && error(&twice).contains("already"));
        assert!(error("[[known]]\nguest = 3").contains("unknown field"));
    }
}
