//! Policies: what can be written, what each decides, and that decisions follow from the seed alone.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::error::Error;

use mapgpa::pagemap::{PageState, Pages};
use mapgpa::policy::{
    AcceptAnswer, Amount, Context, PRESETS, Policy, PolicyError, Request, SPEC_HELP, Say,
};
use mapgpa::suite::POLICIES;
use mapgpa_abi::Direction;
use mapgpa_abi::tdcall::status;
use proptest::prelude::*;
use support::{BIT, Bench, GPA, K4, M2, Scratch};

fn request(vcpu: u32, call: u64, shared: bool, page: u64, pages: u64) -> Request {
    let gpa = GPA + page * K4;
    let (raw_gpa, to) =
        if shared { (gpa | BIT, Direction::ToShared) } else { (gpa, Direction::ToPrivate) };
    Request { vcpu, call, raw_gpa, gpa, size: pages * K4, to, shared_bit: BIT }
}

fn fixture(name: &str) -> String {
    format!("{}/../fixtures/policies/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn everything_that_is_offered_is_read() {
    for name in POLICIES.iter().copied().chain(PRESETS.iter().map(|preset| preset.name)) {
        let policy = Policy::parse(name).expect(name);
        assert_eq!(policy.to_string(), name);
        assert_eq!(policy.is_special(), name != "complete", "{name}");
    }
    assert!(POLICIES.len() >= 25);
    // The help names every item, and each of its examples without a variable part is one.
    for (item, does) in SPEC_HELP {
        assert!(does.len() > 10, "{item}");
        if !item.contains(|c: char| c.is_ascii_uppercase()) {
            for spec in item.split_once('=').map_or(vec![(*item).to_owned()], |(key, values)| {
                values.split('|').map(|value| format!("{key}={value}")).collect()
            }) {
                Policy::parse(&spec).expect(&spec);
            }
        }
    }
}

#[test]
fn what_is_written_after_a_preset_takes_its_place() {
    let same = |a: &str, b: &str| {
        let rules = |spec: &str| Policy::parse(spec).expect(spec).rules;
        assert_eq!(rules(a), rules(b), "{a} and {b}");
    };
    same("hyperv,cost=400ns", "budget=50us,cost=400ns");
    same("hyperv,budget=20us", "budget=20us,cost=200ns");
    same("hyperv,chunk=4K", "chunk=4K");
    same("kvm-7.2,chunk=4M", "chunk=4M,stall=1");
    same("kvm-7.2,stall=3", "chunk=2M,stall=3");
    same("kvm-7.2,budget=50us", "budget=50us,stall=1");
    same("kvm-7.2,complete", "complete,stall=1");
    same("accept=mismatch,qemu-tdx", "chunk=64M,accept=mismatch");
    for twice in ["stall=2,kvm-7.2", "chunk=4K,hyperv", "stall=1,hyperv,stall=2", "hyperv,hyperv"] {
        assert!(Policy::parse(twice).is_err(), "{twice}");
    }
}

#[test]
fn numbers_have_no_signs() {
    for spec in [
        "stall=+2",
        "stall=-1",
        "chunk=+4K",
        "chunk=0x+1000",
        "r11=0x+1000",
        "r11=0x-1",
        "r11=end++4K",
        "status=0x+2",
        "contention=+0.5",
        "stall=1,after=+3",
        "contention=inf",
    ] {
        let error = Policy::parse(spec).expect_err(spec).to_string();
        assert!(error.contains("at character "), "{error}");
    }
}

/// Where a spec's error is, from 1.
fn position(error: &PolicyError) -> Option<usize> {
    let text = error.to_string();
    let (_, after) = text.rsplit_once("at character ")?;
    after.split(':').next()?.parse().ok()
}

/// Strings that are nearly specs.
fn nearly() -> impl Strategy<Value = String> {
    let word = proptest::sample::select(vec![
        "chunk",
        "stall",
        "contention",
        "budget",
        "cost",
        "r11",
        "status",
        "lie",
        "accept",
        "overlap",
        "after",
        "complete",
        "random",
        "hostile-random",
        "hyperv",
        "kvm-7.2",
        "=",
        "=",
        "=",
        ",",
        ",",
        "4K",
        "0x",
        "end",
        "start",
        "next",
        "+",
        "-",
        "forever",
        "success",
        "50us",
        "0.5",
        "é",
        " ",
        "\n",
        "18446744073709551615",
        "16777215T",
        "inuse",
        "exit",
        "",
    ]);
    proptest::collection::vec(word, 0..9).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(support::cases(2000))]

    #[test]
    fn any_text_is_a_policy_or_has_an_error_with_a_place(
        text in prop_oneof![nearly(), ".*", "[a-z0-9=,.+-]{0,20}"],
    ) {
        prop_assume!(!text.ends_with(".toml"));
        match Policy::parse(&text) {
            Ok(policy) => prop_assert_eq!(policy.name, text),
            Err(error) => {
                let at = position(&error).expect("a position");
                prop_assert!((1..=text.chars().count() + 1).contains(&at), "{}", error);
                prop_assert!(error.to_string().contains("expected "));
                prop_assert!(!mapgpa::one_line(&error).contains('\n'));
            }
        }
    }

    /// The same in TOML: no panic, and an error that names the file, in one line.
    #[test]
    fn any_toml_is_a_policy_or_has_an_error(
        head in prop_oneof![
            9 => Just("schema = \"mapgpa.policy/1\"\n".to_owned()), 1 => ".*"],
        key in prop_oneof![
            Just("do"), Just("calls"), Just("gpa"), Just("vcpu"), Just("direction"), Just("dо")],
        value in prop_oneof![
            nearly().prop_map(|text| format!("{text:?}")),
            any::<i64>().prop_map(|n| n.to_string()),
            any::<(i64, i64)>().prop_map(|pair| format!("[{}, {}]", pair.0, pair.1)),
            ".*",
        ],
    ) {
        let scratch = Scratch::new("toml");
        let file = scratch.path("p.toml");
        std::fs::write(&file, format!("{head}[[rule]]\ndo = \"complete\"\n[[rule]]\n{key} = {value}\n"))
            .expect("a file");
        if let Err(error) = Policy::parse(&file.display().to_string()) {
            let line = mapgpa::one_line(&error);
            prop_assert!(line.contains("p.toml") && !line.contains('\n'), "{}", line);
        }
    }

    /// A decision follows from seed, vCPU, call and context: not from what was decided before.
    #[test]
    fn decisions_follow_from_the_seed(
        policy in 0..POLICIES.len(),
        seed in any::<u64>(),
        calls in proptest::collection::vec((0..3_u32, 1..50_u64, any::<bool>(), 0..64_u64), 1..20),
    ) {
        let policy = Policy::parse(POLICIES[policy]).expect("one of the suite");
        let decide = |&(vcpu, call, shared, page): &(u32, u64, bool, u64)| {
            let context = Context { seed, replies: call - 1, no_progress: call % 4, overlap: false };
            let decision = policy.decide(&request(vcpu, call, shared, page, 512), &context);
            (decision, policy.decide_accept(seed, vcpu, call, GPA + page * K4))
        };
        let forth: Vec<_> = calls.iter().map(decide).collect();
        let mut back: Vec<_> = calls.iter().rev().map(decide).collect();
        back.reverse();
        prop_assert_eq!(forth, back);
    }
}

