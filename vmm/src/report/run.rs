//! The report of one run: the object of `--format json` (docs/schemas/run.schema.json).

use std::borrow::Cow;

use mapgpa_abi::Direction;
use serde::{Deserialize, Serialize};

use crate::engine::{Conversation, Ending, Phase};
use crate::judge::{Class, GuestResult, Judgement, Violation};

/// The version of the run object.
pub const SCHEMA: &str = "mapgpa.run/1";

/// The verdict of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The policy showed, and no check failed.
    Pass,
    /// A check failed.
    Fail,
    /// What the policy is about never occurred, so that the run shows nothing.
    NotExercised,
    /// The run could not be done.
    Error,
}

impl Verdict {
    /// The verdict of a run that was judged so; `could_run` unless it was interrupted or failed.
    #[must_use]
    pub const fn of(judgement: &Judgement, could_run: bool) -> Self {
        if !could_run {
            Self::Error
        } else if !judgement.violations.is_empty() {
            Self::Fail
        } else if !judgement.exercised {
            Self::NotExercised
        } else {
            Self::Pass
        }
    }
}

/// How a conversation ended, in reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest took it for done.
    Completed,
    /// The guest gave up.
    GaveUp,
    /// The run ended first.
    NeverReturned,
}

/// One conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConversationRow {
    /// Start, GPA in bytes without the shared bit, as hexadecimal text.
    pub gpa: String,
    /// Size in bytes.
    pub size: u64,
    /// `shared` or `private`.
    pub to: Cow<'static, str>,
    /// Requests.
    pub requests: u64,
    /// Replies RETRY.
    pub retries: u64,
    /// Replies without progress.
    pub no_progress: u64,
    /// Nanoseconds from its first request to the last reply.
    pub ns: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Where the guest gave up: the first page that was not converted, as hexadecimal text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}

impl ConversationRow {
    /// The row of a conversation.
    #[must_use]
    pub fn new(conversation: &Conversation, ending: Ending) -> Self {
        let (outcome, at) = match ending {
            Ending::Completed => (Outcome::Completed, None),
            Ending::GaveUp(at) => (Outcome::GaveUp, at),
            Ending::NeverReturned => (Outcome::NeverReturned, None),
        };
        Self {
            gpa: format!("{:#x}", conversation.pages.gpa()),
            size: conversation.pages.count * mapgpa_abi::PAGE_SIZE,
            to: match conversation.to {
                Direction::ToShared => "shared".into(),
                Direction::ToPrivate => "private".into(),
            },
            requests: conversation.requests,
            retries: conversation.retries,
            no_progress: conversation.no_progress,
            ns: conversation.ns,
            outcome,
            at: at.map(|at| format!("{at:#x}")),
        }
    }
}

/// Sums over a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// MapGPA calls.
    pub calls: u64,
    /// Replies RETRY.
    pub retries: u64,
    /// Replies RETRY without progress.
    pub no_progress: u64,
    /// Pages converted to shared.
    pub pages_to_shared: u64,
    /// Pages converted to private.
    pub pages_to_private: u64,
    /// Pages accepted.
    pub pages_accepted: u64,
    /// Exits of all vCPUs to the VMM; on `hosted` the TDCALLs.
    pub exits: u64,
    /// Nanoseconds spent answering MapGPA.
    pub handler_ns: u64,
    /// The longest of them.
    pub max_call_ns: u64,
    /// Nanoseconds from the start of the run to its end.
    pub wall_ns: u64,
}

/// The kernel of a run, where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRow {
    /// Its release (`uname -r`), if its image says so.
    pub version: Option<String>,
    /// TDCALL instructions replaced.
    pub sites: u64,
    /// Places that look like one and are none.
    pub lookalikes: u64,
    /// vCPUs.
    pub vcpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Its command line.
    pub cmdline: String,
}

/// The firmware of a run, where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareRow {
    /// Bytes of its image.
    pub size: usize,
    /// TDCALLs replaced in the volume that runs in place.
    pub sec_sites: u64,
    /// TDCALLs in its compressed volume.
    pub packed_sites: u64,
    /// TDCALLs replaced in memory: those of the compressed volume, copies of them, a kernel's.
    pub memory_sites: u64,
    /// Loads of CR3 that were made hooks.
    pub hooks: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// What it was made to do beside booting.
    pub scenarios: Vec<Cow<'static, str>>,
}

/// When a firmware came to a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseRow {
    /// The phase.
    pub phase: Phase,
    /// Nanoseconds since the run began.
    pub t_ns: u64,
}

/// The versions behind a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Version of mapgpa.
    pub mapgpa: Cow<'static, str>,
    /// Version of the host's kernel.
    pub kernel: String,
}

impl Host {
    /// This host.
    #[must_use]
    pub fn this() -> Self {
        let kernel = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        Self { mapgpa: env!("CARGO_PKG_VERSION").into(), kernel }
    }
}

/// One run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunReport {
    /// [`SCHEMA`].
    pub schema: Cow<'static, str>,
    /// The guest's name, or the file's.
    pub guest: String,
    /// The policy's name.
    pub policy: String,
    /// The class of the case, by the replies given.
    pub class: Class,
    /// `emulated`, `tdx` or `hosted`.
    pub backend: Cow<'static, str>,
    /// `direct`.
    pub front_end: Cow<'static, str>,
    /// `alias`, or `none` where there is no memory behind it.
    pub memory_model: Cow<'static, str>,
    /// Guest-physical address width in bits.
    pub gpaw: u32,
    /// Seed of the policy's draws.
    pub seed: u64,
    /// `to-shared`, `to-private` or `round-trip`; `any` of a kernel, which does as it likes.
    pub direction: Cow<'static, str>,
    /// Bytes converted each way; of a kernel, the sum over its conversations.
    pub range: u64,
    /// Whether the same command gives the same calls and replies.
    pub reproducible: bool,
    /// The verdict.
    pub verdict: Verdict,
    /// How the guest ended.
    pub guest_result: GuestResult,
    /// Checks that failed.
    pub violations: Vec<Violation>,
    /// What is worth reporting beside.
    pub notes: Vec<String>,
    /// Checks that could not be made here.
    pub checks_off: Vec<Cow<'static, str>>,
    /// The guest's conversations, in order of their end.
    pub conversations: Vec<ConversationRow>,
    /// Sums.
    pub totals: Totals,
    /// The kernel, where the guest is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelRow>,
    /// The firmware, where the guest is one, or is booted by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<FirmwareRow>,
    /// When the firmware came to each phase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<PhaseRow>,
    /// Its console: the beginning and the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
    /// Versions.
    pub host: Host,
}

impl RunReport {
    /// The names of the checks that failed, each once, in order of their list.
    #[must_use]
    pub fn failed_checks(&self) -> Vec<crate::judge::Check> {
        let mut checks: Vec<_> = self.violations.iter().map(|violation| violation.check).collect();
        checks.sort_unstable();
        checks.dedup();
        checks
    }
}
