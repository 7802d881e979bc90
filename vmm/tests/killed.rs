//! A VMM that is killed or interrupted at any moment: its trace can be read. Result files of commands that
//! are: `killed_results.rs`.
#![allow(clippy::expect_used, clippy::panic, reason = "test code")]

mod harness;
mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Needs, harness};
use support::Scratch;
use support::command::command;

/// The longest that a line of a trace may be missing when the VMM is killed.
const MISSING_NS: u64 = 100_000_000;

/// A run that makes calls all the time, and does not end by itself soon.
fn endless(backend: &str, trace: &Path) -> Command {
    let limits =
        "--max-no-progress 1000000000 --max-calls 1000000000000 --bound none --timeout 100s";
    let line = format!(
        "run svsm --policy stall=forever --direction to-shared --backend {backend} {limits}"
    );
    let mut command = command(&line);
    command.arg("--trace").arg(trace).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Lines that are whole, and the time of the last.
fn lines(trace: &Path) -> (usize, u64) {
    let text = std::fs::read_to_string(trace).unwrap_or_default();
    // Of the last one a part may be there.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut last = 0;
    for line in whole.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        last = line["t_ns"].as_u64().expect("a time");
    }
    (whole.lines().count(), last)
}

/// Waits until the trace has lines; when that was.
fn begun(trace: &Path) -> Instant {
    let started = Instant::now();
    while lines(trace).0 == 0 {
        assert!(started.elapsed() < Duration::from_secs(30), "no trace");
        std::thread::sleep(Duration::from_millis(1));
    }
    Instant::now()
}

fn a_killed_vmm_leaves_a_trace(backend: &str) {
    let scratch = Scratch::new(&format!("killed-{backend}"));
    let mut late = 0;
    // Mostly long enough that something could be missing.
    for more_ms in [131, 255, 0, 183, 337, 164, 219, 147] {
        let trace = scratch.path("trace");
        let _ = std::fs::remove_file(&trace);
        let mut child = endless(backend, &trace).spawn().expect("runs");
        // The first lines tell when the run began, within one flush.
        let begun = begun(&trace);
        let (_, first) = lines(&trace);
        std::thread::sleep(Duration::from_millis(more_ms));
        let ran = u64::try_from(begun.elapsed().as_nanos()).expect("short");
        child.kill().expect("killed");
        child.wait().expect("a child");
        let (count, last) = lines(&trace);
        assert!(count > 0);
        // A machine that has something else to do may be late, now and then.
        late += u32::from(last + MISSING_NS < first + ran);
    }
    assert!(late <= 3, "{late} of 8 traces lack more than 100 ms");
}

fn a_killed_emulated_run_leaves_its_trace() {
    a_killed_vmm_leaves_a_trace("emulated");
}

fn a_killed_hosted_run_leaves_its_trace() {
    a_killed_vmm_leaves_a_trace("hosted");
}

/// Sends SIGINT.
fn interrupt(child: &std::process::Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

fn ctrl_c_keeps_what_a_run_has_measured() {
    let scratch = Scratch::new("ctrl-c-run");
    let trace = scratch.path("trace");
    let mut run = endless("hosted", &trace);
    let child = run.args(["--format", "json"]).spawn().expect("runs");
    begun(&trace);
    interrupt(&child);
    let output = child.wait_with_output().expect("a child");
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
    let calls = report["totals"]["calls"].as_u64().expect("a number");
    assert_eq!(usize::try_from(calls).expect("few"), lines(&trace).0, "every call is in the trace");
}

fn main() -> std::process::ExitCode {
    harness(vec![
        (
            "a_killed_emulated_run_leaves_its_trace",
            Needs::Kvm,
            a_killed_emulated_run_leaves_its_trace,
        ),
        (
            "a_killed_hosted_run_leaves_its_trace",
            Needs::Nothing,
            a_killed_hosted_run_leaves_its_trace,
        ),
        (
            "ctrl_c_keeps_what_a_run_has_measured",
            Needs::Nothing,
            ctrl_c_keeps_what_a_run_has_measured,
        ),
    ])
}