#[test]
fn draws_differ_by_seed_vcpu_and_call() {
    for name in ["random", "hostile-random", "contention=0.5"] {
        let policy = Policy::parse(name).expect(name);
        let stream = |seed, vcpu| -> Vec<_> {
            let context = Context { seed, ..Context::default() };
            (1..200)
                .map(|call| policy.decide(&request(vcpu, call, true, 0, 512), &context))
                .collect()
        };
        let first = stream(1, 0);
        assert!(first.windows(2).any(|pair| pair[0] != pair[1]), "{name}: calls");
        assert_ne!(first, stream(2, 0), "{name}: seeds");
        assert_ne!(first, stream(1, 1), "{name}: vCPUs");
        assert_eq!(first, stream(1, 0), "{name}");
    }
}

#[test]
fn random_stays_legal_and_hostile_random_shows_all_there_is() {
    let (legal, hostile) = (Policy::parse("random"), Policy::parse("hostile-random"));
    let (legal, hostile) = (legal.expect("random"), hostile.expect("hostile-random"));
    let (mut statuses, mut retries, mut lies, mut nothing) = (0, 0, 0, 0);
    for seed in 0..2000 {
        for no_progress in 0..4 {
            let context = Context { seed, replies: 9, no_progress, overlap: false };
            let decision = legal.decide(&request(0, 1, true, 0, 512), &context);
            assert_eq!(decision.say, Say::Truth);
            nothing += u64::from(decision.convert == Amount::Pages(0));
            assert!(no_progress < 2 || decision.convert != Amount::Pages(0), "three in a row");
            match hostile.decide(&request(0, 1, true, 0, 512), &context).say {
                Say::Truth => {}
                Say::Retry(_) => retries += 1,
                Say::Status(code) | Say::StatusAt(code, _) => {
                    assert!(code != status::SUCCESS && code != status::RETRY);
                    statuses += 1;
                }
                Say::Success => lies += 1,
            }
        }
        let answer = legal.decide_accept(seed, 0, 1, GPA);
        assert!(matches!(answer, AcceptAnswer::Truth | AcceptAnswer::Mismatch));
    }
    assert!(statuses > 100 && retries > 100 && lies > 100 && nothing > 100);
}

#[test]
fn a_policy_that_waits_shows_nothing_until_then() {
    for spec in [
        "chunk=4K,stall=1,after=600",
        "chunk=4K,contention=1,after=600",
        "chunk=4K,r11=end,after=600",
        "chunk=4K,status=0x8000000000000000,after=600",
        "chunk=4K,lie=success,after=600",
    ] {
        let mut bench = Bench::new(spec);
        let (mut start, end) = (BIT | GPA, BIT | (GPA + M2));
        loop {
            let reply = bench.map(start, end - start);
            assert!(!bench.last().special, "{spec}: call {}", bench.last().call);
            if reply.status != status::RETRY {
                break;
            }
            start = reply.r11;
        }
        let spec = spec.replace("600", "3");
        let mut bench = Bench::new(&spec);
        let special: Vec<_> = (0..4)
            .map(|call| {
                bench.map(BIT | (GPA + call * K4), M2 - call * K4);
                bench.last().special
            })
            .collect();
        assert_eq!(special, [false, false, false, true], "{spec}");
    }
}

