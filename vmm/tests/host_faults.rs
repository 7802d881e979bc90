//! Host calls that fail, each at every point of a run: one clear line and the right exit code, what was
//! measured is kept, nothing is left behind; what is only interrupted or busy is tried again.
#![allow(clippy::expect_used, clippy::panic, reason = "test code")]

mod harness;
mod interposer;
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use harness::{Needs, harness};
use interposer::{Fault, Ran};
use support::Scratch;
use support::command::{code, command, stderr, stdout};

/// The most calls of one function that are failed, one after the other: the first ones, and then some
/// of the rest.
const EACH: u64 = 16;

/// Which of `count` calls are failed.
fn sampled(count: u64) -> Vec<u64> {
    let rest = count.saturating_sub(EACH);
    let step = rest.div_ceil(EACH).max(1);
    let later = (EACH + 1..=count).step_by(usize::try_from(step).expect("few"));
    (1..=count.min(EACH)).chain(later).collect()
}

/// What a call of `function` may fail with.
fn errors(function: &str) -> &'static [i32] {
    match function {
        "open64" | "eventfd" | "syscall" => &[libc::EMFILE, libc::ENOMEM],
        "write" | "ftruncate64" | "rename" => &[libc::ENOSPC, libc::EIO],
        "read" => &[libc::EIO],
        "timer_create" | "pthread_create" => &[libc::EAGAIN],
        "ioctl" => &[libc::ENOMEM, libc::EFAULT, libc::EMFILE],
        "poll" | "timer_settime" | "sigaction" => &[libc::EINVAL],
        _ => &[libc::ENOMEM],
    }
}

/// Lines that a user can do something with: one for what ended the command, none of a panic.
fn clear(ran: &Ran, fault: Fault) -> i32 {
    let error = stderr(&ran.output);
    let code = ran.output.status.code().unwrap_or_else(|| panic!("{fault:?}: {:?}", ran.output));
    assert!(!error.contains("panicked"), "{fault:?}: {error}");
    match code {
        0 | 1 => assert_eq!(error, "", "{fault:?}"),
        2..=4 => {
            // What cannot be written cannot be read.
            let mute = fault.function == "write" && error.is_empty();
            let line = error.starts_with("mapgpa: ") && error.lines().count() == 1;
            assert!(line || mute, "{fault:?}: exit {code}: {error:?}");
        }
        _ => panic!("{fault:?}: exit {code}: {error}"),
    }
    code
}

/// Every line of a trace is a call's; how many.
fn lines_of_trace(path: &Path) -> usize {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        assert!(line["gpa"].is_string() && line["t_ns"].is_u64(), "{line}");
    }
    text.lines().count()
}

/// Fails every call of a run, one after the other, in each way that it may fail; `check` looks at what
/// came of it. Gives how many runs ended with each exit code.
fn sweep(
    name: &str,
    line: impl Fn(&Scratch) -> Command,
    mut check: impl FnMut(&Ran, Fault, i32, &Scratch),
) -> BTreeMap<i32, u64> {
    let scratch = Scratch::new(name);
    let report = scratch.path("report");
    let whole = interposer::run(&mut line(&scratch), None, &report);
    let expected = code(&whole.output);
    assert!(expected <= 1, "{}", stderr(&whole.output));
    let mut codes = BTreeMap::new();
    for function in FUNCTIONS {
        let count = whole.counted.get(*function).copied().unwrap_or_default();
        for errno in errors(function) {
            for first in sampled(count) {
                let fault = Fault { function, first, errno: *errno, times: 1 };
                let ran = interposer::run(&mut line(&scratch), Some(fault), &report);
                let code = clear(&ran, fault);
                check(&ran, fault, code, &scratch);
                *codes.entry(code).or_default() += 1;
            }
        }
    }
    eprintln!("{name}: runs by exit code: {codes:?}");
    codes
}

const FUNCTIONS: &[&str] = &[
    "open64",
    "read",
    "write",
    "ftruncate64",
    "rename",
    "ioctl",
    "mmap",
    "madvise",
    "mincore",
    "eventfd",
    "poll",
    "timer_create",
    "timer_settime",
    "sigaction",
    "pthread_create",
    "syscall",
];

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
    let codes = sweep("faults-emulated", |s| run("emulated", "", s), run_holds);
    assert!(codes.get(&3) > Some(&20) && codes.contains_key(&0), "{codes:?}");
}

fn a_run_of_several_vcpus_does() {
    let codes = sweep(
        "faults-vcpus",
        |s| run("emulated", "--vcpus 3", s),
        |ran, fault, code, _| {
            assert_ne!(code, 1, "{fault:?}: {}", stdout(&ran.output));
        },
    );
    assert!(codes.get(&3) > Some(&20), "{codes:?}");
}

fn a_hosted_run_does() {
    sweep("faults-hosted", |s| run("hosted", "", s), run_holds);
    let codes = sweep(
        "faults-threads",
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
        for first in sampled(whole.counted[*function]) {
            let fault = Fault { function, first, errno: *errno, times: 1 };
            let ran = interposer::run(&mut line(), Some(fault), &report);
            if ran.output.status.code() != Some(0) {
                hurt.push(format!("{fault:?}: {}", stderr(&ran.output)));
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
                for what in ["fds", "threads"] {
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
