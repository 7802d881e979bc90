//! The conversations of a run as text: row by row if there are few, else alike ones together.

use std::io::{self, Write};

use super::{ConversationRow, Outcome};
use crate::units::{show_nanos, show_size};

/// Rows listed, or groups of alike rows.
const ROWS: usize = 12;

/// Alike conversations that followed each other, or not.
struct Group<'a> {
    first: &'a ConversationRow,
    last: &'a ConversationRow,
    count: u64,
    requests: u64,
    retries: u64,
    no_progress: u64,
    ns: u64,
}

impl<'a> Group<'a> {
    const fn of(row: &'a ConversationRow) -> Self {
        Self { first: row, last: row, count: 0, requests: 0, retries: 0, no_progress: 0, ns: 0 }
    }

    const fn add(&mut self, row: &'a ConversationRow) {
        self.last = row;
        self.count += 1;
        self.requests += row.requests;
        self.retries += row.retries;
        self.no_progress += row.no_progress;
        self.ns += row.ns;
    }

    /// Whether `row` is of the same size, direction and outcome.
    fn takes(&self, row: &ConversationRow) -> bool {
        (row.size, &row.to, row.outcome) == (self.first.size, &self.first.to, self.first.outcome)
    }
}

/// Writes the rows.
///
/// # Errors
/// The output cannot be written.
pub(super) fn write(out: &mut impl Write, rows: &[ConversationRow]) -> io::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "  conversation          size  to       requests  retries  no progress      time  outcome"
    )?;
    if rows.len() <= ROWS {
        for row in rows {
            let mut group = Group::of(row);
            group.add(row);
            line(out, &group)?;
        }
        return Ok(());
    }
    let mut groups: Vec<Group<'_>> = Vec::new();
    for row in rows {
        let at = groups.iter().position(|group| group.takes(row)).unwrap_or_else(|| {
            groups.push(Group::of(row));
            groups.len() - 1
        });
        groups[at].add(row);
    }
    for group in groups.iter().take(ROWS) {
        line(out, group)?;
    }
    let listed: u64 = groups.iter().take(ROWS).map(|group| group.count).sum();
    if groups.len() > ROWS {
        writeln!(out, "  conversations not listed here: {}", rows.len() as u64 - listed)?;
    }
    writeln!(out, "  {} conversations, alike ones together; all in --format json", rows.len())
}

fn line(out: &mut impl Write, group: &Group<'_>) -> io::Result<()> {
    let row = group.first;
    let at = row.at.as_ref().map(|at| format!(" at {at}")).unwrap_or_default();
    let outcome = match row.outcome {
        Outcome::Completed => "completed",
        Outcome::GaveUp => "gave up",
        Outcome::NeverReturned => "never returned",
    };
    let times = match group.count {
        1 => String::new(),
        count => format!(" ({count} of them, the last at {})", group.last.gpa),
    };
    writeln!(
        out,
        "  {:<18} {:>7}  {:<7} {:>9}  {:>7}  {:>11}  {:>8}  {outcome}{at}{times}",
        row.gpa,
        show_size(row.size),
        row.to,
        group.requests,
        group.retries,
        group.no_progress,
        show_nanos(group.ns),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(gpa: u64, size: u64, outcome: Outcome) -> ConversationRow {
        ConversationRow {
            gpa: format!("{gpa:#x}"),
            size,
            to: "shared".into(),
            requests: 2,
            retries: 1,
            no_progress: 0,
            ns: 1000,
            outcome,
            at: None,
        }
    }

    fn text(rows: &[ConversationRow]) -> Vec<String> {
        let mut out = Vec::new();
        write(&mut out, rows).expect("a vector can be written");
        String::from_utf8(out).expect("text").lines().skip(1).map(str::to_owned).collect()
    }

    #[test]
    fn few_are_listed_and_many_are_put_together() {
        let few: Vec<_> = (0..12).map(|at| row(at * 4096, 4096, Outcome::Completed)).collect();
        assert_eq!(text(&few).len(), 12);
        let mut many = vec![row(1 << 31, 1 << 30, Outcome::Completed)];
        many.extend((0..1000).map(|at| row(at * 4096, 4096, Outcome::Completed)));
        many.push(row(0x5000, 4096, Outcome::GaveUp));
        let lines = text(&many);
        assert_eq!(lines.len(), 4, "{lines:#?}");
        assert!(
            lines[1].contains("4K") && lines[1].contains("2000") && lines[1].contains("1000 of")
        );
        assert!(lines[2].contains("gave up"), "{lines:#?}");
        assert!(lines[3].contains("1002 conversations"));
        let sizes: Vec<_> = (1..40).map(|at| row(0, at << 12, Outcome::Completed)).collect();
        assert!(text(&sizes)[12].contains("not listed here: 27"));
        assert_eq!(text(&[]).len(), 0);
    }
}
