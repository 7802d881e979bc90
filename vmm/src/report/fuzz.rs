//! A fuzz campaign for people.

use std::io::{self, Write};

use crate::fuzz::{FuzzReport, Shrinking};
use crate::units::show_nanos;

/// Writes what was run, and each finding with the file of its case, if `cases` says where that is.
///
/// # Errors
/// The output cannot be written.
pub fn write(out: &mut impl Write, report: &FuzzReport, cases: Option<&str>) -> io::Result<()> {
    let FuzzReport { guest, class, backend, seed, ran, reached, requests, .. } = report;
    let last = seed.saturating_add(report.seeds.saturating_sub(1));
    let whole = report.shards.iter().any(|shard| shard == "1/1");
    let shards = if whole { String::new() } else { format!(", shard {}", report.shards.join(" ")) };
    writeln!(
        out,
        "{guest} under {class} policies on {backend}, seeds {seed} to {last}{shards}: {ran} run, \
         {reached} of them {class} indeed"
    )?;
    writeln!(
        out,
        "{requests} requests in {}, {:.2} million a second",
        show_nanos(report.search_ns),
        rate(*requests, report.search_ns)
    )?;
    for finding in &report.findings {
        writeln!(
            out,
            "  {:<20} seed {}, of {} that fail it: {}",
            finding.check, finding.seed, finding.count, finding.detail
        )?;
        let rules = if finding.rules_found == 1 { "rule" } else { "rules" };
        writeln!(
            out,
            "    {} {rules} made {} ({}{}): {}",
            finding.rules_found,
            finding.rules,
            finding.class,
            match finding.shrinking {
                Shrinking::Done => "",
                Shrinking::OutOfRuns => ", all of --shrink-runs used",
                Shrinking::Unfinished => ", unfinished",
            },
            finding.policy.join("; ")
        )?;
        if let Some(cases) = cases {
            writeln!(out, "    {cases}/{}", report.case_name(finding))?;
        }
    }
    if report.findings.is_empty() {
        writeln!(out, "no check failed")?;
    }
    if report.left_out > 0 {
        let why = match (report.interrupted, report.unfinished) {
            (true, _) => "interrupted",
            (_, true) => "unfinished",
            _ => "the time was up",
        };
        writeln!(out, "{why}: {} seeds were not run", report.left_out)?;
    }
    Ok(())
}

/// Millions a second.
#[expect(clippy::cast_precision_loss, reason = "shown to three digits")]
#[must_use]
pub fn rate(requests: u64, ns: u64) -> f64 {
    if ns == 0 { 0.0 } else { requests as f64 * 1e3 / ns as f64 }
}
