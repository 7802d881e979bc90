//! A table of texts, for the terminal and for pages: one content, so that both say the same.

use std::io::{self, Write};

use maud::{Markup, html};

/// A table: a head, and rows as wide.
#[derive(Debug, Clone, Default)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
    /// Columns from the left that hold names; the others hold figures.
    names: usize,
}

impl Table {
    /// An empty table whose first `names` columns hold names.
    #[must_use]
    pub fn new(names: usize, head: &[&str]) -> Self {
        let head = head.iter().map(ToString::to_string).collect();
        Self { head, rows: Vec::new(), names }
    }

    /// Adds a row; a cell that is missing stays empty.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Removes a column.
    pub fn remove(&mut self, column: usize) {
        self.names -= usize::from(column < self.names);
        for row in std::iter::once(&mut self.head).chain(&mut self.rows) {
            if column < row.len() {
                row.remove(column);
            }
        }
    }

    /// Writes it with aligned columns.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let lines = std::iter::once(&self.head).chain(&self.rows);
        let width = |column: usize| {
            let cells = lines.clone().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        for line in lines {
            let mut text = String::new();
            for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                // Bars are drawn from the left, as names are.
                if column < self.names || self.is_bar(column) {
                    text.push_str(&format!("{cell:<width$}  "));
                } else {
                    text.push_str(&format!("{cell:>width$}  "));
                }
            }
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }

    /// As HTML; columns of bars are left out, because a page has charts.
    #[must_use]
    pub fn html(&self, caption: &str) -> Markup {
        let columns = |line: &'_ [String]| -> Vec<(bool, String)> {
            let cells = line.iter().enumerate().filter(|(column, _)| !self.is_bar(*column));
            cells.map(|(column, cell)| (column < self.names, cell.clone())).collect()
        };
        html! {
            div.scroll tabindex="0" role="region" aria-label=(caption) {
                table {
                    caption { (caption) }
                    thead { tr {
                        @for (name, cell) in columns(&self.head) {
                            th scope="col" .figure[!name] { (cell) }
                        }
                    } }
                    tbody {
                        @for row in &self.rows {
                            tr {
                                @for (name, cell) in columns(row) {
                                    @if name { th scope="row" { (cell) } }
                                    @else { td.figure { (cell) } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// Whether a column holds bars: they need no head.
    fn is_bar(&self, column: usize) -> bool {
        column >= self.names && self.head.get(column).is_some_and(String::is_empty)
    }
}

/// A bar of at most `width` characters for `share`, 0 to 1; the least share that is not 0 shows.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a few characters, and clamped"
)]
pub fn bar(share: f64, width: usize) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    if share.is_nan() || share <= 0.0 {
        return String::new();
    }
    let eighths = ((share.min(1.0) * (width * 8) as f64).round() as usize).max(1);
    let mut bar = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        bar.push(EIGHTHS[eighths % 8]);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(1, &["name", "n", ""]);
        table.row(vec!["a".into(), "10".into(), "█".into()]);
        table.row(vec!["longer".into(), "9".into(), "▌".into()]);
        table
    }

    #[test]
    fn columns_are_aligned() {
        let mut text = Vec::new();
        table().write(&mut text).expect("memory");
        let text = String::from_utf8(text).expect("text");
        assert_eq!(text, "name     n\na       10  █\nlonger   9  ▌\n");
    }

    #[test]
    fn a_page_has_no_bars_and_no_markup_of_names() {
        let mut table = table();
        table.row(vec!["<b>".into(), "1".into(), String::new()]);
        let page = table.html("what").into_string();
        assert!(!page.contains('█') && !page.contains("<b>"), "{page}");
        assert!(page.contains("&lt;b&gt;"), "{page}");
    }

    #[test]
    fn bars() {
        assert_eq!(bar(0.0, 4), "");
        assert_eq!(bar(f64::NAN, 4), "");
        assert_eq!(bar(1e-9, 4), "▏");
        assert_eq!(bar(0.5, 4), "██");
        assert_eq!(bar(7.0, 2), "██");
    }
}
