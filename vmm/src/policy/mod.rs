//! Policies: what the VMM does with a MapGPA request, and what it says.
//!
//! A policy is a list of rules; the first whose conditions hold decides, by its [`Action`].
//! Deciding is pure: the same seed, request and context give the same [`Decision`], and draws
//! derive from (seed, vCPU, call). What the pages then become is the engine's work, which also
//! works out whether the reply was true.

mod draw;
mod presets;
mod r11;
mod script;
mod show;
mod spec;
mod toml_form;
mod toml_text;

use std::fmt;
use std::sync::Arc;

use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Direction, PAGE_SIZE};

pub use draw::Draw;
pub use presets::{PRESETS, Preset};
pub use r11::{Anchor, NAMED as NAMED_R11, R11, SharedBit};
pub use script::{Said, Script};
pub use spec::{SPEC_HELP, SpecError};
pub use toml_form::{RuleForm, TomlError, rules};
pub use toml_text::write_rules;

use crate::pagemap::Pages;

/// One valid MapGPA call: 4 KiB aligned, not empty, all of it legal and in one alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Index of the calling vCPU.
    pub vcpu: u32,
    /// Which MapGPA call of this vCPU it is, from 1.
    pub call: u64,
    /// R12: start GPA in bytes, with the shared bit as the guest set it.
    pub raw_gpa: u64,
    /// Start GPA in bytes without the shared bit.
    pub gpa: u64,
    /// R13: size in bytes.
    pub size: u64,
    /// Direction, from the shared bit.
    pub to: Direction,
    /// The guest's shared bit.
    pub shared_bit: u64,
}

impl Request {
    /// The pages asked for.
    #[must_use]
    pub const fn pages(&self) -> Pages {
        Pages::of_bytes(self.gpa, self.size)
    }
}

/// What a policy may know beside the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Context {
    /// The run's seed.
    pub seed: u64,
    /// Replies given in this conversation so far.
    pub replies: u64,
    /// The last replies in a row that made no progress.
    pub no_progress: u64,
    /// A conversation of another vCPU that is under way overlaps this request.
    pub overlap: bool,
}

/// How much of a request is converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// All of it.
    All,
    /// This many 4 KiB pages; pages in the target state already do not count.
    Pages(u64),
    /// What a time budget allows, in nanoseconds, at a cost a page in nanoseconds; without a cost
    /// as much as the machine does in that time, which no seed reproduces.
    Budget {
        /// The budget of one call.
        budget_ns: u64,
        /// The cost of one page.
        cost_ns: Option<u64>,
    },
}

/// What is said about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Say {
    /// The truth: SUCCESS when all is converted, else RETRY with the first page that is not.
    Truth,
    /// RETRY with this R11, unless all is converted.
    Retry(R11),
    /// This status. R11 is what GHCI and KVM put there.
    Status(u64),
    /// This status, with an R11 that has no meaning there.
    StatusAt(u64, R11),
    /// SUCCESS, whatever was converted.
    Success,
}

/// A policy's answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// How much is converted now.
    pub convert: Amount,
    /// What is said.
    pub say: Say,
    /// This is what the policy is about, if it shows (a partial conversion, or a reply other than
    /// the truth); else it is what comes before or beside it.
    pub special: bool,
    /// The host does not remove the private pages: they come back with contents and acceptance.
    pub keep: bool,
}

/// How often a position is answered RETRY-at-start before it progresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stall {
    /// This many times.
    Times(u64),
    /// It never progresses.
    Forever,
}

/// How TDG.MEM.PAGE.ACCEPT answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AcceptAnswer {
    /// As the state of the pages says.
    #[default]
    Truth,
    /// The page was never removed: old contents and acceptance stay.
    Already,
    /// The host mapped 4 KiB pages: a 2 MiB accept answers PAGE_SIZE_MISMATCH.
    Mismatch,
    /// The page is not there: the TD exits to the VMM and does not come back.
    Exit,
    /// The host has hold of the page's secure EPT entry at every other accept: OPERAND_BUSY.
    Busy,
    /// It never lets go.
    Stuck,
}

/// A seeded mix of behaviours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// True replies only, at most two in a row without progress.
    Legal,
    /// Those, and every kind of odd reply.
    Hostile,
}

