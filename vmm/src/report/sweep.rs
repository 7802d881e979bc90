//! A sweep as heat maps for people, and as CSV for programs.

use std::io::{self, Write};

use super::table::Table;
use crate::sweep::{Cell, SweepReport};
use crate::units::{show_nanos, show_size};

/// A share from which on a host counts as survived.
pub const SURVIVED: f64 = 0.99;

/// The cells of one guest, as a heat map: hosts' chunks across, their stalls and contentions down.
#[derive(Debug, Clone)]
pub struct HeatMap<'a> {
    /// The guest, its bound, and what it asks for at a time.
    pub title: String,
    /// Chunk sizes in bytes, one a column.
    pub chunks: Vec<u64>,
    /// A name a row, and its cells; a cell may be missing.
    pub rows: Vec<(String, Vec<Option<&'a Cell>>)>,
}

impl Cell {
    /// The guest, its bound, and what it asks for at a time.
    #[must_use]
    pub fn guest_name(&self) -> String {
        let bound = match (self.retries, self.bound) {
            (false, _) => "no retry".to_owned(),
            (true, Some(bound)) => format!("bound {bound}"),
            (true, None) => "no bound".to_owned(),
        };
        let asks = self.guest_chunk.map(|chunk| format!(", asks for {}", show_size(chunk)));
        format!("{}, {bound}{}", self.guest, asks.unwrap_or_default())
    }

    /// What each position meets.
    #[must_use]
    pub fn trouble_name(&self) -> String {
        match (self.stall, self.contention) {
            (Some(stall), _) => format!("stall {stall}"),
            (None, Some(p)) => format!("contention {p}"),
            (None, None) => String::new(),
        }
    }
}

/// The heat maps of a sweep, in order of its guests.
#[must_use]
pub fn heat_maps(report: &SweepReport) -> Vec<HeatMap<'_>> {
    let mut maps: Vec<HeatMap<'_>> = Vec::new();
    let mut chunks: Vec<u64> = report.cells.iter().map(|cell| cell.chunk).collect();
    chunks.sort_unstable();
    chunks.dedup();
    for cell in &report.cells {
        let title = cell.guest_name();
        if maps.last().is_none_or(|map| map.title != title) {
            maps.push(HeatMap { title, chunks: chunks.clone(), rows: Vec::new() });
        }
        let Some(map) = maps.last_mut() else { continue };
        let name = cell.trouble_name();
        if map.rows.last().is_none_or(|(last, _)| *last != name) {
            map.rows.push((name, vec![None; chunks.len()]));
        }
        let column = chunks.iter().position(|chunk| *chunk == cell.chunk);
        if let (Some((_, row)), Some(column)) = (map.rows.last_mut(), column) {
            row[column] = Some(cell);
        }
    }
    maps
}

/// A share as a percentage that is 0 or 100 only if it is.
#[must_use]
pub fn percent(share: f64) -> String {
    match share {
        0.0 => "0".to_owned(),
        1.0.. => "100".to_owned(),
        _ if share < 0.01 => "<1".to_owned(),
        _ if share > 0.99 => ">99".to_owned(),
        _ => format!("{:.0}", share * 100.0),
    }
}

