//! Reports for people: a run, and what a policy says.

use std::io::{self, Write};

use mapgpa_abi::Direction;
use mapgpa_abi::tdcall::status;

use super::{RunReport, Verdict, rows};
use crate::engine::Call;
use crate::explain::Explained;
use crate::judge::Check;
use crate::units::{show_nanos, show_size};

/// Violations listed of one check.
const SAME: usize = 3;

/// Writes the report of a run.
///
/// # Errors
/// The output cannot be written.
pub fn run(out: &mut impl Write, report: &RunReport) -> io::Result<()> {
    let verdict = match report.verdict {
        Verdict::Pass => "PASS",
        Verdict::Fail => "FAIL",
        Verdict::NotExercised => "NOT EXERCISED",
        Verdict::Error => "ERROR",
    };
    let class = format!("{:?}", report.class).to_lowercase();
    let result = format!("{:?}", report.guest_result).to_lowercase();
    writeln!(
        out,
        "{verdict}  {} under {} ({class}), {} {}, {} with GPAW {}; the guest's result: {result}",
        report.guest,
        report.policy,
        if report.direction == "any" { "conversions of" } else { &*report.direction },
        show_size(report.range),
        report.backend,
        report.gpaw
    )?;
    if let Some(kernel) = &report.kernel {
        writeln!(
            out,
            "  Linux {}, {} vCPU, {} of memory, {} TDCALLs replaced",
            kernel.version.as_deref().unwrap_or("of an unknown release"),
            kernel.vcpus,
            show_size(kernel.memory),
            kernel.sites
        )?;
    }
    if let Some(firmware) = &report.firmware {
        writeln!(
            out,
            "  TDVF of {}, {} of memory; TDCALLs replaced: {} in place, {} in memory ({} in its \
             compressed volume); hooks: {}",
            show_size(firmware.size as u64),
            show_size(firmware.memory),
            firmware.sec_sites,
            firmware.memory_sites,
            firmware.packed_sites,
            firmware.hooks
        )?;
    }
    if !report.phases.is_empty() {
        let phases = report.phases.iter();
        let phases = phases.map(|row| format!("{} {}", row.phase.name(), show_nanos(row.t_ns)));
        writeln!(out, "  phases: {}", phases.collect::<Vec<_>>().join(", "))?;
    }
    if report.verdict == Verdict::NotExercised {
        writeln!(out, "  what the policy is about never occurred: the run shows nothing")?;
    }
    let mut shown: Vec<Check> = Vec::new();
    for violation in &report.violations {
        shown.push(violation.check);
        if shown.iter().filter(|check| **check == violation.check).count() > SAME {
            continue;
        }
        let gpa = violation.gpa.map(|gpa| format!(" at {gpa:#x}")).unwrap_or_default();
        let phase = violation.phase.map(|phase| format!(", {}", phase.name())).unwrap_or_default();
        writeln!(
            out,
            "  {:<20} call {}{gpa}{phase}: {}",
            violation.check.to_string(),
            violation.call,
            violation.detail
        )?;
    }
    for check in report.failed_checks() {
        let more = shown.iter().filter(|shown| **shown == check).count().saturating_sub(SAME);
        if more > 0 {
            writeln!(out, "  {:<20} {more} more, all in --format json", check.to_string())?;
        }
    }
    for note in &report.notes {
        writeln!(out, "  note: {note}")?;
    }
    for check in &report.checks_off {
        writeln!(out, "  not checked here: {check} (docs/checks.md says why)")?;
    }
    rows::write(out, &report.conversations)?;
    let totals = &report.totals;
    writeln!(
        out,
        "  calls {}, retries {}, without progress {}; pages shared {}, private {}, accepted {}; \
         exits {}; in the handler {}, longest call {}, in all {}",
        totals.calls,
        totals.retries,
        totals.no_progress,
        totals.pages_to_shared,
        totals.pages_to_private,
        totals.pages_accepted,
        totals.exits,
        show_nanos(totals.handler_ns),
        show_nanos(totals.max_call_ns),
        show_nanos(totals.wall_ns)
    )
}

/// Writes what a policy says, at most `limit` calls of it.
///
/// # Errors
/// The output cannot be written.
pub fn explain(out: &mut impl Write, explained: &Explained, limit: usize) -> io::Result<()> {
    let calls = &explained.calls;
    writeln!(
        out,
        "{:>6}  {:<8} {:>18} {:>8} {:>9}  reply",
        "call", "to", "gpa", "size", "converted"
    )?;
    let head = if calls.len() > limit { limit.div_ceil(2) } else { calls.len() };
    let tail = calls.len().saturating_sub(limit - head.min(limit)).max(head);
    for call in &calls[..head] {
        explain_call(out, call)?;
    }
    if tail > head {
        writeln!(out, "        ... calls not shown: {}", tail - head)?;
    }
    for call in &calls[tail..] {
        explain_call(out, call)?;
    }
    let class = format!("{:?}", explained.class).to_lowercase();
    let retries = calls.iter().filter(|call| call.status == status::RETRY).count();
    writeln!(out, "calls {}, answered RETRY {retries}; class {class}", calls.len())?;
    if !explained.ended {
        writeln!(out, "a guest that does all that it is told never gets through")?;
    }
    if !explained.exercised {
        writeln!(out, "with this range and direction, what the policy is about never occurs")?;
    }
    Ok(())
}

fn explain_call(out: &mut impl Write, call: &Call) -> io::Result<()> {
    let to = match call.to {
        Direction::ToShared => "shared",
        Direction::ToPrivate => "private",
    };
    let reply = match call.status {
        status::SUCCESS => "SUCCESS".to_owned(),
        status::RETRY => format!("RETRY            R11 {:#x}", call.r11),
        status::INVALID_OPERAND => format!("INVALID_OPERAND  R11 {:#x}", call.r11),
        status::GPA_INUSE => format!("GPA_INUSE        R11 {:#x}", call.r11),
        status::ALIGN_ERROR => format!("ALIGN_ERROR      R11 {:#x}", call.r11),
        other => format!("{other:#x}"),
    };
    writeln!(
        out,
        "{:>6}  {to:<8} {:>#18x} {:>8} {:>9}  {reply}",
        call.call,
        call.raw_gpa,
        show_size(call.size),
        show_size(call.converted * mapgpa_abi::PAGE_SIZE)
    )
}
