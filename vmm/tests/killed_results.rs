//! Result files of commands that are killed or interrupted at any moment: what was found until then.
#![allow(clippy::expect_used, clippy::panic, reason = "test code")]

mod harness;
mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Needs, harness};
use mapgpa::suite::POLICIES;
use mapgpa_guests::GUESTS;
use serde_json::Value;
use support::Scratch;
use support::command::{code, command, output, stderr, stdout};

/// The longest that may be missing in a result file when the command is killed.
const MISSING_NS: u64 = 100_000_000;

fn read(json: &Path) -> Option<Value> {
    let text = std::fs::read(json).ok()?;
    Some(serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{error}: {text:?}")))
}

/// Waits until the result file is as `is_it` wants it.
fn until(json: &Path, is_it: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        if let Some(value) = read(json).filter(|value| is_it(value)) {
            return value;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "nothing in {}", json.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn spawned(line: &str, json: &Path) -> Child {
    let mut command = command(line);
    command.arg("--json").arg(json).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("runs")
}

fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("a number, not {value}"))
}

fn items(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("an array, not {value}"))
}

/// Kills the command `line` again and again at moments of all kinds. What its result file has by then is
/// given to `check`; `measured` says how many nanoseconds of the run are in it. How many of 8 lack more than
/// 100 ms.
fn killed(
    line: &str,
    json: &Path,
    measured: impl Fn(&Value) -> u64,
    check: impl Fn(&Value),
) -> usize {
    let mut late = 0;
    // Mostly long enough that something could be missing.
    for more_ms in [131, 255, 0, 183, 337, 164, 219, 147] {
        let _ = std::fs::remove_file(json);
        let mut child = spawned(line, json);
        let first = measured(&until(json, |_| true));
        let begun = Instant::now();
        std::thread::sleep(Duration::from_millis(more_ms));
        let ran = u64::try_from(begun.elapsed().as_nanos()).expect("short");
        child.kill().expect("killed");
        child.wait().expect("a child");
        let result = read(json).expect("it was there");
        assert_eq!(result["unfinished"], true, "{line}");
        late += usize::from(measured(&result) + MISSING_NS < first + ran);
        check(&result);
    }
    late
}

/// Most of 8: a machine that has something else to do may be late, now and then.
const LATE: usize = 3;

/// Each finding of `report` has a case in `dir` that is reproduced; how many there are.
fn reproduced(report: &Value, name: impl Fn(&Value) -> String, dir: &Path) -> usize {
    let findings = items(&report["findings"]);
    for finding in findings {
        let file = dir.join(name(finding));
        let replayed = output(&format!("replay {}", file.display()));
        assert_eq!(code(&replayed), 0, "{}", stdout(&replayed));
    }
    findings.len()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("a text, not {value}"))
}

fn small_name(finding: &Value) -> String {
    format!("openvmm-{}-{}.toml", text(&finding["class"]), text(&finding["check"]))
}

fn unfinished_name(finding: &Value) -> String {
    format!("openvmm-{}.unfinished.toml", text(&finding["check"]))
}

fn campaign(backend: &str, cases: &Path) -> String {
    format!(
        "fuzz openvmm --backend {backend} --jobs 1 --seeds 4000000000 --cases {}",
        cases.display()
    )
}

fn ctrl_c_keeps_the_findings(backend: &str) {
    let scratch = Scratch::new(&format!("ctrl-c-fuzz-{backend}"));
    let (json, cases) = (scratch.path("json"), scratch.path("cases"));
    let child = spawned(&campaign(backend, &cases), &json);
    until(&json, |report| items(&report["findings"]).len() >= 2);
    interrupt(&child);
    let ended = child.wait_with_output().expect("a child");
    assert_eq!(ended.status.code(), Some(130), "{ended:?}");
    let report = read(&json).expect("a report");
    assert_eq!((&report["interrupted"], &report["unfinished"]), (&true.into(), &false.into()));
    assert_eq!(report["findings"][0]["shrinking"], "unfinished");
    assert_eq!(number(&report["ran"]) + number(&report["left_out"]), 4_000_000_000);
    let found = reproduced(&report, small_name, &cases);
    assert!(found >= 2);
    // And those which were there for a kill are gone.
    assert_eq!(std::fs::read_dir(&cases).expect("a directory").count(), found);
    let said = stdout(&ended);
    assert!(said.contains("interrupted: ") && said.contains(", unfinished): "), "{said}");
    let merged = output(&format!("merge {}", json.display()));
    assert_eq!((code(&merged), stdout(&merged).contains("interrupted: ")), (130, true));
}

fn ctrl_c_keeps_what_a_hosted_campaign_found() {
    ctrl_c_keeps_the_findings("hosted");
}

fn ctrl_c_keeps_what_an_emulated_campaign_found() {
    ctrl_c_keeps_the_findings("emulated");
}

