//! The published schemas hold for real output, and refuse what is broken.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::collections::BTreeSet;

use jsonschema::{Registry, Validator};
use mapgpa::judge::CHECKS;
use serde_json::{Map, Value, json};
use support::Scratch;
use support::command::{output, stdout};

fn schema(name: &str) -> Value {
    let path = format!("{}/../docs/schemas/{name}.schema.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect(&path);
    serde_json::from_str(&text).expect(&path)
}

/// Calls `check` with the validator of the schema `name`.
fn validated(name: &str, check: impl FnOnce(&Validator)) {
    let schema_of = schema(name);
    jsonschema::draft202012::meta::validate(&schema_of).expect("a schema");
    let run = schema("run");
    let registry = Registry::new()
        .add("urn:mapgpa:schema:run:1", run)
        .expect("a URI")
        .prepare()
        .expect("its references are its own");
    let validator = jsonschema::options().with_registry(&registry).build(&schema_of);
    check(&validator.expect("a schema"));
}

fn holds(validator: &Validator, value: &Value) {
    let errors: Vec<_> = validator
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?} in {value:#}");
}

fn object(line: &str) -> Value {
    serde_json::from_str(&stdout(&output(line))).expect("one object")
}

/// `value` without a member, with one more, and with each member null: at every depth.
fn broken(value: &Value) -> Vec<Value> {
    match value {
        Value::Object(map) => {
            let mut all = Vec::new();
            for (key, member) in map {
                let mut without = map.clone();
                without.remove(key);
                all.push(Value::Object(without));
                let with = |member: Value| {
                    let mut changed = map.clone();
                    changed[key] = member;
                    Value::Object(changed)
                };
                all.push(with(json!({ "no": "such" })));
                all.extend(broken(member).into_iter().map(with));
            }
            let mut more = map.clone();
            more.insert("surprise".to_owned(), json!(1));
            all.push(Value::Object(more));
            all
        }
        Value::Array(items) => {
            let first = items.first().map(broken).unwrap_or_default();
            let mut all: Vec<_> = first.into_iter().map(|item| json!([item])).collect();
            all.push(json!({}));
            all
        }
        Value::Number(number) if number.is_f64() => vec![json!(-1), json!("1")],
        Value::Number(_) => vec![json!(-1), json!(1.5), json!("1")],
        Value::String(_) => vec![json!(1), json!([])],
        Value::Bool(_) => vec![json!(1), json!("true")],
        // Where null is one of two, the other is no list.
        Value::Null => vec![json!([])],
    }
}

/// Members that may be absent, or hold what they like.
const LOOSE: [&str; 2] = ["\"host\":", "\"at\":"];

/// How many of the broken forms of `value` pass, beside those that only touch loose members.
fn passing(validator: &Validator, value: &Value) -> Vec<String> {
    let tight = |value: &Value| {
        let mut value = value.clone();
        loosen(&mut value);
        value
    };
    let whole = tight(value);
    let forms = broken(value).into_iter().filter(|form| tight(form) != whole);
    forms.filter(|form| validator.is_valid(form)).map(|form| form.to_string()).collect()
}

fn loosen(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !LOOSE.iter().any(|loose| loose.contains(&format!("\"{key}\""))));
            map.values_mut().for_each(loosen);
        }
        Value::Array(items) => items.iter_mut().for_each(loosen),
        _ => {}
    }
}

const RUNS: [&str; 8] = [
    "run reference --policy chunk=64K",
    "run linux-6.7 --policy r11=unaligned --seed 18446744073709551615",
    "run edk2-2023 --policy chunk=64K --vcpus 2",
    "run openvmm --policy stall=forever --gpaw 52",
    "run oak --policy complete --layout scattered --range 64K --direction to-private",
    "run linux-6.7 --policy qemu-tdx",
    "run reference --policy accept=exit",
    "run asterinas-3845 --policy hostile-random --on-violation stop",
];

#[test]
fn runs() {
    validated("run", |validator| {
        for run in RUNS {
            let value = object(&format!("{run} --backend hosted --format json"));
            holds(validator, &value);
            let passing = passing(validator, &value);
            assert!(passing.is_empty(), "{run}: {passing:#?}");
        }
        // What a kernel adds may be there, and what it is not may not.
        let plain = object(&format!("{} --backend hosted --format json", RUNS[0]));
        let mut more = plain.clone();
        more["direction"] = json!("any");
        more["console"] = json!("[    0.000000] tdx: Guest detected\n");
        more["kernel"] = json!({
            "version": "6.12.0", "sites": 3, "lookalikes": 0, "vcpus": 1, "memory": 536_870_912u64,
            "cmdline": "console=ttyS0"
        });
        holds(validator, &more);
        more["colonel"] = json!("Linux");
        assert!(!validator.is_valid(&more));
    });
}

#[test]
fn suites() {
    validated("suite", |validator| {
        let suite = "suite --backend hosted --guests linux-5.19,reference,svsm --format json";
        let value = object(&format!("{suite} --policies complete,chunk=64K,qemu-tdx,r11=end"));
        holds(validator, &value);
        let passing = passing(validator, &value);
        assert!(passing.is_empty(), "{passing:#?}");
        // A case that could not be run has no run object.
        let mut failed = value;
        failed["cases"][0] = json!({
            "number": 1, "guest": "svsm", "policy": "complete", "verdict": "error",
            "error": "KVM_RUN failed",
            "expected": [], "as_expected": false
        });
        holds(validator, &failed);
        failed["cases"][0]["verdict"] = json!("pass");
        assert!(!validator.is_valid(&failed));
    });
}

