//! Bad input on the command line and in files: one clear line, exit 2, nothing left behind.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::fs;

use support::Scratch;
use support::command::{command, refused, with};

/// Refused under `run reference --backend hosted` and, where it is not about the guest, `suite`.
const CASE_OPTIONS: &[(&str, &[&str])] = &[
    ("--range 0", &["--range", "0", "multiple of 4K"]),
    ("--range 6000", &["--range", "6000", "multiple of 4K"]),
    ("--range 2X", &["--range", "2X", "a size such as"]),
    ("--range -2M", &["-2"]),
    ("--range 1.5M", &["--range", "1.5M"]),
    ("--range 0x+1000", &["--range", "0x+1000"]),
    ("--range 99999999999999999999", &["--range", "99999999999999999999"]),
    ("--range 64M --memory 64M", &["--range 64M", "--memory 80M", "64M"]),
    ("--range 2M --memory 32M --layout scattered --range 16M", &["cannot be used multiple times"]),
    (
        "--range 16M --memory 32M --layout scattered",
        &["--range 16M --layout scattered", "--memory 48M"],
    ),
    ("--range 2T", &["--range 2T", "1T"]),
    ("--range 16777215T", &["--range 16777215T", "1T"]),
    ("--range 9T --layout scattered", &["--range 9T", "1T"]),
    ("--memory 1K", &["--memory 1K", "32M", "1T"]),
    ("--memory 0", &["--memory 0", "32M", "1T"]),
    ("--memory 100T", &["--memory 100T", "1T"]),
    ("--memory lots", &["--memory", "lots", "a size such as"]),
    ("--vcpus 0", &["--vcpus 0", "1 to 16"]),
    ("--vcpus 1000", &["--vcpus 1000", "1 to 16"]),
    ("--vcpus 2 --range 4K", &["--vcpus 2", "1 to 1", "page"]),
    ("--vcpus two", &["--vcpus", "two"]),
    ("--gpaw 10", &["--gpaw 10", "to 52"]),
    ("--gpaw 64", &["--gpaw 64", "to 52"]),
    ("--gpaw 53", &["--gpaw 53", "to 52"]),
    ("--gpaw 25", &["--gpaw 25", "from 26"]),
    ("--gpaw x", &["--gpaw", "x"]),
    ("--bound 0", &["--bound", "0", "1 to 1000000"]),
    ("--bound never", &["--bound", "never", "none"]),
    ("--guest-chunk 0", &["--guest-chunk", "0", "multiple of 4K"]),
    ("--guest-chunk 5K", &["--guest-chunk", "5K", "multiple of 4K"]),
    ("--seed -1", &["-1"]),
    ("--seed one", &["--seed", "one"]),
    ("--timeout 0s", &["--timeout", "0s", "a duration"]),
    ("--timeout 10", &["--timeout", "10", "a duration such as"]),
    ("--timeout 9999999s", &["--timeout", "9999999s", "a duration such as"]),
    ("--direction up", &["--direction", "up", "to-shared, to-private, round-trip"]),
    ("--layout round", &["--layout", "round", "contiguous, scattered"]),
    ("--layout overlapping", &["--layout overlapping", "2 vCPUs"]),
    (
        "--layout overlapping --vcpus 2 --direction to-private",
        &["--layout overlapping", "to-shared"],
    ),
    ("--on-violation weep", &["--on-violation", "weep", "continue, stop"]),
    ("--max-no-progress many", &["--max-no-progress", "many"]),
    ("--max-calls many", &["--max-calls", "many"]),
    ("--format xml", &["--format", "xml", "text, json"]),
    ("--frobnicate", &["--frobnicate"]),
];