fn a_killed_campaign_leaves_its_findings() {
    let scratch = Scratch::new("killed-fuzz");
    let (json, cases) = (scratch.path("json"), scratch.path("cases"));
    let search = |report: &Value| number(&report["search_ns"]);
    let late = killed(&campaign("hosted", &cases), &json, search, |report| {
        assert!(number(&report["ran"]) > 0);
        reproduced(report, unfinished_name, &cases);
    });
    assert!(late <= LATE, "{late}");
    assert!(items(&read(&json).expect("a report")["findings"]).len() >= 2);
    let merged = output(&format!("merge {}", json.display()));
    assert_eq!((code(&merged), stdout(&merged).contains("unfinished: ")), (130, true));
}

/// While findings are made small, they are there as found, or smaller by now.
fn a_campaign_killed_while_shrinking_leaves_its_findings() {
    let scratch = Scratch::new("killed-shrinking");
    let (json, cases) = (scratch.path("json"), scratch.path("cases"));
    // A few hundred boots of a VM: seconds.
    let line = format!("fuzz openvmm --backend emulated --seeds 40 --cases {}", cases.display());
    let mut child = spawned(&line, &json);
    let smaller = |report: &Value| {
        number(&report["left_out"]) == 0
            && items(&report["findings"])
                .iter()
                .any(|row| number(&row["rules"]) < number(&row["rules_found"]))
    };
    until(&json, smaller);
    child.kill().expect("killed");
    child.wait().expect("a child");
    let report = read(&json).expect("a report");
    assert_eq!(report["unfinished"], true);
    assert!(reproduced(&report, unfinished_name, &cases) >= 2);
}

/// Long enough to be killed: debug builds take 20 s and more.
const SUITE: &str = "suite --backend hosted --jobs 1 --range 16M";

/// Its cases.
fn all() -> u64 {
    let guests = GUESTS.iter().filter(|guest| guest.hosted).count();
    (guests * POLICIES.len()) as u64
}

fn ctrl_c_keeps_the_results_of_a_suite() {
    let scratch = Scratch::new("ctrl-c-suite");
    let json = scratch.path("json");
    let child = spawned(SUITE, &json);
    until(&json, |suite| number(&suite["summary"]["cases"]) >= 3);
    interrupt(&child);
    let ended = child.wait_with_output().expect("a child");
    assert_eq!(ended.status.code(), Some(130), "{ended:?}");
    let suite = read(&json).expect("results");
    assert_eq!(suite["unfinished"], false);
    let summary = &suite["summary"];
    let cases = items(&suite["cases"]).len() as u64;
    assert!(cases >= 3 && cases == number(&summary["cases"]) && number(&summary["left_out"]) > 0);
    assert!(stdout(&ended).contains("; interrupted with "));
}

fn a_killed_suite_leaves_its_cases() {
    let scratch = Scratch::new("killed-suite");
    let json = scratch.path("json");
    let time = |suite: &Value| number(&suite["summary"]["wall_ns"]);
    // A case that takes longer than 100 ms was not over when the suite was killed.
    let late = killed(SUITE, &json, time, |suite| {
        let summary = &suite["summary"];
        let cases = items(&suite["cases"]).len() as u64;
        assert!(cases > 0 && cases == number(&summary["cases"]));
        assert_eq!(cases + number(&summary["left_out"]), all());
        assert!(items(&suite["cases"]).iter().all(|case| case["as_expected"].is_boolean()));
    });
    assert!(late <= LATE, "{late}");
    let merged = output(&format!("merge {}", json.display()));
    assert_eq!(code(&merged), 130);
    assert!(stdout(&merged).contains("; unfinished with "), "{}", stdout(&merged));
    assert!(stderr(&merged).contains("json: unfinished: its run was killed"));
}

fn a_killed_sweep_leaves_its_cells() {
    let scratch = Scratch::new("killed-sweep");
    let json = scratch.path("json");
    let line = "sweep --range 1M --chunk 4K,16K,64K --seeds 4000 --jobs 1 --verify 0";
    let time = |sweep: &Value| number(&sweep["wall_ns"]);
    let late = killed(line, &json, time, |sweep| {
        let cells = items(&sweep["cells"]);
        assert!(cells.iter().any(|cell| number(&cell["runs"]) > 0));
    });
    assert!(late <= LATE, "{late}");
    let merged = output(&format!("merge {}", json.display()));
    assert_eq!((code(&merged), stdout(&merged).contains(", unfinished")), (130, true));
    // What reads a sweep says that it is none that has ended.
    let page = scratch.path("html");
    let compare = "compare --backend hosted --range 64K --repeat 1 --policy chunk=4K";
    let page = format!("{compare} --sweep {} --html {}", json.display(), page.display());
    let page = output(&page);
    assert_eq!(code(&page), 0, "{}", stderr(&page));
    assert!(stderr(&page).contains("unfinished"), "{}", stderr(&page));
}

