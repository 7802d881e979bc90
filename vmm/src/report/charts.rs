//! Charts as inline SVG, drawn by kuva.
//!
//! kuva passes colours on as CSS, so that all here are variables of the page ([`super::page`]): one
//! drawing serves light and dark.

use std::sync::Arc;

use kuva::backend::svg::SvgBackend;
use kuva::plot::line::LinePlot;
use kuva::plot::scatter::{MarkerShape, ScatterPlot};
use kuva::plot::{ColorMap, Heatmap};
use kuva::render::annotations::TextAnnotation;
use kuva::render::layout::{Layout, TickFormat};
use kuva::render::plots::Plot;
use kuva::render::render::render_multiple;
use kuva::render::theme::Theme;
use mapgpa_abi::PAGE_SIZE;
use maud::{Markup, PreEscaped, html};

use crate::compare::Row;
use crate::units::{show_nanos, show_size};

/// Colours of lines in the page's style: `--s0` to `--s7`.
const COLOURS: usize = 8;
/// Width of a letter of a name in the trade-off, in powers of two on its axis of sizes.
const LETTER: f64 = 0.2;
/// Height of a line of names there, in powers of ten on its axis of times.
const LINE: f64 = 0.22;
/// Shares of calls: all but one of ten, of a hundred and so on.
const SHARES: [&str; 8] =
    ["0 %", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %", "99.9999 %", "99.99999 %"];
/// What the two lines of the trade-off are, in the order of their colours.
const SERIES: [&str; 2] = ["whole conversion", "longest single call"];

pub(super) fn colour(at: usize) -> String {
    format!("var(--s{})", at % COLOURS)
}

pub(super) fn layout(plots: &[Plot], width: f64, height: f64) -> Layout {
    let line = || "var(--line)".to_owned();
    let ink = || "currentColor".to_owned();
    let theme = Theme {
        background: "none".to_owned(),
        axis_color: line(),
        grid_color: "var(--grid)".to_owned(),
        tick_color: line(),
        text_color: ink(),
        legend_bg: "none".to_owned(),
        legend_border: "none".to_owned(),
        colorbar_border: line(),
        font_family: Some("system-ui, sans-serif".to_owned()),
        ..Theme::light()
    };
    Layout::auto_from_plots(plots)
        .with_theme(theme)
        .with_width(width)
        .with_height(height)
        .with_tick_size(12)
        .with_label_size(13)
        .with_body_size(12)
}

/// The SVG of a chart, which scales with the page, and `label` for those who do not see it.
pub(super) fn svg(plots: Vec<Plot>, layout: Layout, label: &str) -> Markup {
    let scene = render_multiple(plots, layout);
    let drawn = SvgBackend::new().render_scene(&scene);
    // kuva gives the drawing a fixed size in the first two attributes.
    let (_, rest) = drawn.split_once("height=\"").unwrap_or_default();
    let (_, rest) = rest.split_once('"').unwrap_or_default();
    let label = html! { (label) }.into_string();
    PreEscaped(format!(
        "<svg role=\"img\" aria-label=\"{label}\" viewBox=\"0 0 {} {}\" style=\"max-width:{}px\"{rest}",
        scene.width, scene.height, scene.width
    ))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ticks of an axis")]
fn time_ticks() -> TickFormat {
    TickFormat::Custom(Arc::new(|nanos: f64| {
        let text = show_nanos(nanos.round() as u64);
        text.replace(".00 ", " ").replace(".0 ", " ")
    }))
}

/// Sizes on a logarithmic axis: what is no power of two is rounded to one digit of it.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ticks of an axis")]
pub(super) fn size_ticks() -> TickFormat {
    TickFormat::Custom(Arc::new(|log| {
        if log.fract().abs() < 1e-6 {
            show_size(1 << (log.round() as u32).min(62))
        } else {
            String::new()
        }
    }))
}

/// Sizes on a linear axis.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ticks of an axis")]
fn bytes_ticks() -> TickFormat {
    TickFormat::Custom(Arc::new(|bytes: f64| show_size(bytes.round() as u64)))
}

#[expect(clippy::cast_precision_loss, reason = "drawn to a pixel")]
pub(super) const fn float(value: u64) -> f64 {
    value as f64
}

/// Bytes that a call which makes progress converts, on average.
#[must_use]
pub fn bytes_a_call(row: &Row) -> Option<f64> {
    let calls = row.requests.checked_sub(row.no_progress).filter(|calls| *calls > 0)?;
    (row.pages > 0).then(|| float(row.pages * PAGE_SIZE) / float(calls))
}

/// A row in the trade-off: bytes that a call converts, as a power of two; total time and longest call
/// in nanoseconds.
struct Point<'a> {
    log_size: f64,
    times: [f64; SERIES.len()],
    row: &'a Row,
}

/// The trade-off: bytes a call converts, against the time of the whole conversion and of the longest
/// call.
#[must_use]
pub fn trade_off(rows: &[&Row]) -> Markup {
    let mut points: Vec<Point<'_>> = rows
        .iter()
        .filter_map(|row| {
            let (total, longest) = (row.conversion_ns?, row.latency.as_ref()?.longest_ns);
            let times = [total.median, longest.median];
            Some(Point { log_size: bytes_a_call(row)?.log2(), times, row })
        })
        .collect();
    points.sort_by(|a, b| a.log_size.total_cmp(&b.log_size));
    let plain = |row: &Row| row.guest_chunk.is_none() && row.no_progress == 0;
    let mut plots: Vec<Plot> = Vec::new();
    for at in 0..SERIES.len() {
        let place = |point: &Point<'_>| (point.log_size, point.times[at]);
        let line = points.iter().filter(|point| plain(point.row));
        plots.push(
            LinePlot::new()
                .with_data(line.map(place))
                .with_color(colour(at))
                .with_stroke_width(2.0)
                .into(),
        );
        for (shape, wanted) in [(MarkerShape::Circle, true), (MarkerShape::Diamond, false)] {
            let some: Vec<_> = points.iter().filter(|point| plain(point.row) == wanted).collect();
            if some.is_empty() {
                continue;
            }
            plots.push(
                ScatterPlot::new()
                    .with_data(some.iter().map(|point| place(point)))
                    .with_color(colour(at))
                    .with_marker(shape)
                    .with_size(5.0)
                    .with_tooltip_labels(some.iter().map(|point| point.row.name()))
                    .into(),
            );
        }
    }
    let mut layout = layout(&plots, 760.0, 400.0)
        .with_log_y()
        .with_x_tick_step(2.0)
        .with_x_tick_format(size_ticks())
        .with_y_tick_format(time_ticks())
        .with_x_label("bytes that a call converts");
    if let (Some(first), Some(last)) = (points.first(), points.last()) {
        let (least, most) =
            ((first.log_size / 2.0).floor() * 2.0, (last.log_size / 2.0).ceil() * 2.0);
        layout = layout.with_x_axis_min(least - 2.0).with_x_axis_max(most + 2.0);
    }
    // Names stand above the upper of two points, and above names that would be in the way.
    let mut taken: Vec<(f64, f64, f64)> = Vec::new();
    for Point { log_size: x, times, row } in &points {
        let name = row.name();
        let half = LETTER * float(name.len() as u64) / 2.0;
        let mut y = times[0].max(times[1]).log10() + 0.06;
        while taken.iter().any(|(other_x, other_half, other_y)| {
            (x - other_x).abs() < half + other_half && (y - other_y).abs() < LINE
        }) {
            y += LINE / 4.0;
        }
        taken.push((*x, half, y));
        let name = TextAnnotation::new(name, *x, 10_f64.powf(y))
            .with_color("currentColor")
            .with_font_size(11);
        layout = layout.with_annotation(name);
    }
    let top = taken.iter().map(|(_, _, y)| *y).fold(0.0, f64::max);
    layout = layout.with_y_axis_max(10_f64.powf((top + LINE).ceil()));
    html! {
        (svg(plots, layout, "Bytes a call converts, against total time and longest call"))
        (legend(SERIES.into_iter().map(str::to_owned)))
    }
}

/// The names of lines, in the order of their colours; text of the page, so that it wraps.
pub(super) fn legend(names: impl Iterator<Item = String>) -> Markup {
    html! {
        ul.legend {
            @for (at, name) in names.enumerate() {
                li { span.key style={ "background:" (colour(at)) } {} " " (name) }
            }
        }
    }
}

/// Distribution of single calls: how long the given share of calls takes at most, by policy. The
/// axis of shares stretches towards 100 %, where the calls are that a guest notices.
#[must_use]
pub fn latencies(rows: &[&Row]) -> Markup {
    let mut plots: Vec<Plot> = Vec::new();
    let mut deepest = 1.0_f64;
    for (at, row) in rows.iter().enumerate() {
        let Some(latency) = &row.latency else { continue };
        let beyond = |share: f64| -(1.0 - share).max(1e-7).log10();
        let last = 1.0 / float(row.requests.max(1)) / row.runs.max(1) as f64;
        let end = -last.max(1e-7).log10();
        let mut points: Vec<(f64, f64)> = latency
            .quantiles
            .iter()
            .map(|(share, nanos)| (beyond(*share).min(end), float(*nanos).max(1.0)))
            .collect();
        if points.len() == 1 {
            // One call, or all alike: a line is seen better than a point.
            points.push((end.max(1.0), points[0].1));
        }
        deepest = points.iter().map(|point| point.0).fold(deepest, f64::max);
        plots.push(
            LinePlot::new()
                .with_data(points)
                .with_color(colour(at))
                .with_stroke_width(2.0)
                .with_step()
                .into(),
        );
    }
    let shares = TickFormat::Custom(Arc::new(|nines: f64| {
        let named = (0_u32..).zip(SHARES);
        let name = named.into_iter().find(|(n, _)| (f64::from(*n) - nines).abs() < 1e-6);
        name.map(|(_, name)| name.to_owned()).unwrap_or_default()
    }));
    let layout = layout(&plots, 760.0, 400.0)
        .with_log_y()
        .with_x_axis_min(0.0)
        .with_x_axis_max(deepest)
        .with_x_tick_step(1.0)
        .with_x_tick_format(shares)
        .with_y_tick_format(time_ticks())
        .with_x_label("share of calls")
        .with_y_label("takes at most");
    html! {
        (svg(plots, layout, "How long a share of all calls takes at most, by policy"))
        (legend(rows.iter().map(|row| row.name())))
    }
}

/// Columns and rows of a strip.
const STRIP: (usize, usize) = (64, 16);

/// Page states over time in the first conversation of a row: time across, the range downwards, the
/// share of pages in the new state as colour.
#[must_use]
pub fn strip(row: &Row, range: u64) -> Option<Markup> {
    let pages = range / PAGE_SIZE;
    let first = row.steps.iter().map(|step| step.first).min()?;
    let end_ns = row.steps.iter().map(|step| step.at_ns).max().filter(|end| *end > 0)?;
    let (columns, rows) = STRIP;
    let index = |value: u64, of: u64, cells: usize| -> usize {
        let at = u128::from(value) * cells as u128 / u128::from(of.max(1));
        usize::try_from(at).unwrap_or(cells).min(cells - 1)
    };
    // Pages that change in each cell; summed up over time below.
    let mut changed = vec![vec![0_u64; columns]; rows];
    for step in &row.steps {
        let column = index(step.at_ns, end_ns, columns);
        let (mut page, end) = (step.first - first, step.first - first + step.converted);
        while page < end {
            let at = index(page, pages, rows);
            let next = (pages * (at as u64 + 1)).div_ceil(rows as u64).clamp(page + 1, end);
            changed[at][column] += next - page;
            page = next;
        }
    }
    let room = float(pages.div_ceil(rows as u64));
    let data: Vec<Vec<f64>> = changed
        .iter()
        .map(|line| {
            let sums = line.iter().scan(0, |sum, pages| {
                *sum += pages;
                Some((float(*sum) / room).min(1.0))
            });
            sums.collect()
        })
        .collect();
    let least = data.iter().flatten().copied().fold(1.0, f64::min);
    let most = data.iter().flatten().copied().fold(0.0, f64::max);
    let map = ColorMap::Custom(Arc::new(move |t| {
        let share = least + t * (most - least);
        format!("color-mix(in srgb, var(--new) {:.0}%, var(--old))", share * 100.0)
    }));
    let heat = Heatmap::new()
        .with_data(data)
        .with_color_map(map)
        .with_cell_size(1.0)
        .with_x_range(0.0, float(end_ns))
        .with_y_range(0.0, float(pages * PAGE_SIZE));
    let plots = vec![Plot::Heatmap(heat)];
    let mut layout = layout(&plots, 420.0, 190.0)
        .with_x_axis_min(0.0)
        .with_x_axis_max(float(end_ns))
        .with_y_axis_min(0.0)
        .with_y_axis_max(float(pages * PAGE_SIZE))
        .with_ticks(4)
        .with_x_tick_format(time_ticks())
        .with_y_tick_step(float(range) / 4.0)
        .with_y_tick_format(bytes_ticks())
        .with_show_grid(false);
    layout.show_colorbar = false;
    Some(svg(plots, layout, &format!("Which pages have changed state when, under {}", row.name())))
}
