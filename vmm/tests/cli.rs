//! The binary: exit codes, what goes to stdout, report files, and what a reader or a user who ends
//! early gets.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quick_junit::{Report, TestCaseStatus};
use serde_json::Value;
use support::Scratch;
use support::command::{code, command, output, stderr, stdout, with};

fn json(line: &str) -> Value {
    let output = output(line);
    assert_eq!(stderr(&output), "", "{line}");
    serde_json::from_str(&stdout(&output)).expect("one object, and nothing else")
}

#[test]
fn exit_codes() {
    let tdx = if mapgpa::backend::tdx::facts().is_ok() { 0 } else { 3 };
    for (line, expected) in [
        ("run reference --backend hosted --policy chunk=64K", 0),
        ("run linux-5.19 --backend hosted --policy chunk=64K", 1),
        ("run linux-5.19 --backend hosted --policy chunk=4M", 0),
        ("run linux-5.19 --backend hosted --policy chunk=", 2),
        ("run reference --backend tdx", tdx),
        ("suite --backend hosted --policies chunk=64K,r11=end,complete", 0),
        ("suite --backend hosted --guests linux-5.19 --policies chunk=64K --range 4K", 0),
        ("list guests", 0),
        ("list policies", 0),
        ("list checks", 0),
        ("list checks --format json", 0),
        ("explain hyperv", 0),
        ("explain stall=forever", 0),
        ("explain r11=end --direction to-private --range 128K --seed 3 --calls 2", 0),
        ("", 2),
        ("--help", 0),
        ("suite --help", 0),
        ("--version", 0),
    ] {
        let output = output(line);
        assert_eq!(code(&output), expected, "{line}: {}", stderr(&output));
        assert_eq!(output.stdout.is_empty(), matches!(expected, 2 | 3), "{line}");
    }
}

#[test]
fn a_suite_is_held_against_its_expectations() {
    let scratch = Scratch::new("expect");
    let file = scratch.path("e.toml");
    let line = format!(
        "suite --backend hosted --guests oak,linux-5.19 --policies chunk=64K --expect {}",
        file.display()
    );
    let header = "schema = \"mapgpa.expectations/1\"\n";
    let known = |guest: &str, check: &str| {
        format!(
            "[[known]]\nguests = [\"{guest}\"]\npolicies = [\"chunk=64K\"]\nchecks = [\"{check}\"]\n\
             why = \"a test\"\n"
        )
    };
    let (oak, linux) = (known("oak", "gave-up"), known("linux-5.19", "gave-up"));
    for (entries, expected, says) in [
        (format!("{oak}{linux}"), 0, "all as expected"),
        (oak.clone(), 1, "linux-5.19 under chunk=64K: expected pass, found gave-up"),
        (format!("{oak}{}", known("linux-5.19", "crash")), 1, "expected crash, found gave-up"),
        (String::new(), 1, "2 not as expected"),
    ] {
        fs::write(&file, format!("{header}{entries}")).expect("a file");
        let output = output(&line);
        assert_eq!(code(&output), expected, "{entries}");
        assert!(stdout(&output).contains(says), "{}", stdout(&output));
    }
}

#[test]
fn expectations_of_a_policy_file_are_found_by_its_name() {
    let scratch = Scratch::new("expect-file");
    let (policy, file) = (scratch.path("p.toml"), scratch.path("e.toml"));
    let rule = "schema = \"mapgpa.policy/1\"\nname = \"mine\"\n[[rule]]\ndo = \"chunk=64K\"\n";
    fs::write(&policy, rule).expect("a file");
    for by in ["mine.toml", &policy.display().to_string()] {
        let text = format!(
            "schema = \"mapgpa.expectations/1\"\n[[known]]\nguests = [\"oak\"]\n\
             policies = [\"{by}\"]\nchecks = [\"gave-up\"]\nwhy = \"a test\"\n"
        );
        fs::write(&file, text).expect("a file");
        let (policy, file) = (policy.display(), file.display());
        let line =
            format!("suite --backend hosted --guests oak --policies {policy} --expect {file}");
        let output = output(&line);
        let expected = if by == "mine.toml" { 2 } else { 0 };
        assert_eq!(code(&output), expected, "{}{}", stdout(&output), stderr(&output));
    }
}

#[test]
fn json_is_one_object() {
    let run = json("run reference --backend hosted --policy chunk=64K --format json");
    assert_eq!((&run["schema"], &run["verdict"]), (&"mapgpa.run/1".into(), &"pass".into()));
    let fail = json("run openvmm --backend hosted --policy r11=end --format json --seed 7");
    assert_eq!((&fail["verdict"], &fail["seed"]), (&"fail".into(), &7.into()));
    assert!(fail["violations"].as_array().is_some_and(|all| !all.is_empty()));
    let suite =
        json("suite --backend hosted --guests oak --policies complete,random --format json");
    assert_eq!(suite["schema"], "mapgpa.suite/1");
    assert_eq!(suite["cases"].as_array().map(Vec::len), Some(2));
    for what in ["guests", "policies", "checks"] {
        assert!(json(&format!("list {what} --format json")).is_array());
    }
}