#[test]
fn a_policy_that_cannot_apply_says_why() {
    let (shared, private) = (Direction::ToShared, Direction::ToPrivate);
    for (spec, to, applies) in [
        ("accept=exit", &[shared][..], false),
        ("accept=exit", &[private], true),
        ("accept=already", &[shared], false),
        ("accept=mismatch", &[shared, private], true),
        ("r11=strip-shared", &[private], false),
        ("r11=strip-shared", &[shared], true),
        ("r11=flip", &[private], true),
        ("complete", &[private], true),
        ("chunk=4K", &[shared], true),
    ] {
        let why = Policy::parse(spec).expect(spec).cannot_apply(to);
        assert_eq!(why.is_none(), applies, "{spec} {to:?}: {why:?}");
    }
    let one_way = Policy::parse(&fixture("tail-of-the-range.toml")).expect("an example");
    assert!(one_way.cannot_apply(&[private]).is_some_and(|why| why.contains("direction")));
    assert_eq!(one_way.cannot_apply(&[shared, private]), None);
}

/// R11 of each RETRY, relative to GPA, or the status, of a guest that obeys, in direction `bit`.
fn replies(bench: &mut Bench, vcpu: u32, bit: u64, size: u64) -> Vec<(u64, u64)> {
    let (mut start, end) = (GPA | bit, (GPA | bit) + size);
    let mut all = Vec::new();
    loop {
        let reply = bench.map_on(vcpu, start, end - start);
        all.push((reply.status, if reply.status == 1 { reply.r11 - (GPA | bit) } else { 0 }));
        if reply.status != status::RETRY || reply.r11 <= start && all.len() > 5000 {
            return all;
        }
        start = reply.r11;
    }
}

#[test]
fn example_second_call_stalls() {
    let path = fixture("second-call-stalls.toml");
    let mut bench = Bench::with(&path, 1, 1, support::GPAW);
    assert_eq!(bench.engine.settings().policy.name, "second call stalls");
    let expected = [(1, M2 / 2), (1, M2 / 2), (0, 0)];
    assert_eq!(replies(&mut bench, 0, BIT, M2), expected);
}

#[test]
fn example_slow_to_private() {
    let mut bench = Bench::new(&fixture("slow-to-private.toml"));
    assert_eq!(replies(&mut bench, 0, BIT, M2), [(0, 0)], "to shared at once");
    let private = replies(&mut bench, 0, 0, M2);
    assert_eq!(private.len(), 2 * 512, "a page a call, after one RETRY at its start");
    assert_eq!(private[..3], [(1, 0), (1, K4), (1, K4)]);
}

#[test]
fn example_tail_of_the_range() {
    let mut bench = Bench::with(&fixture("tail-of-the-range.toml"), 1, 2, support::GPAW);
    let (refused, start) = (status::GPA_INUSE, GPA + M2 / 2);
    assert_eq!(replies(&mut bench, 0, BIT, M2), [(1, M2 / 2), (refused, 0)]);
    assert_eq!(bench.last().r11, BIT | start);
    assert_eq!(replies(&mut bench, 1, BIT, M2), [(0, 0)], "only vCPU 0 meets it");
    assert_eq!(replies(&mut bench, 0, 0, M2), [(0, 0)], "and only to shared");
    let state = bench.engine.map().uniform(Pages { first: GPA / K4, count: 512 });
    assert_eq!(state, Some(PageState::PrivatePending));
}

#[test]
fn toml_names_are_one_printable_line() {
    let scratch = Scratch::new("names");
    let file = scratch.path("p.toml");
    let parse = |name: &str| {
        let rule = "[[rule]]\ndo = \"complete\"\n";
        let text = format!("schema = \"mapgpa.policy/1\"\nname = {name}\n{rule}");
        std::fs::write(&file, text).expect("a file");
        Policy::parse(&file.display().to_string())
    };
    assert_eq!(parse("\"my policy, 1\"").expect("a name").name, "my policy, 1");
    for bad in ["\"\"", "\"a\\nb\"", "\"\\u001b[1m\"", "\" a\""] {
        let error = parse(bad).expect_err(bad);
        assert!(error.to_string().contains("name"), "{error}");
    }
    let unknown = "\"x\"\nseed = 3";
    assert!(parse(unknown).expect_err("unknown key").to_string().contains("`seed`"));
}

#[test]
fn errors_have_causes() {
    let error = Policy::parse("/nowhere/p.toml").expect_err("no file");
    assert!(error.source().is_some() || error.to_string().contains("cannot be read"));
    assert!(mapgpa::one_line(&error).contains("No such file"));
}
