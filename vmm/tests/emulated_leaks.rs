//! Backend `emulated`: nothing is left of a run. Alone in its process, so that it can count.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

mod common;
mod harness;

use std::time::Duration;

use common::{GPA, M2, Probe, Script};
use harness::{Needs, harness};
use mapgpa_abi::Alias;

fn nothing_is_left_of_a_hundred_runs() {
    let count = |path: &str| std::fs::read_dir(path).expect("procfs").count();
    let left = || {
        let mappings = std::fs::read_to_string("/proc/self/maps").expect("procfs").lines().count();
        (count("/proc/self/fd"), count("/proc/self/task"), mappings)
    };
    let endings = [
        Script::new().convert(GPA, 1, 0, M2, true).read(Alias::Private, GPA),
        Script::new().ud2(),
        Script::new().spin(),
        Script::new().write(Alias::Private, 40 << 20, 1),
    ];
    let probe = Probe { timeout: Duration::from_millis(60), ..Probe::default() };
    let bad = Probe { image: b"not an ELF file".to_vec(), ..Probe::default() };
    let round = |n: usize| {
        let ending = endings[n % endings.len()].clone();
        probe.run(&[ending, Script::new().barrier()]);
        assert!(bad.try_run(&[Script::new()]).is_err());
    };
    // What is made once a process, such as the open /dev/kvm and the allocator's arenas.
    (0..4).for_each(round);
    let before = left();
    (0..100).for_each(round);
    let after = left();
    assert_eq!((before.0, before.1), (after.0, after.1), "descriptors, threads");
    assert!(after.2 <= before.2 + 4, "mappings: {} then {}", before.2, after.2);
}

fn main() -> std::process::ExitCode {
    harness(vec![(
        "nothing_is_left_of_a_hundred_runs",
        Needs::Kvm,
        nothing_is_left_of_a_hundred_runs,
    )])
}