/// What a rule does; the fields that a spec string leaves out have no effect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Action {
    /// How much each call converts.
    pub amount: Amount,
    /// The amount was asked for, and is not only the default of another behaviour.
    pub amount_given: bool,
    /// Replies without progress at each position.
    pub stall: Option<Stall>,
    /// Probability, 0 to 1, that a reply makes no progress.
    pub contention: Option<f64>,
    /// A reply other than the truth.
    pub odd: Option<Say>,
    /// Replies in the conversation before stall, contention or odd begins.
    pub after: u64,
    /// GPA_INUSE while another vCPU's conversation overlaps.
    pub overlap_inuse: bool,
    /// Accept answers.
    pub accept: AcceptAnswer,
    /// A seeded mix instead of the above.
    pub mix: Option<Mix>,
}

/// 64 KiB in pages: what a call converts where a chunk is needed and none is given.
pub const DEFAULT_CHUNK: u64 = (64 << 10) / PAGE_SIZE;

impl Action {
    /// Converts all of every request.
    pub const COMPLETE: Self = Self {
        amount: Amount::All,
        amount_given: false,
        stall: None,
        contention: None,
        odd: None,
        after: 0,
        overlap_inuse: false,
        accept: AcceptAnswer::Truth,
        mix: None,
    };

    fn decide(&self, request: &Request, context: &Context) -> Decision {
        if let Some(mix) = self.mix {
            return draw::decide(mix, request, context);
        }
        let keep = self.accept == AcceptAnswer::Already;
        let nothing = Amount::Pages(0);
        let decide = |convert, say, special| Decision { convert, say, special, keep };
        if self.overlap_inuse && context.overlap {
            return decide(nothing, Say::Status(status::GPA_INUSE), true);
        }
        if context.replies >= self.after {
            let stalls = match self.stall {
                None => false,
                Some(Stall::Times(times)) => context.no_progress < times,
                Some(Stall::Forever) => true,
            };
            let contended = self.contention.is_some_and(|probability| {
                Draw::for_call(context.seed, request.vcpu, request.call).chance(probability)
            });
            if stalls || contended {
                return decide(nothing, Say::Truth, true);
            }
            match self.odd {
                Some(say @ (Say::Status(_) | Say::StatusAt(..))) => {
                    return decide(nothing, say, true);
                }
                Some(Say::Success) => {
                    let convert = if self.amount_given { self.amount } else { nothing };
                    return decide(convert, Say::Success, true);
                }
                Some(say) => return decide(self.amount, say, true),
                None => {}
            }
        }
        // Beside a behaviour that may be yet to come, the amount is not what the policy is about.
        let amount_only = self.odd.is_none() && self.stall.is_none() && self.contention.is_none();
        decide(self.amount, Say::Truth, self.amount_given && amount_only)
    }

    /// Whether it says or does anything that a guest could notice.
    fn is_special(&self) -> bool {
        *self != Self::COMPLETE
    }
}

/// When a rule applies; a condition that is absent holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Conditions {
    /// Only requests in this direction.
    pub direction: Option<Direction>,
    /// Only these calls of a vCPU, first and last, from 1.
    pub calls: Option<(u64, u64)>,
    /// Only requests that start at these GPAs in bytes, first and last, without the shared bit.
    pub gpa: Option<(u64, u64)>,
    /// Only this vCPU.
    pub vcpu: Option<u32>,
}

impl Conditions {
    fn hold(&self, request: &Request) -> bool {
        let within = |range: Option<(u64, u64)>, value| {
            range.is_none_or(|(first, last)| (first..=last).contains(&value))
        };
        self.direction.is_none_or(|direction| direction == request.to)
            && within(self.calls, request.call)
            && within(self.gpa, request.gpa)
            && self.vcpu.is_none_or(|vcpu| vcpu == request.vcpu)
    }
}

/// Conditions and what is done when they hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// When it applies.
    pub when: Conditions,
    /// What it does.
    pub action: Action,
}

/// A policy: the first rule that applies decides; if none does, the request is completed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Policy {
    /// The spec string, or the name that a TOML file gives.
    pub name: String,
    /// The rules, in order.
    pub rules: Vec<Rule>,
    /// Recorded decisions, which go before the rules.
    pub script: Option<Arc<Script>>,
}

