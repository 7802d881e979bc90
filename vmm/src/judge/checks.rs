//! The checks: the invariants that a run is held against, by name.

use std::fmt;

/// A check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Check {
    /// `false-success`
    FalseSuccess,
    /// `gave-up`
    GaveUp,
    /// `unbounded`
    Unbounded,
    /// `wild-request`
    WildRequest,
    /// `skipped`
    Skipped,
    /// `wrong-alias`
    WrongAlias,
    /// `access-before-accept`
    AccessBeforeAccept,
    /// `accept-missing`
    AcceptMissing,
    /// `protocol`
    Protocol,
    /// `ignored-failure`
    IgnoredFailure,
    /// `left-shared`
    LeftShared,
    /// `crash`
    Crash,
}

/// What is to be known of a check.
#[derive(Debug, Clone, Copy)]
pub struct CheckInfo {
    /// Which.
    pub check: Check,
    /// Its name in reports and expectations.
    pub name: &'static str,
    /// Its letter in the suite's matrix.
    pub letter: char,
    /// What a violation is.
    pub sentence: &'static str,
    /// Why it is one.
    pub reason: &'static str,
}

/// All checks.
pub const CHECKS: &[CheckInfo] = &[
    CheckInfo {
        check: Check::FalseSuccess,
        name: "false-success",
        letter: 'F',
        sentence: "the guest takes a conversion for done while a page of it is not converted",
        reason: "GHCI, MapGPA: only SUCCESS means that the whole range is converted; RETRY with an \
                 R11 outside the range is no completion",
    },
    CheckInfo {
        check: Check::GaveUp,
        name: "gave-up",
        letter: 'G',
        sentence: "the guest fails although every reply was legal",
        reason: "GHCI, MapGPA: on RETRY the guest is to retry for the pages from R11 on",
    },
    CheckInfo {
        check: Check::Unbounded,
        name: "unbounded",
        letter: 'U',
        sentence: "the guest goes on asking without progress, or does not end",
        reason: "R10 and R11 come from an untrusted host; GHCI promises no progress, so the guest \
                 has to set the bound",
    },
    CheckInfo {
        check: Check::WildRequest,
        name: "wild-request",
        letter: 'W',
        sentence: "a retry reaches outside the conversation's range, or flips its direction",
        reason: "a host that can choose the range or the direction decides which guest memory it \
                 may read",
    },
    CheckInfo {
        check: Check::Skipped,
        name: "skipped",
        letter: 'S',
        sentence: "a retry starts past pages that are not converted, though R11 did not say so",
        reason: "GHCI, MapGPA: R11 is the GPA to go on from",
    },
    CheckInfo {
        check: Check::WrongAlias,
        name: "wrong-alias",
        letter: 'A',
        sentence: "a page is used through an alias that its state forbids",
        reason: "TDX module: a shared page is not in the secure EPT, a private page is not reached \
                 through the shared one",
    },
    CheckInfo {
        check: Check::AccessBeforeAccept,
        name: "access-before-accept",
        letter: 'B',
        sentence: "a page is used that was converted to private and not accepted yet",
        reason: "TDX module: a pending page causes #VE, or ends the TD where #VE is disabled",
    },
    CheckInfo {
        check: Check::AcceptMissing,
        name: "accept-missing",
        letter: 'M',
        sentence: "a conversion to private is reported as done with pages still pending",
        reason: "TDX module: the guest has to accept every page before its use",
    },
    CheckInfo {
        check: Check::Protocol,
        name: "protocol",
        letter: 'P',
        sentence: "a request has size 0, is unaligned, wraps, is illegal or mixes both aliases",
        reason: "GHCI, MapGPA: R12 and R13 are 4 KiB aligned and describe one legal range",
    },
    CheckInfo {
        check: Check::IgnoredFailure,
        name: "ignored-failure",
        letter: 'I',
        sentence: "the guest goes on to use a range after its conversion failed",
        reason: "after a failure some pages are converted and some are not: the range may not be \
                 used through either alias",
    },
    CheckInfo {
        check: Check::LeftShared,
        name: "left-shared",
        letter: 'L',
        sentence: "firmware hands memory over at ExitBootServices that is still shared with the host",
        reason: "what is booted takes all memory for private: it crashes on such a page, or keeps \
                 secrets where the host reads them",
    },
    CheckInfo {
        check: Check::Crash,
        name: "crash",
        letter: 'C',
        sentence: "an unhandled exception, a triple fault, or an access to nowhere",
        reason: "a reply of the host must not be able to crash the guest; a deliberate panic is \
                 giving up",
    },
];

impl Check {
    /// What is to be known of it.
    #[must_use]
    pub fn info(self) -> &'static CheckInfo {
        // The table lists every check: a test holds it to that.
        CHECKS.iter().find(|info| info.check == self).unwrap_or(&CHECKS[0])
    }

    /// The check of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        CHECKS.iter().find(|info| info.name == name).map(|info| info.check)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.info().name)
    }
}

impl serde::Serialize for Check {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.info().name)
    }
}

impl<'de> serde::Deserialize<'de> for Check {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let unknown = || serde::de::Error::custom(format_args!("no check is named \"{name}\""));
        Self::by_name(&name).ok_or_else(unknown)
    }
}
