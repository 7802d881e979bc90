//! Host calls that fail, in runs that want more than any machine has: a kernel, a TD, guest_memfd. The lab
//! has it: guest-tests/lab/fault-tests and memfd-tests run these.
#![allow(clippy::expect_used, clippy::panic, reason = "test code")]

mod harness;
mod interposer;
mod support;

use std::collections::BTreeMap;
use std::process::Command;

use harness::{Needs, harness};
use interposer::sweep::sweep;
use support::Scratch;
use support::command::{command, stdout};

/// Every failed call ends in one line, or does no harm; and both occur. `each` calls of a function are
/// failed at first, and then of the rest: a run takes seconds here.
fn holds(name: &str, each: u64, line: impl Fn(&Scratch) -> Command) {
    let codes: BTreeMap<i32, u64> = sweep(name, each, line, |ran, fault, code, _| {
        assert_ne!(code, 1, "{fault:?}: the guest is not at fault: {}", stdout(&ran.output));
    });
    assert!(codes.get(&3) > Some(&10) && codes.contains_key(&0), "{codes:?}");
}

fn a_kernel_survives_or_explains_any_failed_call() {
    let kernel = std::env::var(harness::KERNEL).expect("looked at before");
    holds("faults-kernel", 1, |scratch| {
        let mut command = command("run --policy chunk=1M --until conversions --timeout 50s");
        command.args(["--kernel", &kernel]).arg("--trace").arg(scratch.path("trace"));
        command
    });
}

fn a_td_does() {
    let host = std::env::var(harness::HOST).expect("looked at before");
    holds("faults-td", 2, |scratch| {
        let line = "run reference --policy chunk=2M --range 4M --backend tdx --timeout 50s";
        let mut command = command(line);
        command.arg("--trace").arg(scratch.path("trace")).env("LD_PRELOAD", &host);
        command
    });
}

fn a_run_in_guest_memfd_does() {
    holds("faults-guest-memfd", 2, |scratch| {
        let line = "run reference --policy chunk=256K,stall=1 --memory-model guest-memfd";
        let mut command = command(line);
        command.arg("--trace").arg(scratch.path("trace"));
        command
    });
}

fn main() -> std::process::ExitCode {
    harness(vec![
        (
            "a_kernel_survives_or_explains_any_failed_call",
            Needs::Kernel,
            a_kernel_survives_or_explains_any_failed_call,
        ),
        ("a_td_does", Needs::SimulatedHost, a_td_does),
        ("a_run_in_guest_memfd_does", Needs::GuestMemfd, a_run_in_guest_memfd_does),
    ])
}
