//! The command `compare`: what is counted, what hangs, what is written, what is refused.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::Scratch;
use support::command::{code, command, output, refused, stderr, stdout};

/// The object on stdout of a comparison that must end with `expected`.
fn object(line: &str, expected: i32) -> Value {
    let ran = output(&format!("compare --format json {line}"));
    assert_eq!(code(&ran), expected, "{line}: {}", stderr(&ran));
    serde_json::from_str(&stdout(&ran)).expect("one object")
}

fn row<'a>(object: &'a Value, policy: &str, guest_chunk: Option<u64>) -> &'a Value {
    let rows = object["rows"].as_array().expect("rows");
    rows.iter()
        .find(|row| row["policy"] == policy && row["guest_chunk"].as_u64() == guest_chunk)
        .unwrap_or_else(|| panic!("no row {policy} {guest_chunk:?} in {object:#}"))
}

#[test]
fn calls_are_counted_and_complete_is_added() {
    let line = "--backend hosted --range 2M --direction to-shared --repeat 2 \
                --policy chunk=64K,stall=1 --policy chunk=1M";
    let object = object(line, 0);
    assert_eq!(object["schema"], "mapgpa.compare/1");
    assert_eq!(object["rows"].as_array().map(Vec::len), Some(3));
    let complete = row(&object, "complete", None);
    assert_eq!((&complete["requests"], &complete["retries"]), (&1.into(), &0.into()));
    assert_eq!(complete["to_complete"]["median"], 1.0);
    let stalls = row(&object, "chunk=64K,stall=1", None);
    assert_eq!(stalls["requests"], 64);
    assert_eq!((&stalls["retries"], &stalls["no_progress"]), (&63.into(), &32.into()));
    assert_eq!((&stalls["runs"], &stalls["outcome"]), (&2.into(), &"completed".into()));
    let (least, most) = (&stalls["conversion_ns"]["min"], &stalls["conversion_ns"]["max"]);
    assert!(least.as_f64() > Some(0.0) && least.as_f64() <= most.as_f64());
    assert_eq!(row(&object, "chunk=1M", None)["requests"], 2);
}

#[test]
fn a_round_trip_is_two_directions_and_guest_chunks_are_rows() {
    let line = "--backend hosted --range 2M --repeat 1 --policy chunk=64K --guest-chunk 1M \
                --guest-chunk none";
    let object = object(line, 0);
    let rows = object["rows"].as_array().expect("rows");
    let of = |direction: &str| rows.iter().filter(|row| row["direction"] == direction).count();
    assert_eq!((of("to-shared"), of("to-private"), rows.len()), (4, 4, 8));
    assert_eq!(row(&object, "complete", Some(1 << 20))["requests"], 2);
    assert_eq!(row(&object, "chunk=64K", Some(1 << 20))["retries"], 30);
    assert_eq!(row(&object, "chunk=64K", None)["retries"], 31);
    assert!(rows.iter().all(|row| row["to_complete"]["median"].is_f64()));
}

#[test]
fn what_hangs_costs_its_timeout_once_and_spoils_nothing() {
    // Without limits of the judge's, svsm retries for ever.
    let line = "--backend hosted --range 2M --repeat 3 --direction to-shared --guest svsm \
                --policy stall=forever --policy chunk=64K --timeout 300ms \
                --max-no-progress 1000000000000 --max-calls 1000000000000";
    let began = Instant::now();
    let object = object(line, 1);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let hangs = row(&object, "stall=forever", None);
    assert_eq!((&hangs["outcome"], &hangs["runs"]), (&"timed-out".into(), &1.into()));
    assert!(hangs["conversion_ns"].is_null() && hangs["to_complete"].is_null());
    for policy in ["complete", "chunk=64K"] {
        let good = row(&object, policy, None);
        assert_eq!((&good["outcome"], &good["runs"]), (&"completed".into(), &3.into()));
    }
    let text = output(&format!("compare {line}"));
    assert!(stdout(&text).contains("timed out"), "{}", stdout(&text));
}

#[test]
fn who_gives_up_or_never_stops_is_shown_as_such() {
    let line = "--backend hosted --range 2M --repeat 2 --direction to-shared";
    let gives_up = object(&format!("{line} --guest linux-5.19 --policy chunk=64K"), 1);
    assert_eq!(row(&gives_up, "chunk=64K", None)["outcome"], "gave-up");
    let endless = object(&format!("{line} --guest openvmm --policy stall=forever"), 1);
    assert_eq!(row(&endless, "stall=forever", None)["outcome"], "endless");
    let text = stdout(&output(&format!("compare {line} --guest linux-5.19 --policy chunk=64K")));
    assert!(text.contains("gave up") && text.contains("gave-up: "), "{text}");
}

#[test]
fn the_csv_quotes_and_has_all_rows() {
    let scratch = Scratch::new("compare-csv");
    let path = scratch.path("rows.csv");
    let line = format!(
        "compare --backend hosted --range 2M --repeat 1 --policy chunk=64K,stall=1 --csv {}",
        path.display()
    );
    assert_eq!(code(&output(&line)), 0);
    let mut csv = csv::Reader::from_path(&path).expect("a file");
    let policy = csv.headers().expect("a head").iter().position(|name| name == "policy");
    let rows: Vec<csv::StringRecord> = csv.records().map(|row| row.expect("a row")).collect();
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[1].get(policy.expect("a column")), Some("chunk=64K,stall=1"));
}

#[test]
fn bad_input_is_one_line() {
    let refuse = |line: &str, words: &[&str]| refused(command(&format!("compare {line}")), words);
    refuse("--policy chunk=5Q", &["chunk=5Q", "at character 7"]);
    refuse("--policy complete --policy complete", &["policy \"complete\" is named twice"]);
    refuse("--guest nobody", &["no guest is named \"nobody\""]);
    refuse("--guest-chunk 5K", &["--guest-chunk", "5K", "or none"]);
    refuse("--guest-chunk 2M --guest-chunk 2M", &["--guest-chunk \"2M\" is named twice"]);
    refuse("--repeat 0", &["--repeat", "0"]);
    refuse("--range 0", &["--range", "multiple of 4K"]);
    refuse("--backend hosted --floor", &["--floor", "--backend emulated"]);
    refuse("--backend hosted --html /no/such/dir/x.html", &["--html /no/such/dir/x.html"]);
    refuse("--backend hosted --csv /no/such/dir/x.csv", &["--csv /no/such/dir/x.csv"]);
    refuse("--sweep x.json", &["--html"]);
    refuse("--backend hosted --html /dev/null --sweep /no/such.json", &["/no/such.json"]);
    refuse(
        "--backend hosted --html /dev/null --sweep /dev/null",
        &["--sweep /dev/null", "sweep --json"],
    );
    refuse("--direction to-shared --policy accept=exit", &["accept=exit", "cannot apply"]);
    if mapgpa::backend::emulated::default_gpaw().is_ok() {
        refuse("--floor --vcpus 2", &["--floor", "--vcpus 1"]);
    }
}
