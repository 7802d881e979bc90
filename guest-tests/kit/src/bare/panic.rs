//! A panic is a deliberate end: it is reported with its message and place, then the vCPU stops.

use core::fmt::{self, Write};
use core::panic::PanicInfo;

use mapgpa_abi::channel::TEXT_MAX;

use super::BareTd;
use crate::report;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut line = Line { bytes: [0; TEXT_MAX], len: 0 };
    // A full line is cut, which is no error; neither write can fail otherwise.
    let _ = match info.location() {
        Some(place) => write!(line, "{} ({}:{})", info.message(), place.file(), place.line()),
        None => write!(line, "{}", info.message()),
    };
    report::panic(&mut BareTd::new(0), line.as_str())
}

/// The precompiled core names it in its unwind tables, which an image has none of.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Text of at most [`TEXT_MAX`] bytes, cut at a character.
struct Line {
    bytes: [u8; TEXT_MAX],
    len: usize,
}

impl Line {
    fn as_str(&self) -> &str {
        self.bytes.get(..self.len).and_then(|text| str::from_utf8(text).ok()).unwrap_or("")
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut end = text.len().min(TEXT_MAX - self.len);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        for (slot, byte) in self.bytes.iter_mut().skip(self.len).zip(text.bytes().take(end)) {
            *slot = byte;
        }
        self.len += end;
        Ok(())
    }
}