fn a_killed_comparison_leaves_its_runs() {
    let scratch = Scratch::new("killed-compare");
    let json = scratch.path("json");
    let line = "compare --backend hosted --range 1M --repeat 1000 --policy chunk=4K,chunk=64K";
    let time = |compared: &Value| number(&compared["wall_ns"]);
    // Nothing is written while a run is measured: how late it is, runs decide.
    killed(&line.replace(",", " --policy "), &json, time, |compared| {
        let rows = items(&compared["rows"]);
        assert!(rows.len() == 6 && rows.iter().any(|row| number(&row["runs"]) > 0));
    });
}

/// There is no moment in which a reader finds half a file, or none.
fn a_report_is_whole_at_any_moment() {
    let scratch = Scratch::new("whole-report");
    let json = scratch.path("json");
    std::fs::write(&json, "{\"old\": true}").expect("written");
    let mut child = spawned("suite --backend hosted --range 64K", &json);
    let mut seen = (0, 0);
    while child.try_wait().expect("a child").is_none() {
        match read(&json).expect("always there") {
            suite if suite["unfinished"] == true => seen.1 += 1,
            suite => assert!(suite["old"] == true || suite["unfinished"] == false),
        }
        seen.0 += 1;
    }
    assert!(seen.1 > 0, "{seen:?}");
    let suite = read(&json).expect("results");
    assert_eq!((&suite["unfinished"], &suite["summary"]["cases"]), (&false.into(), &all().into()));
}

fn the_time_bounds_a_campaign_and_its_shrinking() {
    let scratch = Scratch::new("fuzz-time");
    let cases = scratch.path("cases").display().to_string();
    let started = Instant::now();
    let line = "fuzz openvmm --backend emulated --time 2s --format json";
    let ended = output(&format!("{line} --cases {cases}"));
    let took = started.elapsed();
    assert_eq!(code(&ended), 1);
    let report: Value = serde_json::from_str(&stdout(&ended)).expect("a report");
    assert!(number(&report["left_out"]) > 0);
    // Some of the time is left to make small what was found.
    let search = Duration::from_nanos(number(&report["search_ns"]));
    assert!((900..1700).contains(&search.as_millis()), "{search:?}");
    assert!(took >= search && took < Duration::from_secs(4), "{took:?}");
    let states: Vec<&str> =
        items(&report["findings"]).iter().map(|row| text(&row["shrinking"])).collect();
    assert!(states.contains(&"unfinished"), "{states:?}");

    // What takes less than it might leaves the rest to the search.
    let started = Instant::now();
    let ended = output(&format!("fuzz openvmm --time 3s --format json --cases {cases}"));
    assert!((2900..5000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    let report: Value = serde_json::from_str(&stdout(&ended)).expect("a report");
    assert!(items(&report["findings"]).iter().all(|row| row["shrinking"] == "done"));
    let search = Duration::from_nanos(number(&report["search_ns"]));
    assert!(search > Duration::from_millis(2200), "{search:?}");
}

fn main() -> std::process::ExitCode {
    harness(vec![
        (
            "ctrl_c_keeps_what_a_hosted_campaign_found",
            Needs::Nothing,
            ctrl_c_keeps_what_a_hosted_campaign_found,
        ),
        (
            "ctrl_c_keeps_what_an_emulated_campaign_found",
            Needs::Kvm,
            ctrl_c_keeps_what_an_emulated_campaign_found,
        ),
        (
            "a_killed_campaign_leaves_its_findings",
            Needs::Nothing,
            a_killed_campaign_leaves_its_findings,
        ),
        (
            "a_campaign_killed_while_shrinking_leaves_its_findings",
            Needs::Kvm,
            a_campaign_killed_while_shrinking_leaves_its_findings,
        ),
        (
            "ctrl_c_keeps_the_results_of_a_suite",
            Needs::Nothing,
            ctrl_c_keeps_the_results_of_a_suite,
        ),
        ("a_killed_suite_leaves_its_cases", Needs::Nothing, a_killed_suite_leaves_its_cases),
        ("a_killed_sweep_leaves_its_cells", Needs::Nothing, a_killed_sweep_leaves_its_cells),
        (
            "a_killed_comparison_leaves_its_runs",
            Needs::Nothing,
            a_killed_comparison_leaves_its_runs,
        ),
        ("a_report_is_whole_at_any_moment", Needs::Nothing, a_report_is_whole_at_any_moment),
        (
            "the_time_bounds_a_campaign_and_its_shrinking",
            Needs::Kvm,
            the_time_bounds_a_campaign_and_its_shrinking,
        ),
    ])
}
