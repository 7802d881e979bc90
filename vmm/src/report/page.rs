//! The page: charts and the figures behind them in one HTML file that needs no network.

use std::io::{self, Write};

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{charts, compare as compare_report, sweep as sweep_report, sweep_charts};
use crate::compare::{CompareReport, Outcome, Row};
use crate::sweep::{Cell, SweepReport};
use crate::units::show_size;

/// The style of the page: colours are variables, once for light and once for dark.
const STYLE: &str = include_str!("page.css");

/// Writes a page of a comparison, a sweep, or both.
///
/// # Errors
/// The output cannot be written.
pub fn write(
    out: &mut dyn Write,
    compared: Option<&CompareReport>,
    swept: Option<&SweepReport>,
) -> io::Result<()> {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                // No icon: a browser would ask a server for one.
                link rel="icon" href="data:,";
                title { "mapgpa: what chunking costs" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { "mapgpa" }
                    @if let Some(report) = compared { (comparison(report)) }
                    @if let Some(report) = swept { (sweep(report)) }
                }
            }
        }
    };
    out.write_all(page.into_string().as_bytes())
}

fn comparison(report: &CompareReport) -> Markup {
    html! {
        @for direction in report.directions() {
            @let rows = rows(report, direction);
            section {
                h2 { "What policies cost, " (direction) }
                p.under { (compare_report::headline(report, direction)) ". "
                    "Host kernel " (report.host.kernel) ", mapgpa " (report.host.mapgpa) "." }
                figure {
                    figcaption {
                        h3 { "Trade-off" }
                        p { "A host that converts more in a call is done sooner, and keeps the "
                            "guest waiting longer. Circles: the whole range asked for, each call "
                            "makes progress. Diamonds: others." }
                    }
                    div.chart { (charts::trade_off(&rows)) }
                    details { summary { "Figures" } (compare_report::costs(&rows).html("What conversions cost")) }
                }
                figure {
                    figcaption {
                        h3 { "Single calls" }
                        p { "What the guest feels: from its last return to its next. Read: this "
                            "share of the calls takes at most that long." }
                    }
                    div.chart { (charts::latencies(&rows)) }
                    details { summary { "Figures" } (compare_report::calls(&rows).html("Single calls")) }
                }
                (strips(report, &rows))
                @for row in rows.iter().filter(|row| row.outcome != Outcome::Completed) {
                    p.bad { (row.name()) ": " (row.outcome.words())
                        @if let Some(detail) = &row.detail { " (" (detail) ")" } }
                }
            }
        }
    }
}

fn rows<'a>(report: &'a CompareReport, direction: &str) -> Vec<&'a Row> {
    report.rows.iter().filter(|row| row.direction == direction).collect()
}

fn strips(report: &CompareReport, rows: &[&Row]) -> Markup {
    let strips: Vec<(String, Markup)> = rows
        .iter()
        .filter(|row| row.requests > 1)
        .filter_map(|row| Some((row.name(), charts::strip(row, report.range)?)))
        .collect();
    if strips.is_empty() {
        return html! {};
    }
    let mut table = super::table::Table::new(1, &["policy", "first 10 %", "half", "all"]);
    for row in rows.iter().filter(|row| row.requests > 1) {
        let when = |share: u64| {
            let mut sum = 0;
            let reached = row.steps.iter().find(|step| {
                sum += step.converted;
                sum * 100 >= row.pages * share
            });
            reached.map(|step| crate::units::show_nanos(step.at_ns)).unwrap_or_default()
        };
        table.row(vec![row.name(), when(10), when(50), when(100)]);
    }
    html! {
        figure {
            figcaption {
                h3 { "Page states over time" }
                p { "One conversation each: time across, addresses upwards. "
                    span.key.old {} " before, " span.key.new {} " after its conversion." }
            }
            div.strips {
                @for (name, strip) in &strips {
                    div { h4 { (name) } (strip) }
                }
            }
            details { summary { "Figures" } (table.html("When pages were converted")) }
        }
    }
}

fn sweep(report: &SweepReport) -> Markup {
    let maps = sweep_report::heat_maps(report);
    html! {
        section {
            h2 { "Which hosts a bound on retries survives" }
            p.under {
                (show_size(report.range)) " to shared; " (report.seeds) " conversions a cell where "
                "something is drawn, each with a seed of its own. "
                @match &report.not_verified {
                    Some(why) => { "No cell was run in a VM: " (why) "." }
                    None => { (sweep_report::agreement(report).join("; ")) "." }
                }
            }
            @if let Some(table) = sweep_report::kernel_table(report) {
                details { summary { "The model and the kernel" } (table.html("Cells run with a kernel")) }
            }
            @for map in &maps {
                figure {
                    figcaption {
                        h3 { (map.title) }
                        p { "Percentage that survives: the guest reports success, and all pages "
                            "are converted." }
                    }
                    div.chart { (sweep_charts::odds(map)) }
                    @if let Some(chart) = sweep_charts::closed_form(map) {
                        p.under { "Points: measured. Lines: what the bound alone gives, (1-p^b)^n." }
                        div.chart { (chart) }
                    }
                    @let cells: Vec<&Cell> =
                        map.rows.iter().flat_map(|(_, cells)| cells.iter().flatten().copied()).collect();
                    details { summary { "Figures, with the closed form (1-p^b)^n" }
                        (sweep_report::table(&cells).html("Cells")) }
                }
            }
        }
    }
}
