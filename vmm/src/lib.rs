//! `mapgpa`: a KVM test VMM that answers a TDX guest's MapGPA calls by a policy, and judges the
//! guest's retry logic.
//!
//! One call goes through these modules in order: [`backend`] (an exit), [`tdcall`] (a request),
//! [`policy`] (a decision), [`engine`] (pages converted, a reply, events), [`judge`] (checks), and
//! [`report`]. docs/architecture.md is the map.

pub mod backend;
pub mod case;
pub mod cli;
pub mod compare;
pub mod engine;
pub mod expect;
pub mod explain;
pub mod express;
pub mod firmware;
pub mod fuzz;
pub mod host;
pub mod interrupt;
pub mod judge;
pub mod linux;
pub mod memory;
pub mod merge;
pub mod pagemap;
pub mod patch;
pub mod platform;
pub mod policy;
pub mod replay;
pub mod report;
pub mod suite;
pub mod sweep;
pub mod tdcall;
pub mod units;
mod workers;

/// `text` with control characters escaped, so that it stays on its line and moves no cursor.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { printable.extend(c.escape_default()) } else { printable.push(c) }
    }
    printable
}

/// An error and what caused it, in one line.
#[must_use]
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    printable(&line)
}
