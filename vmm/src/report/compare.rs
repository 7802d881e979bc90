//! A comparison as tables for people, and as CSV for programs.

use std::io::{self, Write};

use super::table::{Table, bar};
use crate::compare::{CompareReport, Latency, Outcome, Row, Spread};
use crate::units::{show_nanos, show_size};

/// Characters of a bar in the terminal.
const BAR: usize = 12;

/// Writes the comparison for the terminal.
///
/// # Errors
/// The output cannot be written.
pub fn write(out: &mut dyn Write, report: &CompareReport) -> io::Result<()> {
    for direction in report.directions() {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.direction == direction).collect();
        writeln!(out, "{}", headline(report, direction))?;
        writeln!(out)?;
        costs(&rows).write(out)?;
        writeln!(out)?;
        calls(&rows).write(out)?;
        writeln!(out)?;
        for row in rows.iter().filter(|row| row.detail.is_some()) {
            let detail = row.detail.as_deref().unwrap_or_default();
            writeln!(out, "{}: {}: {detail}", row.name(), row.outcome.words())?;
        }
    }
    let interrupted = if report.interrupted { ", interrupted" } else { "" };
    writeln!(
        out,
        "{} runs in {}{interrupted}; a figure is the median of its runs, +- half of min to max; \
         a call is timed from the guest's last return to its next",
        report.rows.iter().map(|row| row.runs).sum::<usize>(),
        show_nanos(report.wall_ns)
    )
}

/// What was compared, in a line.
#[must_use]
pub fn headline(report: &CompareReport, direction: &str) -> String {
    let vcpus = if report.vcpus == 1 { String::new() } else { format!(", {} vCPUs", report.vcpus) };
    let front_end = match report.front_end {
        "direct" => String::new(),
        name => format!(", front-end {name}"),
    };
    format!(
        "{} {direction} {}, {} (memory model {}){front_end}{vcpus}, {} repeats in turn",
        report.guest,
        show_size(report.range),
        report.backend,
        report.memory_model,
        report.repeats,
    )
}

impl CompareReport {
    /// The directions of its rows, in order.
    #[must_use]
    pub fn directions(&self) -> Vec<&'static str> {
        let mut directions: Vec<_> = self.rows.iter().map(|row| row.direction).collect();
        directions.dedup();
        directions
    }
}

impl Row {
    /// The policy and, if there is one, the guest-side chunk.
    #[must_use]
    pub fn name(&self) -> String {
        match self.guest_chunk {
            Some(chunk) => format!("{}, guest asks {}", self.policy, show_size(chunk)),
            None => self.policy.clone(),
        }
    }
}

/// What conversions cost in all.
#[must_use]
pub fn costs(rows: &[&Row]) -> Table {
    const HEAD: [&str; 13] = [
        "policy",
        "guest asks",
        "requests",
        "retries",
        "no progress",
        "exits",
        "handler",
        "conversion",
        "+-",
        "GiB/s",
        "to complete",
        "",
        "to floor",
    ];
    let mut table = Table::new(2, &HEAD);
    let longest = most(rows, |row| row.conversion_ns);
    for row in rows {
        let (time, spread) = match row.conversion_ns {
            Some(time) => (nanos(time.median), deviation(time)),
            None if row.outcome == Outcome::Completed => (String::new(), String::new()),
            None => (row.outcome.words().to_owned(), String::new()),
        };
        let share = row.conversion_ns.map_or(0.0, |time| time.median / longest);
        table.row(vec![
            row.policy.clone(),
            row.guest_chunk.map_or_else(|| "all".to_owned(), show_size),
            row.requests.to_string(),
            row.retries.to_string(),
            row.no_progress.to_string(),
            row.exits.to_string(),
            row.handler_ns.map(|time| nanos(time.median)).unwrap_or_default(),
            time,
            spread,
            row.gib_per_s.map(|rate| figure(rate.median)).unwrap_or_default(),
            row.to_complete.map(|ratio| format!("{} x", figure(ratio.median))).unwrap_or_default(),
            bar(share, BAR),
            row.to_floor.map(|ratio| format!("{:.2} x", ratio.median)).unwrap_or_default(),
        ]);
    }
    if rows.iter().all(|row| row.to_floor.is_none()) {
        table.remove(12);
    }
    if rows.iter().all(|row| row.guest_chunk.is_none()) {
        table.remove(1);
    }
    table
}

