//! Charts of a sweep: the heat map of a guest's odds, and its measurement beside the closed form.

use std::sync::Arc;

use kuva::plot::line::LinePlot;
use kuva::plot::scatter::ScatterPlot;
use kuva::plot::{ColorMap, Heatmap};
use kuva::render::annotations::TextAnnotation;
use kuva::render::layout::TickFormat;
use kuva::render::plots::Plot;
use maud::{Markup, html};

use super::charts::{colour, float, layout, legend, size_ticks, svg};
use super::sweep::{HeatMap, percent};
use crate::sweep::Cell;
use crate::units::show_size;

/// The heat map of a guest's odds.
#[must_use]
pub fn odds(map: &HeatMap<'_>) -> Markup {
    let share = |cell: &Option<&Cell>| cell.and_then(Cell::share).unwrap_or(0.0);
    // kuva draws the first row lowest.
    let rows: Vec<_> = map.rows.iter().rev().collect();
    let data: Vec<Vec<f64>> =
        rows.iter().map(|(_, cells)| cells.iter().map(share).collect()).collect();
    let least = data.iter().flatten().copied().fold(1.0, f64::min);
    let most = data.iter().flatten().copied().fold(0.0, f64::max);
    let colours = ColorMap::Custom(Arc::new(move |t| {
        let share = least + t * (most - least);
        format!("color-mix(in oklab, var(--good) {:.0}%, var(--bad))", share * 100.0)
    }));
    let tips = rows.iter().flat_map(|(name, cells)| {
        cells.iter().map(move |cell| match cell {
            Some(cell) => format!(
                "chunk {}, {name}: {} of {} survive; closed form {:.1} %",
                show_size(cell.chunk),
                cell.survived,
                cell.runs,
                cell.closed_form * 100.0
            ),
            None => "not run".to_owned(),
        })
    });
    let heat = Heatmap::new().with_data(data).with_color_map(colours).with_tooltip_labels(tips);
    let plots = vec![Plot::Heatmap(heat)];
    let height = 90.0 + 26.0 * rows.len() as f64;
    let mut layout = layout(&plots, 760.0, height)
        .with_x_categories(map.chunks.iter().map(|chunk| show_size(*chunk)).collect())
        .with_y_categories(rows.iter().map(|(name, _)| name.clone()).collect())
        .with_x_label("bytes that a call converts")
        .with_show_grid(false);
    layout.show_colorbar = false;
    for (line, (_, cells)) in (1_u32..).zip(&rows) {
        for (column, cell) in (1_u32..).zip(cells) {
            let text = cell.and_then(Cell::share).map_or_else(|| "?".to_owned(), percent);
            // The text stands 6 pixels above its anchor.
            let at = TextAnnotation::new(text, f64::from(column), f64::from(line) - 0.42)
                .with_color("var(--cell)")
                .with_font_size(12);
            layout = layout.with_annotation(at);
        }
    }
    svg(plots, layout, &format!("Share of conversions that {} survives", map.title))
}

/// The share that survives by the host's chunk, a colour for each contention: measured as points, and
/// what the bound alone gives, (1-p^b)^n, as lines. Nothing if nothing is drawn.
#[must_use]
pub fn closed_form(map: &HeatMap<'_>) -> Option<Markup> {
    let mut plots: Vec<Plot> = Vec::new();
    let mut names = Vec::new();
    for (name, cells) in &map.rows {
        let drawn = |cell: &&Cell| cell.contention.is_some_and(|p| p > 0.0);
        let cells: Vec<&Cell> = cells.iter().flatten().copied().filter(drawn).collect();
        if cells.is_empty() {
            continue;
        }
        let log = |cell: &Cell| float(cell.chunk).log2();
        let measured = cells.iter().filter_map(|cell| Some((log(cell), cell.share()? * 100.0)));
        plots.push(
            LinePlot::new()
                .with_data(cells.iter().map(|cell| (log(cell), cell.closed_form * 100.0)))
                .with_color(colour(names.len()))
                .with_stroke_width(1.5)
                .into(),
        );
        plots.push(
            ScatterPlot::new()
                .with_data(measured)
                .with_color(colour(names.len()))
                .with_size(4.0)
                .into(),
        );
        names.push(name.clone());
    }
    if names.is_empty() {
        return None;
    }
    let logs = map.chunks.iter().map(|chunk| float(*chunk).log2());
    let (least, most) =
        logs.fold((f64::MAX, 0.0), |(least, most), log| (log.min(least), log.max(most)));
    let layout = layout(&plots, 760.0, 320.0)
        .with_x_axis_min((least / 2.0).floor() * 2.0)
        .with_x_axis_max((most / 2.0).ceil() * 2.0)
        .with_x_tick_step(2.0)
        .with_x_tick_format(size_ticks())
        .with_y_axis_min(0.0)
        .with_y_axis_max(100.0)
        .with_y_tick_step(25.0)
        .with_y_tick_format(TickFormat::Custom(Arc::new(|share: f64| format!("{share:.0} %"))))
        .with_x_label("bytes that a call converts")
        .with_y_label("survive");
    let label = format!("Measured and by the closed form: what {} survives", map.title);
    Some(html! {
        (svg(plots, layout, &label))
        (legend(names.into_iter()))
    })
}
