//! Any text as a file that mapgpa reads: expectations, and the report of a sweep.

use mapgpa::engine::FrontEnd;
use mapgpa::expect::Expectations;
use mapgpa::report::page;
use mapgpa::sweep::SweepReport;

/// Reads the file in `data`, a kind and a text.
pub fn run(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    if kind & 1 == 0 {
        // A policy in it could be the name of a file.
        if text.contains(".toml") {
            return;
        }
        match Expectations::parse("fuzz.toml", &text) {
            Ok(expectations) => drop(expectations.of("svsm", "complete", FrontEnd::Direct)),
            Err(error) => super::shown(&error),
        }
    } else if let Ok(report) = serde_json::from_str::<SweepReport>(&text) {
        let mut page = Vec::new();
        let _ = page::write(&mut page, None, Some(&report));
    }
}
