//! Host calls that fail, each at every point of a run: one clear line and the right exit code, what was
//! measured is kept, nothing is left behind; what is only interrupted or busy is tried again.
#![allow(clippy::expect_used, clippy::panic, reason = "test code")]

mod harness;
mod interposer;
mod support;

use std::path::Path;
use std::process::Command;

use harness::{Needs, harness};
use interposer::sweep::{clear, sampled, sweep};
use interposer::{Fault, Ran};
use support::Scratch;
use support::command::{code, command, stderr, stdout};

/// Calls of a function that are failed at first, and then of the rest.
const EACH: u64 = 16;

/// Every line of a trace is a call's; how many.
fn lines_of_trace(path: &Path) -> usize {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        assert!(line["gpa"].is_string() && line["t_ns"].is_u64(), "{line}");
    }
    text.lines().count()
}

/// A run, with a trace.
fn run(backend: &str, more: &str, scratch: &Scratch) -> Command {
    let trace = scratch.path("trace").display().to_string();
    let line = format!("run reference --policy chunk=256K,stall=1 --backend {backend} {more}");
    let mut command = command(&line);
    command.args(["--trace", &trace]);
    command
}

/// What holds for a run that a failed call hit: it says so, or was not hurt.
fn run_holds(ran: &Ran, fault: Fault, code: i32, scratch: &Scratch) {
    assert_ne!(code, 1, "{fault:?}: the guest is not at fault: {}", stdout(&ran.output));
    let lines = lines_of_trace(&scratch.path("trace"));
    if code == 0 {
        // Every call of both conversions.
        assert_eq!(lines, 32, "{fault:?}");
    }
}

fn an_emulated_run_survives_or_explains_any_failed_call() {
    let codes = sweep("faults-emulated", EACH, |s| run("emulated", "", s), run_holds);
    assert!(codes.get(&3) > Some(&20) && codes.contains_key(&0), "{codes:?}");
}

fn a_run_of_several_vcpus_does() {
    let codes = sweep(
        "faults-vcpus",
        EACH,
        |s| run("emulated", "--vcpus 3", s),
        |ran, fault, code, _| {
            assert_ne!(code, 1, "{fault:?}: {}", stdout(&ran.output));
        },
    );
    assert!(codes.get(&3) > Some(&20), "{codes:?}");
}

fn a_hosted_run_does() {
    sweep("faults-hosted", EACH, |s| run("hosted", "", s), run_holds);
    let codes = sweep(
        "faults-threads",
        EACH,
        |s| run("hosted", "--vcpus 3", s),
        |ran, fault, code, _| {
            assert_ne!(code, 1, "{fault:?}: {}", stdout(&ran.output));
        },
    );
    assert!(codes.contains_key(&3), "no thread for a vCPU: {codes:?}");
}

/// What is only interrupted, or busy for a moment, is tried again.
fn a_transient_error_hurts_no_run() {
    let scratch = Scratch::new("faults-transient");
    let report = scratch.path("report");
    let line = || run("emulated", "--vcpus 2", &scratch);
    let whole = interposer::run(&mut line(), None, &report);
    let mut hurt = Vec::new();
    for (function, errno) in TRANSIENT {
        for first in sampled(whole.counted[*function], EACH) {
            let fault = Fault { function, first, errno: *errno, times: 1 };
            let ran = interposer::run(&mut line(), Some(fault), &report);
            if ran.output.status.code() != Some(0) {
                let Ran { output, .. } = ran;
                hurt.push(format!("{fault:?}: {}{}", stderr(&output), stdout(&output)));
            }
        }
    }
    assert!(hurt.is_empty(), "{hurt:#?}");
}

/// What is tried again. KVM_CREATE_VM is interrupted by any signal (mm_take_all_locks() of mm/mmap.c), as
/// KVM_RUN is; the other requests by a fatal one only.
const TRANSIENT: &[(&str, i32)] = &[
    ("KVM_CREATE_VM", libc::EINTR),
    ("KVM_RUN", libc::EINTR),
    ("KVM_RUN", libc::EAGAIN),
    ("read", libc::EINTR),
    ("write", libc::EINTR),
    ("poll", libc::EINTR),
    ("open64", libc::EINTR),
];

