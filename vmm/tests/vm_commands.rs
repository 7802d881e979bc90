//! Commands that make VMs: what they leave behind, and what `compare` measures.
#![allow(clippy::expect_used, clippy::panic, reason = "test code")]

mod harness;
mod support;

use std::fs;

use harness::{Needs, harness};
use support::Scratch;
use support::command::{code, output, refused, stderr, stdout, with};

fn a_vm_that_cannot_be_made_leaves_no_trace() {
    let scratch = Scratch::new("no-vm");
    let (image, trace) = (scratch.path("guest.elf"), scratch.path("t").display().to_string());
    fs::write(&image, "no ELF").expect("a file");
    refused(with(&["run", &image.display().to_string(), "--trace", &trace]), &["ELF"]);
    assert_eq!(scratch.files(), ["guest.elf"]);
    fs::write(&trace, "mine").expect("a file");
    refused(with(&["run", &image.display().to_string(), "--trace", &trace]), &["ELF"]);
    assert_eq!(scratch.files(), ["guest.elf", "t"], "it was there before");
}

fn a_vm_is_measured_beside_its_bare_work() {
    let line = "--backend emulated --range 4M --repeat 3 --floor --policy chunk=64K,stall=1";
    let ran = output(&format!("compare --format json {line}"));
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
    let object: serde_json::Value = serde_json::from_str(&stdout(&ran)).expect("one object");
    let rows = object["rows"].as_array().expect("rows");
    assert_eq!((rows.len(), &object["memory_model"]), (4, &"alias".into()));
    for row in rows {
        // Far off in all repeats, the bare work would not be the same work; in one, the machine may
        // have had something else to do.
        let ratio = |which: &str| row["to_floor"][which].as_f64().expect("a ratio");
        assert!(ratio("min") < 6.0 && ratio("max") > 0.3, "{row:#}");
        assert_eq!(row["host_pages"], 1024, "{row:#}");
        assert!(row["host_calls"].as_u64() >= Some(1) && row["exits"].as_u64() > Some(5));
        let longest = row["latency"]["longest_ns"]["max"].as_f64().expect("a time");
        // The histogram has three digits, and rounds up.
        assert!(longest * 1.01 >= row["latency"]["p50_ns"].as_f64().expect("a time"), "{row:#}");
    }
}

fn main() -> std::process::ExitCode {
    harness(vec![
        (
            "a_vm_that_cannot_be_made_leaves_no_trace",
            Needs::Kvm,
            a_vm_that_cannot_be_made_leaves_no_trace,
        ),
        (
            "a_vm_is_measured_beside_its_bare_work",
            Needs::Kvm,
            a_vm_is_measured_beside_its_bare_work,
        ),
    ])
}
