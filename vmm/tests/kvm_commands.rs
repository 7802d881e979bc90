//! The command line where a KVM is between guest and policy: what is refused, replaced and left out,
//! and the bundle of a suite.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::collections::BTreeMap;
use std::io::Read;

use flate2::read::GzDecoder;
use mapgpa::backend::tdx;
use serde_json::Value;
use support::Scratch;
use support::command::{code, command, output, refused, stderr, stdout};

#[test]
fn what_kvm_cannot_express_is_refused_with_what_it_can() {
    for (line, words) in [
        (
            "run reference --backend hosted --front-end kvm-7.2 --policy chunk=64K",
            ["chunk=64K cannot be expressed on kvm-7.2", "chunk=2M can be (--nearest"],
        ),
        (
            "run reference --backend hosted --front-end kvm-6.16 --policy chunk=2M,stall=1",
            ["cannot be expressed on kvm-6.16", "RETRY without progress"],
        ),
        ("explain r11=end --front-end kvm-7.2", ["R11 is KVM's", "chunk=2M can be"]),
        (
            "suite --backend hosted --front-end kvm-7.2 --policies complete,accept=exit",
            ["accept=exit cannot", "complete can be"],
        ),
    ] {
        refused(command(line), &words);
    }
}

#[test]
fn the_nearest_takes_its_place_and_the_report_says_so() {
    let line = "run reference --backend hosted --front-end kvm-7.2 --policy hyperv --nearest \
                --range 4M --format json";
    let output = output(line);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let report: Value = serde_json::from_str(&stdout(&output)).expect("an object");
    assert_eq!(report["policy"], "chunk=2M");
    assert_eq!(report["front_end"], "kvm-7.2");
    let note = report["notes"][0].as_str().expect("a note");
    assert!(note.starts_with("chunk=2M stands for hyperv, which kvm-7.2 cannot express"), "{note}");
    assert_eq!(report["totals"]["retries"], 2);
}

#[test]
fn explain_shows_kvm_s_replies() {
    let line = "explain chunk=2M,stall=1 --range 4M --direction to-shared --front-end kvm-7.2";
    let shown = stdout(&output(line));
    let replies: Vec<_> = shown.lines().filter(|line| line.contains("shared  ")).collect();
    assert_eq!(replies.len(), 4, "{shown}");
    assert!(replies[0].ends_with("R11 0x800001000000"), "{shown}");
    assert!(replies[1].ends_with("R11 0x800001200000"), "{shown}");
}

#[test]
fn a_suite_says_what_it_leaves_out_and_makes_a_bundle() {
    let scratch = Scratch::new("bundle");
    let file = scratch.path("b.tar.gz");
    let line = format!(
        "suite --backend hosted --front-end kvm-6.16 --guests reference,openvmm --bundle {}",
        file.display()
    );
    let output = output(&line);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let said = stderr(&output);
    assert!(
        said.starts_with("mapgpa: left out, as kvm-6.16 cannot express them: chunk=4K;"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");

    let mut archive =
        tar::Archive::new(GzDecoder::new(std::fs::File::open(&file).expect("a file")));
    let mut files = BTreeMap::new();
    for entry in archive.entries().expect("an archive") {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a path").display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        files.insert(name.strip_prefix("mapgpa-bundle/").expect("one directory").to_owned(), text);
    }
    let suite: Value = serde_json::from_str(&files["suite.json"]).expect("the suite's object");
    let cases = suite["cases"].as_array().expect("cases");
    assert_eq!(files["matrix.txt"], stdout(&output));
    assert!(files["host.txt"].contains("TDX") && files["host.json"].contains("mapgpa.host/1"));
    assert!(files["README.txt"].contains("--front-end kvm-6.16"));
    for (number, case) in (1..).zip(cases) {
        let trace = &files[&format!("traces/{number:04}.jsonl")];
        let calls = case["totals"]["calls"].as_u64().expect("a number");
        assert_eq!(trace.lines().count() as u64, calls, "case {number}");
    }
    assert_eq!(files.len(), 5 + cases.len());
    assert_eq!(scratch.files(), ["b.tar.gz"]);
}

#[test]
fn a_machine_without_tdx_says_why_in_one_line() {
    if tdx::facts().is_ok() {
        // With TDX there is nothing to refuse; `host` says so.
        let host: Value =
            serde_json::from_str(&stdout(&output("host --format json"))).expect("an object");
        assert_eq!(host["tdx"], true);
        return;
    }
    for command_line in ["run reference --policy chunk=2M --backend tdx", "suite --backend tdx"] {
        let output = output(command_line);
        let error = stderr(&output);
        assert_eq!(code(&output), 3, "{error}");
        assert!(error.starts_with("mapgpa: --backend tdx: "), "{error}");
        assert!(error.contains("--backend emulated"), "{error}");
        assert_eq!((error.lines().count(), stdout(&output).as_str()), (1, ""), "{error}");
    }
    let kernel = output("run --kernel /bin/true --backend tdx");
    assert!(stderr(&kernel).contains("TDVF"), "{}", stderr(&kernel));
}