impl Policy {
    /// A policy of one rule without conditions.
    #[must_use]
    pub fn of(name: &str, action: Action) -> Self {
        let rules = vec![Rule { when: Conditions::default(), action }];
        Self { name: name.to_owned(), rules, script: None }
    }

    /// Reads a spec string, or the TOML file that it names (`*.toml`).
    ///
    /// # Errors
    /// The spec or the file is malformed; the error says where and what was expected.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        if std::path::Path::new(text).extension().is_some_and(|ext| ext == "toml") {
            return Ok(toml_form::read(text)?);
        }
        Ok(Self::of(text, spec::parse(text)?))
    }

    /// Reads the TOML form; `name` is what errors call the text, and the policy if it has no name.
    ///
    /// # Errors
    /// As [`Policy::parse`].
    pub fn from_toml(name: &str, text: &str) -> Result<Self, PolicyError> {
        Ok(toml_form::parse(name, text)?)
    }

    /// Decides one request.
    #[must_use]
    pub fn decide(&self, request: &Request, context: &Context) -> Decision {
        let decision = self
            .rules
            .iter()
            .find(|rule| rule.when.hold(request))
            .map_or(&Action::COMPLETE, |rule| &rule.action)
            .decide(request, context);
        match &self.script {
            None => decision,
            Some(script) => script.decide(request, decision),
        }
    }

    /// Decides how an accept on `vcpu` at `gpa` is answered; `accept` counts the accepts of that
    /// vCPU from 1. Rules with a condition on calls do not apply to accepts.
    #[must_use]
    pub fn decide_accept(&self, seed: u64, vcpu: u32, accept: u64, gpa: u64) -> AcceptAnswer {
        let as_request = Request {
            vcpu,
            call: 0,
            raw_gpa: gpa,
            gpa,
            size: PAGE_SIZE,
            to: Direction::ToPrivate,
            shared_bit: 0,
        };
        let rule = self.rules.iter().find(|rule| rule.when.hold(&as_request));
        match rule.map(|rule| rule.action) {
            Some(Action { mix: Some(_), .. }) => {
                let mismatch = Draw::for_accept(seed, vcpu, accept).chance(0.25);
                if mismatch { AcceptAnswer::Mismatch } else { AcceptAnswer::Truth }
            }
            Some(action) => action.accept,
            None => AcceptAnswer::Truth,
        }
    }

    /// Whether the policy is about something beside completing every request.
    #[must_use]
    pub fn is_special(&self) -> bool {
        self.rules.iter().any(|rule| rule.action.is_special())
    }

    /// Whether private pages keep their contents while they are shared.
    #[must_use]
    pub fn keeps_private(&self) -> bool {
        self.rules.iter().any(|rule| rule.action.accept == AcceptAnswer::Already)
    }

    /// Whether the same seed gives the same decisions.
    #[must_use]
    pub fn is_reproducible(&self) -> bool {
        !self
            .rules
            .iter()
            .any(|rule| matches!(rule.action.amount, Amount::Budget { cost_ns: None, .. }))
    }

    /// Why the policy cannot do what it is about when a guest converts in the directions `to`.
    #[must_use]
    pub fn cannot_apply(&self, to: &[Direction]) -> Option<&'static str> {
        let meets = |rule: &Rule| {
            let to_private = to.contains(&Direction::ToPrivate);
            let to_shared = to.contains(&Direction::ToShared);
            if rule.when.direction.is_some_and(|direction| !to.contains(&direction)) {
                return Err("its rules are for the other direction");
            }
            match rule.action {
                Action { accept: AcceptAnswer::Truth, odd, .. } => match odd {
                    Some(Say::Retry(R11 { bit: SharedBit::Strip, .. })) if !to_shared => {
                        Err("a request to private has no shared bit to strip")
                    }
                    _ => Ok(()),
                },
                _ if to_private => Ok(()),
                _ => Err("pages are accepted only after a conversion to private"),
            }
        };
        let special: Vec<_> = self.rules.iter().filter(|r| r.action.is_special()).collect();
        let results: Vec<_> = special.iter().map(|rule| meets(rule)).collect();
        if results.iter().any(Result::is_ok) {
            return None;
        }
        results.into_iter().find_map(Result::err)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A policy that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The spec string is malformed.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The TOML file is malformed, or cannot be read.
    #[error(transparent)]
    Toml(#[from] TomlError),
}