/// What single calls take, and what they cost the host.
#[must_use]
pub fn calls(rows: &[&Row]) -> Table {
    const HEAD: [&str; 10] = [
        "policy",
        "guest asks",
        "median call",
        "99th percentile",
        "99.9th",
        "longest",
        "+-",
        "",
        "host calls",
        "host pages",
    ];
    let mut table = Table::new(2, &HEAD);
    let longest = most(rows, |row| row.latency.as_ref().map(|latency| latency.longest_ns));
    let of = |latency: Option<&Latency>, value: fn(&Latency) -> u64| {
        latency.map(|latency| show_nanos(value(latency))).unwrap_or_default()
    };
    for row in rows {
        let latency = row.latency.as_ref();
        let most = latency.map(|latency| latency.longest_ns);
        // From a microsecond on, by powers: the longest calls differ by orders of magnitude.
        let share = most
            .map_or(0.0, |most| ((most.median / 1e3).ln() / (longest / 1e3).ln()).clamp(0.0, 1.0));
        table.row(vec![
            row.policy.clone(),
            row.guest_chunk.map_or_else(|| "all".to_owned(), show_size),
            of(latency, |latency| latency.p50_ns),
            of(latency, |latency| latency.p99_ns),
            of(latency, |latency| latency.p999_ns),
            most.map(|most| nanos(most.median)).unwrap_or_default(),
            most.map(deviation).unwrap_or_default(),
            bar(share, BAR),
            row.host_calls.to_string(),
            row.host_pages.to_string(),
        ]);
    }
    if rows.iter().all(|row| row.guest_chunk.is_none()) {
        table.remove(1);
    }
    table
}

fn most(rows: &[&Row], value: impl Fn(&Row) -> Option<Spread>) -> f64 {
    rows.iter().filter_map(|row| value(row)).map(|spread| spread.median).fold(1.0, f64::max)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it was a u64")]
fn nanos(value: f64) -> String {
    show_nanos(value as u64)
}

/// Half of the way from the least to the most, to the median.
fn deviation(spread: Spread) -> String {
    if spread.median > 0.0 {
        format!("{:.0} %", (spread.max - spread.min) / 2.0 / spread.median * 100.0)
    } else {
        String::new()
    }
}

/// Three digits.
fn figure(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The columns of the CSV: times in nanoseconds, sizes in bytes, one row a line.
const CSV_HEAD: [&str; 37] = [
    "guest",
    "backend",
    "front_end",
    "memory_model",
    "range",
    "direction",
    "policy",
    "guest_chunk",
    "outcome",
    "runs",
    "requests",
    "retries",
    "no_progress",
    "exits",
    "pages",
    "host_calls",
    "host_pages",
    "handler_ns",
    "handler_ns_min",
    "handler_ns_max",
    "conversion_ns",
    "conversion_ns_min",
    "conversion_ns_max",
    "gib_per_s",
    "to_complete",
    "to_complete_min",
    "to_complete_max",
    "floor_ns",
    "to_floor",
    "to_floor_min",
    "to_floor_max",
    "call_p50_ns",
    "call_p99_ns",
    "call_p999_ns",
    "call_longest_ns",
    "call_longest_ns_min",
    "call_longest_ns_max",
];

/// Writes the comparison as CSV; what was not measured is empty.
///
/// # Errors
/// The output cannot be written.
pub fn csv(out: &mut dyn Write, report: &CompareReport) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    csv.write_record(CSV_HEAD)?;
    for row in &report.rows {
        let mut line = vec![
            report.guest.clone(),
            report.backend.to_owned(),
            report.front_end.to_owned(),
            report.memory_model.to_owned(),
            report.range.to_string(),
            row.direction.to_owned(),
            row.policy.clone(),
            row.guest_chunk.map(|chunk| chunk.to_string()).unwrap_or_default(),
            row.outcome.words().to_owned(),
            row.runs.to_string(),
        ];
        let counts = [
            row.requests,
            row.retries,
            row.no_progress,
            row.exits,
            row.pages,
            row.host_calls,
            row.host_pages,
        ];
        line.extend(counts.map(|count| count.to_string()));
        let of = |spread: Option<Spread>, value: fn(Spread) -> f64| {
            spread.map(|spread| value(spread).to_string()).unwrap_or_default()
        };
        let all = |spread| [of(spread, |s| s.median), of(spread, |s| s.min), of(spread, |s| s.max)];
        line.extend(all(row.handler_ns));
        line.extend(all(row.conversion_ns));
        line.push(of(row.gib_per_s, |rate| rate.median));
        line.extend(all(row.to_complete));
        line.push(of(row.floor_ns, |time| time.median));
        line.extend(all(row.to_floor));
        let latency = row.latency.as_ref();
        let calls = latency.map(|l| [l.p50_ns, l.p99_ns, l.p999_ns].map(|ns| ns.to_string()));
        line.extend(calls.unwrap_or_default());
        line.extend(all(latency.map(|latency| latency.longest_ns)));
        csv.write_record(line)?;
    }
    csv.flush()
}
