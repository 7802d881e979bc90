//! A line of text built without an allocator.

use core::fmt;

use mapgpa_kit::abi::channel::TEXT_MAX;

/// Up to [`TEXT_MAX`] bytes of formatted text; what is longer is cut at a character.
pub(crate) struct Line {
    bytes: [u8; TEXT_MAX],
    len: usize,
}

impl Line {
    /// The formatted text.
    pub(crate) fn new(text: fmt::Arguments<'_>) -> Self {
        let mut line = Self { bytes: [0; TEXT_MAX], len: 0 };
        // An error is the text's end: it did not fit.
        let _ = fmt::Write::write_fmt(&mut line, text);
        line
    }

    /// What was written.
    pub(crate) fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut end = text.len().min(TEXT_MAX - self.len);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes[self.len..self.len + end].copy_from_slice(&text.as_bytes()[..end]);
        self.len += end;
        if end == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_cut_between_characters() {
        assert_eq!(Line::new(format_args!("{:#x} {}", 255, "b")).as_str(), "0xff b");
        let long = "é".repeat(TEXT_MAX);
        let line = Line::new(format_args!("x{long}"));
        assert_eq!(line.as_str().len(), TEXT_MAX - 1);
    }
}