#[test]
fn json_to_a_file_is_the_same_as_on_stdout() {
    let scratch = Scratch::new("json-file");
    let file = scratch.path("s.json").display().to_string();
    // What was there before is gone, even if it was longer.
    fs::write(&file, "x".repeat(1 << 20)).expect("a file");
    let line = "suite --backend hosted --guests oak --policies complete --format json --json";
    let shown = stdout(&output(&format!("{line} {file}")));
    assert_eq!(fs::read_to_string(&file).expect("the report"), shown);
}

const SUITE: &str = "suite --backend hosted --guests oak,reference,linux-5.19 \
                     --policies complete,chunk=64K,chunk=4M,r11=end";

#[test]
fn junit_is_well_formed_and_skips_what_was_not_exercised() {
    let scratch = Scratch::new("junit");
    let file = scratch.path("j.xml");
    output(&format!("{SUITE} --junit {}", file.display()));
    let text = fs::read_to_string(&file).expect("the report");
    let report = Report::deserialize_from_str(&text).expect("well formed");
    assert_eq!(report.test_suites.len(), 3, "a suite a guest");
    for suite in &report.test_suites {
        let names: Vec<_> = suite.test_cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names, ["complete", "chunk=64K", "chunk=4M", "r11=end"]);
        for case in &suite.test_cases {
            let skipped = matches!(case.status, TestCaseStatus::Skipped { .. });
            assert_eq!(skipped, case.name.as_str() == "chunk=4M", "{:?}: {case:?}", suite.name);
            assert!(skipped || matches!(case.status, TestCaseStatus::Success { .. }), "{case:?}");
        }
    }
    // A failure is one only if it was not expected.
    let expect = scratch.path("e.toml");
    fs::write(&expect, "schema = \"mapgpa.expectations/1\"\n").expect("a file");
    output(&format!("{SUITE} --junit {} --expect {}", file.display(), expect.display()));
    let text = fs::read_to_string(&file).expect("the report");
    let report = Report::deserialize_from_str(&text).expect("well formed");
    let failed =
        report.test_suites[0].test_cases.iter().find(|case| case.name.as_str() == "chunk=64K");
    assert!(matches!(failed.map(|case| &case.status), Some(TestCaseStatus::NonSuccess { .. })));
    assert!(text.contains("gave-up") && text.contains("in call"));
}

#[test]
fn ktap_has_a_plan_and_a_line_a_case() {
    let scratch = Scratch::new("ktap");
    let file = scratch.path("k.tap");
    output(&format!("{SUITE} --ktap {}", file.display()));
    let text = fs::read_to_string(&file).expect("the report");
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("KTAP version 1"));
    assert_eq!(lines.next(), Some("1..12"));
    let (mut skipped, mut known) = (0, 0);
    for (number, line) in (1..).zip(lines.by_ref()) {
        let rest = line.strip_prefix(&format!("ok {number} ")).expect(line);
        let (name, directive) = rest.split_once(" # ").unwrap_or((rest, ""));
        assert!(!name.is_empty() && !name.contains(['#', ' ']), "{line}");
        skipped += usize::from(directive.starts_with("SKIP"));
        known += usize::from(directive.starts_with("XFAIL"));
        assert!(
            directive.is_empty() || directive.starts_with("SKIP") || directive.starts_with("XFAIL")
        );
    }
    assert!(skipped == 3 && known >= 2, "{text}");
}

#[test]
fn shards_make_up_the_suite() {
    let names = |shard: &str| -> Vec<String> {
        let report = json(&format!("{SUITE} --format json {shard}"));
        let cases = report["cases"].as_array().expect("cases").clone();
        cases.iter().map(|case| format!("{} {}", case["guest"], case["policy"])).collect()
    };
    let mut parts: Vec<_> = (1..=3).flat_map(|i| names(&format!("--shard {i}/3"))).collect();
    let mut whole = names("");
    assert_eq!(whole.len(), 12);
    parts.sort_unstable();
    whole.sort_unstable();
    assert_eq!(parts, whole);
}

#[test]
fn a_trace_is_a_line_a_call() {
    let scratch = Scratch::new("trace");
    let file = scratch.path("t.jsonl").display().to_string();
    let line = "run reference --backend hosted --policy chunk=1M,stall=1 --trace";
    assert_eq!(code(&output(&format!("{line} {file}"))), 0);
    let text = fs::read_to_string(&file).expect("the trace");
    let calls: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    assert_eq!(calls.len(), 8);
    assert_eq!(
        (&calls[0]["gpa"], &calls[0]["r11"]),
        (&"0x800001000000".into(), &"0x800001000000".into())
    );
    assert_eq!((&calls[3]["status"], &calls[3]["r11"]), (&"0x0".into(), &Value::Null));
    assert_eq!((&calls[4]["to"], &calls[7]["call"]), (&"private".into(), &8.into()));
}