const POLICIES: &[(&str, &[&str])] = &[
    ("chunk=64Q", &["chunk=64Q", "at character 7", "a size such as"]),
    ("chunk=0", &["at character 7", "multiple of 4K"]),
    ("chunk", &["at character 6", "found nothing"]),
    ("", &["at character 1", "found nothing"]),
    ("chunk=64K,", &["at character 11", "expected complete, chunk="]),
    ("chunk=64K,stall=0", &["at character 17", "a number from 1"]),
    ("contention=2", &["at character 12", "a probability"]),
    ("r11=up", &["at character 5", "past-end"]),
    ("status=1", &["at character 8", "0x8000000000000000"]),
    ("lie=retry", &["at character 5", "success"]),
    ("accept=no", &["at character 8", "already"]),
    ("overlap=no", &["at character 9", "inuse"]),
    ("after=3", &["at character 1", "stall="]),
    ("cost=3us", &["at character 1", "budget="]),
    ("random,chunk=4K", &["alone"]),
    ("chunk=4K,chunk=8K", &["at character 10", "no second"]),
    ("chunky=4K", &["at character 1", "chunk=", "preset"]),
    ("/nowhere/p.toml", &["/nowhere/p.toml", "cannot be read", "No such file"]),
];

#[test]
fn options_of_a_case() {
    for (options, words) in CASE_OPTIONS {
        refused(command(&format!("run reference --backend hosted {options}")), words);
        refused(command(&format!("suite --backend hosted --policies complete {options}")), words);
    }
}

#[test]
fn policies() {
    for (policy, words) in POLICIES {
        refused(with(&["run", "reference", "--backend", "hosted", "--policy", policy]), words);
        refused(with(&["explain", policy]), words);
        if !policy.contains(',') {
            refused(with(&["suite", "--backend", "hosted", "--policies", policy]), words);
        }
    }
    // What is typed with line breaks is still one line.
    refused(with(&["run", "reference", "--policy", "a\nb\u{1b}"]), &["a\\nb"]);
    refused(with(&["run", "a\nb"]), &["a\\nb"]);
}

#[test]
fn guests() {
    for run in ["run windows", "suite --guests windows", "suite --guests reference,windows"] {
        refused(
            command(&format!("{run} --backend hosted")),
            &["\"windows\"", "mapgpa list guests"],
        );
    }
    refused(command("run . --backend hosted"), &["."]);
    refused(command("run tdx-tdcall --backend hosted"), &["tdx-tdcall", "--backend emulated"]);
    refused(command("suite --guests tdx-tdcall --backend hosted"), &["tdx-tdcall", "--backend"]);
    refused(command("run /dev/zero --backend hosted"), &["/dev/zero", "larger than 64M"]);
    refused(command("run Cargo.toml --backend hosted"), &["Cargo.toml", "--backend emulated"]);
    refused(
        command("run mushroom --bound 3 --backend hosted"),
        &["--bound", "mushroom", "list guests"],
    );
    refused(
        command("suite --guests mushroom --bound 3 --backend hosted"),
        &["--bound", "mushroom"],
    );
    refused(command("run"), &["GUEST"]);
    refused(command("run oak --backend mainframe"), &["mainframe", "hosted"]);
    refused(command("suite --backend mainframe"), &["mainframe", "hosted"]);
    refused(command("frobnicate"), &["frobnicate"]);
    refused(command("list frobs"), &["frobs", "guests, policies, checks"]);
}

#[test]
fn policies_that_cannot_apply() {
    let run = "run reference --backend hosted --policy";
    for (options, words) in [
        ("accept=exit --direction to-shared", ["accept=exit", "--direction to-shared", "accepted"]),
        (
            "r11=strip-shared --direction to-private",
            ["r11=strip-shared", "to-private", "shared bit"],
        ),
    ] {
        refused(command(&format!("{run} {options}")), &words);
    }
}

#[test]
fn suites() {
    for shard in ["0/4", "5/4", "1", "1/0", "a/b", "1/2/3", "-1/4", "+1/4"] {
        let option = format!("--shard={shard}");
        refused(
            with(&["suite", "--backend", "hosted", &option]),
            &["--shard", shard, "such as 1/4"],
        );
    }
    for jobs in ["0", "-1", "1025", "many"] {
        refused(
            with(&["suite", "--backend", "hosted", &format!("--jobs={jobs}")]),
            &["--jobs", jobs],
        );
    }
    let suite = "suite --backend hosted";
    refused(command(&format!("{suite} --guests oak,oak")), &["guest \"oak\"", "twice"]);
    refused(command(&format!("{suite} --policies random,random")), &["\"random\"", "twice"]);
    refused(with(&["suite", "--backend", "hosted", "--guests", ""]), &["no guest is named \"\""]);
}

