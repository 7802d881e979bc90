//! Any text as a file that mapgpa reads: expectations, traces, cases, and the reports that it merges and
//! shows.

use mapgpa::case::Backend;
use mapgpa::engine::FrontEnd;
use mapgpa::expect::Expectations;
use mapgpa::merge::merge;
use mapgpa::replay::{CaseFile, TraceFile};
use mapgpa::report::page;
use mapgpa::sweep::SweepReport;

/// Reads the file in `data`, a kind and a text.
pub fn run(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    // What is left after the names of schemas could name a file of this machine, which would be read.
    let schemas = ["expectations", "trace", "case", "suite", "fuzz", "sweep"];
    let rest = schemas
        .iter()
        .fold(text.to_string(), |text, schema| text.replace(&format!("mapgpa.{schema}/"), ""));
    if rest.contains(['/', '\\']) && matches!(kind % 5, 0 | 2 | 3) {
        return;
    }
    match kind % 5 {
        0 if text.contains(".toml") => {}
        0 => match Expectations::parse("fuzz.toml", &text) {
            Ok(expectations) => drop(expectations.of("svsm", "complete", FrontEnd::Direct)),
            Err(error) => super::shown(&error),
        },
        1 => {
            if let Ok(report) = serde_json::from_str::<SweepReport>(&text) {
                let mut page = Vec::new();
                let _ = page::write(&mut page, None, Some(&report));
            }
        }
        2 if text.contains("kernel") => {}
        2 => {
            if let Err(error) = TraceFile::parse("fuzz.jsonl", &text, Some(Backend::Hosted)) {
                super::shown(&error);
            }
        }
        3 if text.contains("kernel") => {}
        3 => {
            if let Err(error) = CaseFile::parse("fuzz.toml", &text, Some(Backend::Hosted)) {
                super::shown(&error);
            }
        }
        _ => {
            let (one, other) = text.split_once('\x0c').unwrap_or((&text, &text));
            let files = [("a.json", one), ("b.json", other)];
            let files = files.map(|(name, text)| (name.to_owned(), text.to_owned()));
            if let Err(error) = merge(files.into()) {
                super::shown(&error);
            }
        }
    }
}
