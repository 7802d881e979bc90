//! What the judge says, and the limits that it is given.

use serde::{Deserialize, Serialize};

use crate::engine::Phase;

use super::Check;

/// The class of a case: what the replies that were really given ask of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// True, at most two replies in a row without progress, no error: the guest must converge.
    Legal,
    /// True, three or more in a row without progress: the guest may give up, cleanly.
    Stalling,
    /// True error statuses: the guest must give up, cleanly.
    Refusing,
    /// A lie, or R11 or status outside the protocol: any end without a violation.
    Hostile,
}

impl Class {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Legal => "legal",
            Self::Stalling => "stalling",
            Self::Refusing => "refusing",
            Self::Hostile => "hostile",
        }
    }
}

/// Limits and reaction of a judge.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// The most replies in a row without progress that a guest may provoke.
    pub max_no_progress: u64,
    /// The most calls in a conversation: this, and 4 a page.
    pub max_calls: u64,
    /// Whether the first violation ends the run.
    pub stop: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self { max_no_progress: 16, max_calls: 4096, stop: false }
    }
}

/// A check that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// Which.
    pub check: Check,
    /// The MapGPA call of the vCPU that was the last by then; 0 before the first.
    pub call: u64,
    /// The GPA that it is about, if it is about one.
    #[serde(serialize_with = "hex_or_null", deserialize_with = "of_hex_or_null")]
    pub gpa: Option<u64>,
    /// What happened.
    pub detail: String,
    /// How far the firmware had come, if the guest is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
}

fn hex_or_null<S: serde::Serializer>(gpa: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    match gpa {
        Some(gpa) => serializer.collect_str(&format_args!("{gpa:#x}")),
        None => serializer.serialize_none(),
    }
}

fn of_hex_or_null<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    let gpa = crate::units::hexadecimal(&text);
    gpa.map(Some).ok_or_else(|| serde::de::Error::custom(format_args!("no address: \"{text}\"")))
}

/// How the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestResult {
    /// It says that all went well.
    Success,
    /// It says that it failed, or panicked.
    Failure,
    /// It crashed.
    Crash,
    /// It did not end in time.
    Timeout,
    /// The run ended before the guest did.
    None,
}

impl GuestResult {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Crash => "crash",
            Self::Timeout => "timeout",
            Self::None => "none",
        }
    }
}

/// What the judge says of a run.
#[derive(Debug, Clone)]
pub struct Judgement {
    /// The class of the case.
    pub class: Class,
    /// How the guest ended.
    pub result: GuestResult,
    /// What the policy is about occurred.
    pub exercised: bool,
    /// Checks that failed.
    pub violations: Vec<Violation>,
    /// What is worth reporting, and not held against the guest.
    pub notes: Vec<String>,
}