#[test]
fn a_policy_that_cannot_apply_hides_no_other_error() {
    let suite = "suite --backend hosted --policies accept=exit --direction to-shared";
    refused(command(&format!("{suite} --vcpus 1000")), &["--vcpus 1000"]);
    refused(command(&format!("{suite} --range 9T")), &["--range 9T"]);
    refused(command(&format!("{suite} --gpaw 3")), &["--gpaw 3"]);
}

#[test]
fn two_policies_of_one_name() {
    let scratch = Scratch::new("one-name");
    let rule = "schema = \"mapgpa.policy/1\"\nname = \"complete\"\n[[rule]]\ndo = \"chunk=4K\"\n";
    let file = scratch.path("p.toml");
    fs::write(&file, rule).expect("a file");
    let list = format!("complete,{}", file.display());
    refused(
        with(&["suite", "--backend", "hosted", "--policies", &list]),
        &["\"complete\"", "twice"],
    );
}

#[test]
fn policy_files() {
    let scratch = Scratch::new("policy-files");
    let file = scratch.path("p.toml").display().to_string();
    for (text, words) in [
        ("", &["schema"][..]),
        ("schema = 3", &["schema"]),
        ("schema = \"mapgpa.policy/2\"", &["mapgpa.policy/2", "expected \"mapgpa.policy/1\""]),
        ("schema = \"mapgpa.policy/1\"", &["[[rule]]"]),
        (
            "schema = \"mapgpa.policy/1\"\nspeed = 3\n[[rule]]\ndo = \"complete\"",
            &["speed", "line 2"],
        ),
        (
            "schema = \"mapgpa.policy/1\"\n[[rule]]\ndo = \"complete\"\ncall = 3",
            &["call", "line 4"],
        ),
        ("schema = \"mapgpa.policy/1\"\n[[rule]]\ndo = \"chunk=3\"", &["rule 1", "at character 7"]),
        ("schema = \"mapgpa.policy/1\"\n[[rule]]\ncalls = [1, 2]", &["do"]),
        (
            "schema = \"mapgpa.policy/1\"\n[[rule]]\ndo = \"complete\"\ngpa = [2, 1]",
            &["rule 1", "gpa = [2, 1]"],
        ),
        ("schema = \"mapgpa.policy/1\"\nname = \"\"\n[[rule]]\ndo = \"complete\"", &["name"]),
        ("\u{0}", &["p.toml"]),
    ] {
        fs::write(&file, text).expect("a file");
        let words: Vec<_> = words.iter().copied().chain(["p.toml"]).collect();
        refused(with(&["run", "reference", "--backend", "hosted", "--policy", &file]), &words);
        refused(with(&["explain", &file]), &words);
    }
    fs::write(&file, [0xff, 0xfe]).expect("a file");
    refused(with(&["explain", &file]), &["p.toml", "cannot be read"]);
}

