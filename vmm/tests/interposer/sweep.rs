//! A run of the binary again and again, each time with another of its host calls failing.

use std::collections::BTreeMap;
use std::process::Command;

use super::{Fault, Ran, run};
use crate::support::Scratch;
use crate::support::command::{code, stderr};

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

/// Which of `count` calls of a function are failed, one after the other: the first `each`, and then as
/// many of the rest.
pub fn sampled(count: u64, each: u64) -> Vec<u64> {
    let rest = count.saturating_sub(each);
    let step = rest.div_ceil(each).max(1);
    let later = (each + 1..=count).step_by(usize::try_from(step).expect("few"));
    (1..=count.min(each)).chain(later).collect()
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
pub fn clear(ran: &Ran, fault: Fault) -> i32 {
    let error = stderr(&ran.output);
    if error.contains("failed to allocate an alternative stack") {
        // The Rust library, before main.
        return 3;
    }
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

/// Fails calls of a run, `each` of a function ([`sampled`]), one after the other, in each way that it may
/// fail; `check` looks at what came of it. Gives how many runs ended with each exit code.
pub fn sweep(
    name: &str,
    each: u64,
    line: impl Fn(&Scratch) -> Command,
    mut check: impl FnMut(&Ran, Fault, i32, &Scratch),
) -> BTreeMap<i32, u64> {
    let scratch = Scratch::new(name);
    let report = scratch.path("report");
    let whole = run(&mut line(&scratch), None, &report);
    let expected = code(&whole.output);
    assert!(expected <= 1, "{}", stderr(&whole.output));
    let mut codes = BTreeMap::new();
    for function in FUNCTIONS {
        let count = whole.counted.get(*function).copied().unwrap_or_default();
        for errno in errors(function) {
            for first in sampled(count, each) {
                let fault = Fault { function, first, errno: *errno, times: 1 };
                let ran = run(&mut line(&scratch), Some(fault), &report);
                let code = clear(&ran, fault);
                check(&ran, fault, code, &scratch);
                *codes.entry(code).or_default() += 1;
            }
        }
    }
    eprintln!("{name}: runs by exit code: {codes:?}");
    codes
}