/// A suite goes on after a case that could not be run, and leaves nothing behind.
fn a_suite_keeps_its_results_and_leaks_nothing() {
    let scratch = Scratch::new("faults-suite");
    let report = scratch.path("report");
    let json = scratch.path("json");
    let line = |jobs: u32| {
        let mut command = command(&format!(
            "suite --backend emulated --guests reference,svsm --policies complete,chunk=64K,r11=end \
             --jobs {jobs}"
        ));
        command.arg("--json").arg(&json);
        command
    };
    let whole = interposer::run(&mut line(1), None, &report);
    assert_eq!(code(&whole.output), 0, "{}", stderr(&whole.output));
    for (function, errno) in [
        ("ioctl", libc::ENOMEM),
        ("mmap", libc::ENOMEM),
        ("madvise", libc::ENOMEM),
        ("timer_create", libc::EAGAIN),
        ("pthread_create", libc::EAGAIN),
    ] {
        let count = whole.counted[function];
        // Not the first ones, which find out what KVM can do; there is no result to be kept then.
        for first in (1..=8).map(|part| (count * part / 9).max(2)) {
            for jobs in [1, 2] {
                let fault = Fault { function, first, errno, times: 1 };
                let _ = std::fs::remove_file(&json);
                let ran = interposer::run(&mut line(jobs), Some(fault), &report);
                let code = ran.output.status.code();
                assert!(matches!(code, Some(0 | 3)), "{fault:?}: {code:?} {}", stderr(&ran.output));
                let text = std::fs::read(&json).expect("results");
                let suite: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
                let cases = suite["cases"].as_array().expect("cases");
                let errors = cases.iter().filter(|case| case["verdict"] == "error").count();
                let left = usize::try_from(u64::from(code == Some(3))).expect("0 or 1");
                assert_eq!((cases.len(), errors), (6, left), "{fault:?} {suite:#}");
                for what in ["fds", "threads", "mappings"] {
                    assert_eq!(ran.counted[what], whole.counted[what], "{fault:?}: {what}");
                }
            }
        }
    }
}

/// A report that cannot be written is said so, and the old one is still there.
fn a_full_disk_costs_no_report_that_was_there() {
    let scratch = Scratch::new("faults-disk");
    let (report, json) = (scratch.path("report"), scratch.path("json"));
    let line = || {
        let mut command = command("suite --backend hosted --guests svsm --policies complete");
        command.arg("--json").arg(&json);
        command
    };
    std::fs::write(&json, "old").expect("written");
    let whole = interposer::run(&mut line(), None, &report);
    assert_eq!(code(&whole.output), 0);
    for function in ["write", "rename", "open64"] {
        for first in 1..=whole.counted[function] {
            std::fs::write(&json, "old").expect("written");
            let fault = Fault { function, first, errno: libc::ENOSPC, times: 1 };
            let ran = interposer::run(&mut line(), Some(fault), &report);
            let code = clear(&ran, fault);
            let text = std::fs::read_to_string(&json).expect("a report");
            let new = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            assert!(new || text == "old", "{fault:?}: {code}: {text}");
            assert_eq!(scratch.files().len(), 2, "{fault:?}: {:?}", scratch.files());
        }
    }
}

fn main() -> std::process::ExitCode {
    harness(vec![
        ("a_hosted_run_does", Needs::Nothing, a_hosted_run_does),
        (
            "an_emulated_run_survives_or_explains_any_failed_call",
            Needs::Kvm,
            an_emulated_run_survives_or_explains_any_failed_call,
        ),
        ("a_transient_error_hurts_no_run", Needs::Kvm, a_transient_error_hurts_no_run),
        (
            "a_suite_keeps_its_results_and_leaks_nothing",
            Needs::Kvm,
            a_suite_keeps_its_results_and_leaks_nothing,
        ),
        (
            "a_full_disk_costs_no_report_that_was_there",
            Needs::Nothing,
            a_full_disk_costs_no_report_that_was_there,
        ),
        ("a_run_of_several_vcpus_does", Needs::Kvm, a_run_of_several_vcpus_does),
    ])
}