/// Both ends of a pipe whose reader is gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    Stdio::from(OwnedFd::from(writer))
}

#[test]
fn nobody_needs_to_read_what_is_said() {
    for (line, expected) in [
        ("list policies", 0),
        ("list guests --format json", 0),
        ("explain chunk=4K --calls 5000", 0),
        ("run reference --backend hosted", 0),
        ("run reference --backend hosted --format json", 0),
        ("run linux-5.19 --backend hosted --policy chunk=64K", 1),
        ("suite --backend hosted --policies complete,chunk=64K", 0),
        ("--help", 0),
        ("suite --help", 0),
    ] {
        let output = command(line).stdout(closed()).output().expect("the binary runs");
        assert_eq!((code(&output), stderr(&output).as_str()), (expected, ""), "{line}");
    }
    for line in ["run nobody", "run reference --range 0", "", "frobnicate"] {
        let status = command(line).stderr(closed()).stdout(Stdio::null()).status();
        assert_eq!(status.expect("the binary runs").code(), Some(2), "{line}");
    }
}

#[test]
fn a_full_disk_is_said() {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    for line in ["list policies", "run reference --backend hosted --format json", SUITE] {
        let output = command(line).stdout(full()).output().expect("the binary runs");
        assert_eq!(code(&output), 4, "{line}");
        assert!(
            stderr(&output).contains("stdout") && stderr(&output).contains("No space"),
            "{line}"
        );
    }
    for (line, option) in [
        (
            "run reference --backend hosted --policy chunk=4K --trace /dev/full".to_owned(),
            "--trace",
        ),
        (format!("{SUITE} --junit /dev/full"), "--junit"),
        (format!("{SUITE} --ktap /dev/full"), "--ktap"),
        (format!("{SUITE} --json /dev/full"), "--json"),
    ] {
        let output = output(&line);
        assert_eq!(code(&output), 2, "{line}");
        let error = stderr(&output);
        assert!(error.contains(option) && error.contains("No space"), "{error}");
    }
}

/// Starts `line`, sends SIGINT once `ready`, and gives back exit code, stdout and stderr.
fn interrupted(mut command: Command, ready: impl Fn() -> bool) -> (Option<i32>, String, String) {
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !ready() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.is_ok_and(|status| status.success()), "it runs");
    // What is said fits in the pipes.
    let deadline = Instant::now() + Duration::from_secs(20);
    while child.try_wait().expect("it is ours").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("it runs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().expect("piped").read_to_string(&mut out).expect("UTF-8");
    child.stderr.take().expect("piped").read_to_string(&mut err).expect("UTF-8");
    let status = child.wait().expect("it ends");
    assert_eq!(status.signal(), None, "{out}{err}");
    (status.code(), out, err)
}

#[test]
fn ctrl_c_keeps_what_was_measured() {
    let scratch = Scratch::new("interrupt");
    let json = scratch.path("s.json");
    // Long enough that it cannot be done before: tens of thousands of conversations a case.
    let line = "suite --backend hosted --jobs 1 --layout scattered --range 512M --policies \
                complete,random,contention=0.5,chunk=64K,stall=2 --timeout 1000s --json";
    let mut words: Vec<_> = line.split(' ').filter(|word| !word.is_empty()).collect();
    let path = json.display().to_string();
    words.push(&path);
    // The file is there before the first case begins.
    let (code, out, err) = interrupted(with(&words), || json.exists());
    assert_eq!(code, Some(130), "{out}{err}");
    assert!(out.contains("interrupted with") && out.contains("cases to go"), "{out}");
    let text = fs::read_to_string(&json).expect("the report");
    let report: Value = serde_json::from_str(&text).expect("whole");
    let left = report["summary"]["left_out"].as_u64().expect("a number");
    assert!(left > 0);
}

#[test]
fn ctrl_c_ends_a_run_and_keeps_its_trace() {
    let scratch = Scratch::new("interrupt-run");
    let trace = scratch.path("t.jsonl");
    let path = trace.display().to_string();
    let line = format!(
        "run openvmm --backend hosted --policy stall=forever --max-no-progress 99999999999 \
         --max-calls 99999999999 --timeout 1000s --format json --trace {path}"
    );
    let grown = || fs::metadata(&trace).is_ok_and(|metadata| metadata.len() > 10_000);
    let (code, out, err) = interrupted(command(&line), grown);
    assert_eq!(code, Some(130), "{err}");
    let report: Value = serde_json::from_str(&out).expect("one object");
    assert_eq!(report["verdict"], "error");
    let lines = fs::read_to_string(&trace).expect("the trace").lines().count();
    assert_eq!(report["totals"]["calls"].as_u64(), u64::try_from(lines).ok());
}