#[test]
fn expectation_files() {
    let scratch = Scratch::new("expectations");
    let file = scratch.path("e.toml").display().to_string();
    let known = |guest: &str, policy: &str, check: &str| {
        format!(
            "schema = \"mapgpa.expectations/1\"\n[[known]]\nguests = [\"{guest}\"]\n\
             policies = [\"{policy}\"]\nchecks = [{check}]\nwhy = \"\"\n"
        )
    };
    for (text, words) in [
        (known("windows", "complete", "\"crash\""), &["windows", "entry 1", "list guests"][..]),
        (known("oak", "complete", "\"crush\""), &["crush", "entry 1", "list checks"]),
        (known("oak", "complete", ""), &["entry 1", "check"]),
        (known("oak", "chunk=3", "\"crash\""), &["entry 1", "at character 7"]),
        (known("oak", "complete", "\"crash\", \"crash\""), &["entry 1", "twice"]),
        (known("oak", "complete", "\"crash\"").replace("why", "because"), &["because"]),
        ("schema = \"x\"".to_owned(), &["expected \"mapgpa.expectations/1\""]),
        ("[[".to_owned(), &["line 1"]),
    ] {
        fs::write(&file, text).expect("a file");
        let words: Vec<_> = words.iter().copied().chain(["e.toml"]).collect();
        refused(
            with(&["suite", "--backend", "hosted", "--guests", "oak", "--expect", &file]),
            &words,
        );
    }
    refused(
        command("suite --backend hosted --expect /nowhere/e.toml"),
        &["/nowhere/e.toml", "No such file"],
    );
}

#[test]
fn files_that_cannot_be_written() {
    let scratch = Scratch::new("unwritable");
    let nowhere = "/nowhere/out";
    let ours = scratch.path("ours").display().to_string();
    let run = ["run", "reference", "--backend", "hosted"];
    let suite = ["suite", "--backend", "hosted", "--guests", "oak", "--policies", "complete"];
    let words = |option: &'static str| [option, nowhere, "No such file"];
    refused(with(&[&run[..], &["--trace", nowhere]].concat()), &words("--trace"));
    for option in ["--junit", "--ktap", "--json"] {
        refused(with(&[&suite[..], &[option, nowhere]].concat()), &words(option));
        for other in ["--junit", "--ktap", "--json"] {
            if other != option {
                let args = [&suite[..], &[other, &ours, option, nowhere]].concat();
                refused(with(&args), &words(option));
                assert_eq!(scratch.files(), [""; 0], "{other} is left behind");
                // What was there before stays as it was.
                fs::write(&ours, "mine").expect("a file");
                refused(with(&args), &words(option));
                assert_eq!(fs::read_to_string(&ours).expect("still there"), "mine");
                fs::remove_file(&ours).expect("still there");
                let args = [&suite[..], &[other, &ours, option, &ours]].concat();
                refused(with(&args), &[option, other, &ours]);
                assert_eq!(scratch.files(), [""; 0]);
            }
        }
    }
    let directory = std::env::temp_dir().display().to_string();
    refused(with(&[&run[..], &["--trace", &directory]].concat()), &["--trace", "directory"]);
}

#[test]
fn nothing_is_left_behind_when_another_argument_is_bad() {
    let scratch = Scratch::new("left-behind");
    let file = |name| scratch.path(name).display().to_string();
    let (trace, junit, json) = (file("t"), file("x"), file("j"));
    for bad in ["--range 2T", "--vcpus 99", "--gpaw 64", "--policy nope", "--memory 1K"] {
        let line = format!("run reference --backend hosted --trace {trace} {bad}");
        refused(command(&line), &[]);
    }
    refused(command(&format!("run nobody --trace {trace}")), &["nobody"]);
    for bad in ["--range 2T", "--vcpus 99", "--expect /nowhere", "--guests nobody", "--shard 9/3"] {
        let line = format!("suite --backend hosted --junit {junit} --json {json} {bad}");
        refused(command(&line), &[]);
    }
    assert_eq!(scratch.files(), [""; 0]);
}

#[test]
fn explanations() {
    for (options, words) in [
        ("--range 0", &["--range", "0"][..]),
        ("--range 5K", &["--range", "5K"]),
        ("--range 2T", &["--range 2T", "1T"]),
        ("--range 16777215T", &["--range 16777215T", "1T"]),
        ("--direction up", &["--direction", "up"]),
        ("--calls x", &["--calls", "x"]),
    ] {
        refused(command(&format!("explain chunk=64K {options}")), words);
    }
    refused(command("explain accept=exit --direction to-shared"), &["accept=exit", "to-shared"]);
    refused(command("explain"), &["POLICY"]);
}
