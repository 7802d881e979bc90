//! Commands that make VMs: what they leave behind, and what `compare` measures.
#![allow(clippy::expect_used, clippy::panic, reason = "test code")]

mod harness;
mod support;

use std::fs;

use harness::{Needs, harness};
use mapgpa::backend::emulated;
use mapgpa::memory::MemoryModel;
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

/// With guest_memfd a conversion sets attributes and drops contents, and so does the bare work.
fn guest_memfd_is_measured_beside_its_bare_work() {
    let line = "--memory-model guest-memfd --range 1M --repeat 1 --floor --policy chunk=64K";
    let ran = output(&format!("compare --format json {line}"));
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
    let object: serde_json::Value = serde_json::from_str(&stdout(&ran)).expect("one object");
    assert_eq!(object["memory_model"], "guest-memfd");
    let rows = object["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    for row in rows {
        let conversions = row["requests"].as_u64().expect("a number");
        assert_eq!(row["host_calls"].as_u64(), Some(2 * conversions), "{row:#}");
        assert_eq!(row["host_pages"], 256, "{row:#}");
        assert!(row["to_floor"]["median"].as_f64() > Some(0.0), "{row:#}");
    }
}

/// Where there is no guest_memfd, that is said before anything runs, with what has it.
fn guest_memfd_is_refused_where_it_is_not() {
    if emulated::check_memory_model(MemoryModel::GuestMemfd).is_ok() {
        return;
    }
    for line in ["run reference", "suite", "compare"] {
        let ran = output(&format!("{line} --memory-model guest-memfd"));
        let said = stderr(&ran);
        assert_eq!((code(&ran), said.lines().count(), &*stdout(&ran)), (3, 1, ""), "{said}");
        assert!(said.contains("KVM_X86_SW_PROTECTED_VM") && said.contains("lab"), "{said}");
    }
    // And so is a trace of a run with it.
    let scratch = Scratch::new("memfd-refused");
    let file = scratch.path("t.jsonl").display().to_string();
    output(&format!("run reference --backend emulated --trace {file}"));
    let trace = fs::read_to_string(&file).expect("a trace");
    assert!(!trace.contains("memory-model") && trace.contains(r#""seed":1,"#), "{trace}");
    let with_model = |model: &str| {
        let of = format!(r#""seed":1,"memory-model":"{model}","#);
        fs::write(&file, trace.replace(r#""seed":1,"#, &of)).expect("a trace");
    };
    with_model("guest-memfd");
    let ran = output(&format!("replay {file}"));
    assert_eq!((code(&ran), stderr(&ran).contains("KVM_X86_SW_PROTECTED_VM")), (3, true));
    // On `hosted` there is no memory.
    assert_eq!(code(&output(&format!("replay {file} --backend hosted"))), 0);
    with_model("attic");
    refused(with(&["replay", &file]), &["t.jsonl", "attic", "alias or guest-memfd"]);
}

/// A case keeps it, as another memory sees other things: with guest_memfd, no access before accept.
fn guest_memfd_is_kept_in_cases_and_traces() {
    let scratch = Scratch::new("memfd-kept");
    let cases = scratch.path("cases").display().to_string();
    let line = "fuzz edk2-2023 --class legal --backend emulated --memory-model guest-memfd";
    let ran = output(&format!("{line} --seeds 40 --shrink-runs 40 --cases {cases}"));
    assert_eq!(code(&ran), 1, "{}", stderr(&ran));
    let file = format!("{cases}/edk2-2023-legal-accept-missing.toml");
    let case = fs::read_to_string(&file).expect("a case");
    assert!(case.contains("memory-model = \"guest-memfd\""), "{case}");
    let same = output(&format!("replay {file}"));
    assert_eq!(code(&same), 0, "{}", stdout(&same));
    fs::write(&file, case.replace("guest-memfd", "alias")).expect("a case");
    let other = output(&format!("replay {file}"));
    assert_eq!(code(&other), 1);
    assert!(stdout(&other).contains("found access-before-accept"), "{}", stdout(&other));

    let file = scratch.path("t.jsonl").display().to_string();
    let run = "run edk2-2023 --policy chunk=64K --backend emulated --memory-model guest-memfd";
    output(&format!("{run} --trace {file}"));
    assert!(
        fs::read_to_string(&file).expect("a trace").contains(r#""memory-model":"guest-memfd""#)
    );
    assert_eq!(code(&output(&format!("replay {file}"))), 0);
}

/// Where userfaultfd is neither a device nor a privilege, a run still works, and says what it cannot
/// see; what the page map shows is still seen.
fn without_userfaultfd_the_report_says_what_is_off() {
    let script = format!(
        "mount --bind /dev/null /dev/userfaultfd 2>/dev/null || test ! -e /dev/userfaultfd; \
         exec setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace {} \
         run openvmm --policy r11=end --direction to-shared --format json",
        env!("CARGO_BIN_EXE_mapgpa")
    );
    let run = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .output()
        .expect("checked before");
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).expect("one object");
    let off: Vec<_> = report["checks_off"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|c| c.as_str())
        .collect();
    if std::path::Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists()
        && fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
            .is_ok_and(|on| on.trim() == "1")
    {
        assert_eq!(off, [""; 0], "everybody may have it here");
        return;
    }
    assert_eq!(off, ["wrong-alias", "access-before-accept"]);
    let violations = report["violations"].as_array().expect("a list");
    assert_eq!(violations.len(), 1, "{report:#}");
    assert_eq!(violations[0]["check"], "false-success");
}

/// The crate tdx-tdcall panics with other widths than TDX hardware's: it is refused or left out.
fn a_guest_that_knows_some_widths_only_is_not_run_with_others() {
    refused(
        with(&["run", "tdx-tdcall", "--policy", "complete", "--gpaw", "40"]),
        &["tdx-tdcall", "48 or 52", "40"],
    );
    let ran = output("suite --policies complete --gpaw 40 --format json");
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
    assert!(!stdout(&ran).contains("tdx-tdcall") && stdout(&ran).contains("reference"));
}

fn main() -> std::process::ExitCode {
    harness(vec![
        (
            "a_guest_that_knows_some_widths_only_is_not_run_with_others",
            Needs::Kvm,
            a_guest_that_knows_some_widths_only_is_not_run_with_others,
        ),
        (
            "without_userfaultfd_the_report_says_what_is_off",
            Needs::TakeAway,
            without_userfaultfd_the_report_says_what_is_off,
        ),
        (
            "a_vm_that_cannot_be_made_leaves_no_trace",
            Needs::Kvm,
            a_vm_that_cannot_be_made_leaves_no_trace,
        ),
        (
            "guest_memfd_is_measured_beside_its_bare_work",
            Needs::GuestMemfd,
            guest_memfd_is_measured_beside_its_bare_work,
        ),
        (
            "guest_memfd_is_kept_in_cases_and_traces",
            Needs::GuestMemfd,
            guest_memfd_is_kept_in_cases_and_traces,
        ),
        (
            "guest_memfd_is_refused_where_it_is_not",
            Needs::Kvm,
            guest_memfd_is_refused_where_it_is_not,
        ),
        (
            "a_vm_is_measured_beside_its_bare_work",
            Needs::Kvm,
            a_vm_is_measured_beside_its_bare_work,
        ),
    ])
}