/// Writes the sweep for the terminal, in colour if wanted.
///
/// # Errors
/// The output cannot be written.
pub fn write(out: &mut dyn Write, report: &SweepReport, colour: bool) -> io::Result<()> {
    writeln!(
        out,
        "Conversions of {} to shared that survive, in percent; chunk of the host across; {} seeds \
         where something is drawn",
        show_size(report.range),
        report.seeds
    )?;
    for map in heat_maps(report) {
        writeln!(out, "\n{}", map.title)?;
        heat_map(out, &map, colour)?;
    }
    writeln!(out)?;
    let drawn: Vec<&Cell> = report.cells.iter().filter(|cell| cell.contention.is_some()).collect();
    let against: Vec<&&Cell> = drawn.iter().filter(|cell| cell.contradicts()).collect();
    writeln!(
        out,
        "closed form (1-p^b)^n: outside the 95 % interval of {} of {} cells with contention",
        against.len(),
        drawn.len()
    )?;
    for cell in against.iter().take(5) {
        writeln!(
            out,
            "  {} under {}: {} of {} survive, the closed form says {:.1} %",
            cell.guest_name(),
            cell.policy,
            cell.survived,
            cell.runs,
            cell.closed_form * 100.0
        )?;
    }
    for cell in report.cells.iter().filter(|cell| cell.stall.is_some() && cell.contradicts()) {
        writeln!(
            out,
            "  {} under {}: its bound alone would say {:.0} %, measured {}",
            cell.guest_name(),
            cell.policy,
            cell.closed_form * 100.0,
            cell.share().map(percent).unwrap_or_default()
        )?;
    }
    for cell in report.cells.iter().filter(|cell| cell.error.is_some()) {
        let error = cell.error.as_deref().unwrap_or_default();
        writeln!(out, "  {} under {} could not be run: {error}", cell.guest_name(), cell.policy)?;
    }
    for cell in report.cells.iter().filter(|cell| cell.timed_out > 0) {
        writeln!(out, "  {} under {} timed out", cell.guest_name(), cell.policy)?;
    }
    verified(out, report)?;
    let runs: u64 = report.cells.iter().map(|cell| cell.runs).sum();
    let interrupted = match (report.interrupted, report.unfinished) {
        (true, _) => ", interrupted",
        (_, true) => ", unfinished",
        _ => "",
    };
    writeln!(
        out,
        "{} cells, {runs} conversions in {}{interrupted}",
        report.cells.len(),
        show_nanos(report.wall_ns)
    )
}

fn heat_map(out: &mut dyn Write, map: &HeatMap<'_>, colour: bool) -> io::Result<()> {
    let names = map.rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    write!(out, "  {:names$}", "")?;
    for chunk in &map.chunks {
        write!(out, "{:>5}", show_size(*chunk))?;
    }
    writeln!(out, "   survived from")?;
    for (name, cells) in &map.rows {
        write!(out, "  {name:<names$}")?;
        for cell in cells {
            let share = cell.and_then(Cell::share);
            let text = share.map_or_else(|| "?".to_owned(), percent);
            match share.filter(|_| colour) {
                // From red to green, dark text on it, in the 6x6x6 colours of terminals.
                Some(share) => {
                    let code = if share >= SURVIVED {
                        78
                    } else if share >= 0.5 {
                        222
                    } else if share > 0.0 {
                        215
                    } else {
                        203
                    };
                    write!(out, "\x1b[30;48;5;{code}m{text:>5}\x1b[0m")?;
                }
                None => write!(out, "{text:>5}")?,
            }
        }
        writeln!(out, "   {}", survived_from(cells))?;
    }
    Ok(())
}

/// The least chunk from which on all are survived.
fn survived_from(cells: &[Option<&Cell>]) -> String {
    let good =
        |cell: &&Option<&Cell>| cell.and_then(Cell::share).is_some_and(|share| share >= SURVIVED);
    match cells.iter().rev().take_while(good).last() {
        Some(Some(cell)) => show_size(cell.chunk),
        _ => "never".to_owned(),
    }
}

fn verified(out: &mut dyn Write, report: &SweepReport) -> io::Result<()> {
    if let Some(why) = &report.not_verified {
        return writeln!(out, "no cell was run in a VM: {why}");
    }
    for line in agreement(report) {
        writeln!(out, "{line}")?;
    }
    for cell in report.verified.iter().filter(|cell| cell.kernel.is_none() && !cell.agrees()) {
        let found = match (&cell.error, cell.vm_survived, cell.vm_calls) {
            (Some(error), ..) => error.clone(),
            (None, survived, calls) => format!(
                "survived {}, {} calls here; {}, {} in the VM",
                cell.survived,
                cell.calls,
                survived.unwrap_or_default(),
                calls.unwrap_or_default()
            ),
        };
        writeln!(out, "  {} under {}: {found}", cell.guest, cell.policy)?;
    }
    match kernel_table(report) {
        Some(table) => table.write(out),
        None => Ok(()),
    }
}

