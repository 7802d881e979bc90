//! A kernel's console in a report: its beginning and its end, and shown as it comes if wanted.

use std::collections::VecDeque;
use std::io::Write;

/// Bytes kept of the beginning, and of the end.
const KEPT: usize = 128 << 10;

/// A console being recorded.
pub struct Console {
    head: String,
    tail: VecDeque<String>,
    tail_size: usize,
    dropped: u64,
    show: Option<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("dropped", &self.dropped).finish_non_exhaustive()
    }
}

impl Console {
    /// One that also writes each line to `show`, if given.
    #[must_use]
    pub fn new(show: Option<Box<dyn Write + Send>>) -> Self {
        Self { head: String::new(), tail: VecDeque::new(), tail_size: 0, dropped: 0, show }
    }

    /// Takes a line.
    pub fn line(&mut self, text: &str) {
        if let Some(show) = &mut self.show {
            // Whoever reads it has gone: the report is still to be made.
            if writeln!(show, "{text}").is_err() {
                self.show = None;
            }
        }
        if self.tail.is_empty() && self.head.len() + text.len() < KEPT {
            self.head.push_str(text);
            self.head.push('\n');
            return;
        }
        self.tail_size += text.len() + 1;
        self.tail.push_back(text.to_owned());
        while self.tail_size > KEPT {
            let Some(line) = self.tail.pop_front() else { break };
            self.tail_size -= line.len() + 1;
            self.dropped += 1;
        }
    }

    /// The text, with a line in place of what was dropped.
    #[must_use]
    pub fn into_text(self) -> String {
        let mut text = self.head;
        if self.dropped > 0 {
            text += &format!("... {} lines are not kept ...\n", self.dropped);
        }
        for line in self.tail {
            text += &line;
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginning_and_end_are_kept() {
        let mut console = Console::new(None);
        for number in 0..100_000 {
            console.line(&format!("line {number}"));
        }
        let text = console.into_text();
        assert!(text.starts_with("line 0\nline 1\n") && text.ends_with("line 99999\n"));
        assert!(text.contains("lines are not kept"));
        assert!(text.len() < 2 * KEPT + 100);
    }
}