#[test]
fn a_suite_of_everything() {
    validated("suite", |validator| {
        holds(validator, &object("suite --backend hosted --format json --range 64K"));
    });
}

#[test]
fn comparisons() {
    validated("compare", |validator| {
        let line = "compare --backend hosted --range 1M --repeat 2 --format json";
        for more in [
            "--policy chunk=64K --guest-chunk none --guest-chunk 128K",
            "--policy chunk=64K --guest linux-5.19 --direction to-shared",
            "--policy stall=forever --guest openvmm --front-end kvm-7.2 --nearest",
        ] {
            let value = object(&format!("{line} {more}"));
            holds(validator, &value);
            let passing = passing(validator, &value);
            assert!(passing.is_empty(), "{more}: {passing:#?}");
        }
        // A row that could not be measured has no figures.
        let mut failed = object(&format!("{line} --policy chunk=64K"));
        let row = &mut failed["rows"][0];
        row["outcome"] = json!("error");
        for figure in ["handler_ns", "conversion_ns", "gib_per_s", "latency", "to_complete"] {
            row[figure] = Value::Null;
        }
        holds(validator, &failed);
        failed["rows"][0]["outcome"] = json!("fine");
        assert!(!validator.is_valid(&failed));
    });
}

#[test]
fn sweeps() {
    validated("sweep", |validator| {
        let line = "sweep --range 1M --chunk 4K,64K --seeds 3 --format json";
        for more in [
            "--verify 4 --guest linux-6.7 --bound own,none --guest-chunk none,128K",
            "--verify 0 --guest linux-5.19 --stall none",
        ] {
            let mut value = object(&format!("{line} {more}"));
            holds(validator, &value);
            let passing = passing(validator, &value);
            assert!(passing.is_empty(), "{more}: {passing:#?}");
            // What a kernel adds, and what could not be run.
            if let Some(cell) = value["verified"].get_mut(0) {
                cell["kernel"] = json!("/boot/vmlinuz");
                (cell["vm_survived"], cell["vm_calls"]) = (Value::Null, Value::Null);
                cell["error"] = json!("it made no conversion");
            }
            value["cells"][0]["error"] = json!("no memory");
            holds(validator, &value);
            value["cells"][0]["share"] = json!(1);
            assert!(!validator.is_valid(&value));
        }
    });
}

#[test]
fn traces() {
    let scratch = Scratch::new("schema-trace");
    let file = scratch.path("t.jsonl");
    validated("trace", |validator| {
        let mut seen = BTreeSet::new();
        for run in RUNS {
            output(&format!("{run} --backend hosted --trace {}", file.display()));
            let text = std::fs::read_to_string(&file).expect("the trace");
            assert!(!text.is_empty());
            for (at, line) in text.lines().enumerate() {
                let mut value: Value = serde_json::from_str(line).expect("one object a line");
                holds(validator, &value);
                // What was run is on the first line, and on no other.
                let run = value.as_object_mut().and_then(|line| line.remove("run"));
                assert_eq!(run.is_some(), at == 0, "{line}");
                if seen.insert(value["status"].to_string()) {
                    let passing = passing(validator, &value);
                    assert!(passing.is_empty(), "{passing:#?}");
                }
            }
        }
        assert!(seen.len() >= 3, "{seen:?}");
    });
}

#[test]
fn campaigns() {
    let scratch = Scratch::new("schema-fuzz");
    validated("fuzz", |validator| {
        for fuzz in ["openvmm --seeds 200", "reference --class legal --seeds 50 --shard 2/3"] {
            let cases = scratch.path("cases").display().to_string();
            let value = object(&format!("fuzz {fuzz} --format json --cases {cases}"));
            holds(validator, &value);
            let passing = passing(validator, &value);
            // Where there was no error, one might have been.
            let has_error = |form: &&String| form.contains("\"error\":\"");
            let passing: Vec<_> = passing.iter().filter(|form| !has_error(form)).collect();
            assert!(passing.is_empty(), "{fuzz}: {passing:#?}");
        }
    });
}

#[test]
fn the_schema_knows_every_check() {
    let schema = schema("run");
    let names: Vec<Value> = CHECKS.iter().map(|info| info.name.into()).collect();
    assert_eq!(schema["$defs"]["check"]["enum"], Value::Array(names));
}

#[test]
fn every_member_is_described_or_plain() {
    // A reader of the schema meets no member that the tool never writes, but for what is to come.
    let value = object(&format!("{} --backend hosted --format json", RUNS[1]));
    let written: BTreeSet<&String> =
        value.as_object().map(Map::keys).into_iter().flatten().collect();
    let schema = schema("run");
    let properties = schema["$defs"]["run"]["properties"].as_object().expect("properties");
    let unwritten: Vec<_> = properties.keys().filter(|key| !written.contains(key)).collect();
    assert_eq!(unwritten, ["kernel", "firmware", "phases", "console"]);
}