/// How many of the cells run in VMs agree: a line for guest tests, and one for a kernel.
#[must_use]
pub fn agreement(report: &SweepReport) -> Vec<String> {
    let of =
        |kernel: bool| report.verified.iter().filter(move |cell| cell.kernel.is_some() == kernel);
    let mut lines = vec![format!(
        "{} of {} cells run in VMs agree in verdict and calls",
        of(false).filter(|cell| cell.agrees()).count(),
        of(false).count()
    )];
    if let Some((first, kernel)) = of(true).find_map(|cell| Some((cell, cell.kernel.as_ref()?))) {
        lines.push(format!(
            "{} of {} cells of {} run with {kernel} agree in verdict and calls",
            of(true).filter(|cell| cell.agrees()).count(),
            of(true).count(),
            first.guest,
        ));
    }
    lines
}

/// The cells run with a kernel, if any: what the model says, and what the kernel does.
#[must_use]
pub fn kernel_table(report: &SweepReport) -> Option<Table> {
    let mut cells = report.verified.iter().filter(|cell| cell.kernel.is_some()).peekable();
    cells.peek()?;
    let verdict = |survived: bool| if survived { "survives" } else { "gives up" }.to_owned();
    let mut table = Table::new(1, &["host", "the model", "calls", "the kernel", "calls", "agree"]);
    for cell in cells {
        table.row(vec![
            cell.policy.clone(),
            verdict(cell.survived),
            cell.calls.to_string(),
            match &cell.error {
                Some(error) => error.clone(),
                None => cell.vm_survived.map(verdict).unwrap_or_default(),
            },
            cell.vm_calls.map(|calls| calls.to_string()).unwrap_or_default(),
            if cell.agrees() { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    Some(table)
}

/// All cells as a table.
#[must_use]
pub fn table(cells: &[&Cell]) -> Table {
    let mut table = Table::new(
        2,
        &[
            "guest",
            "host",
            "positions",
            "runs",
            "survive",
            "95 % interval",
            "closed form",
            "mean calls",
        ],
    );
    for cell in cells {
        table.row(vec![
            cell.guest_name(),
            cell.policy.clone(),
            cell.positions.to_string(),
            cell.runs.to_string(),
            cell.share().map(|share| format!("{} %", percent(share))).unwrap_or_default(),
            match cell.contention {
                Some(_) => format!("{:.1} to {:.1} %", cell.low * 100.0, cell.high * 100.0),
                None => "nothing drawn".to_owned(),
            },
            format!("{:.1} %", cell.closed_form * 100.0),
            cell.calls.map(|calls| format!("{calls:.0}")).unwrap_or_default(),
        ]);
    }
    table
}

/// The columns of the CSV: one cell a line, probabilities from 0 to 1, sizes in bytes.
const CSV_HEAD: [&str; 18] = [
    "guest",
    "bound",
    "guest_chunk",
    "policy",
    "chunk",
    "stall",
    "contention",
    "range",
    "positions",
    "runs",
    "survived",
    "share",
    "low",
    "high",
    "closed_form",
    "calls",
    "calls_survived",
    "timed_out",
];

/// Writes the sweep as CSV; what does not apply is empty.
///
/// # Errors
/// The output cannot be written.
pub fn csv(out: &mut dyn Write, report: &SweepReport) -> io::Result<()> {
    fn text<T: ToString>(value: Option<T>) -> String {
        value.map(|value| value.to_string()).unwrap_or_default()
    }
    let mut csv = csv::Writer::from_writer(out);
    csv.write_record(CSV_HEAD)?;
    for cell in &report.cells {
        csv.write_record([
            cell.guest.clone(),
            text(cell.bound),
            text(cell.guest_chunk),
            cell.policy.clone(),
            cell.chunk.to_string(),
            text(cell.stall),
            text(cell.contention),
            report.range.to_string(),
            cell.positions.to_string(),
            cell.runs.to_string(),
            cell.survived.to_string(),
            text(cell.share()),
            cell.low.to_string(),
            cell.high.to_string(),
            cell.closed_form.to_string(),
            text(cell.calls),
            text(cell.calls_survived),
            cell.timed_out.to_string(),
        ])?;
    }
    csv.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_is_0_or_100() {
        for (share, text) in [(0.0, "0"), (0.004, "<1"), (0.5, "50"), (0.996, ">99"), (1.0, "100")]
        {
            assert_eq!(percent(share), text);
        }
    }
}
