//! All guests under all policies on backend `hosted`: the same again, in any order and any part, as
//! expected; and the guest `reference` without a violation whatever the host does.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use mapgpa::case::{Case, CaseError, Ran};
use mapgpa::engine::FrontEnd;
use mapgpa::expect::Expectations;
use mapgpa::judge::{Class, GuestResult, Rules};
use mapgpa::policy::Policy;
use mapgpa::report::{RunReport, Totals, Verdict};
use mapgpa::suite::{self, POLICIES, in_shard};
use mapgpa_abi::Direction;
use mapgpa_abi::params::{BOUND_NONE, Layout, Plan};
use mapgpa_guests::{GUESTS, Guest};
use support::{K4, M2, Scratch, hosted};

const PLANS: [Plan; 3] =
    [Plan::One(Direction::ToShared), Plan::One(Direction::ToPrivate), Plan::RoundTrip];

fn guests() -> impl Iterator<Item = Guest> {
    GUESTS.iter().filter(|info| info.hosted).map(|info| info.guest)
}

fn run(case: &Case) -> Ran {
    match case.check() {
        Ok(()) | Err(CaseError::CannotApply { .. }) => {}
        Err(error) => panic!("{case:?}: {error}"),
    }
    let ran = case.run().expect("hosted runs do not fail");
    assert!(ran.error.is_none() && !ran.interrupted);
    ran
}

/// A report without what differs from run to run.
fn timeless(report: &RunReport) -> String {
    let Totals { handler_ns: _, max_call_ns: _, wall_ns: _, .. } = report.totals;
    let totals = Totals { handler_ns: 0, max_call_ns: 0, wall_ns: 0, ..report.totals };
    let mut report = RunReport { totals, ..report.clone() };
    report.conversations.iter_mut().for_each(|row| row.ns = 0);
    serde_json::to_string(&report).expect("a report")
}

/// The trace of a case without times, in order of vCPU.
fn trace(case: &Case, scratch: &Scratch) -> Vec<String> {
    let path = scratch.path("trace.jsonl");
    run(&Case { trace: Some(path.clone()), ..case.clone() });
    let text = std::fs::read_to_string(path).expect("a trace");
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| line.split_once(",\"t_ns\":").expect("a time").0.to_owned())
        .collect();
    lines.sort_by_key(|line| {
        let (_, vcpu) = line.split_once("\"vcpu\":").expect("a vCPU");
        vcpu.split(',').next().map(str::to_owned)
    });
    lines
}

/// What is wrong with a run of `reference`.
fn fault(case: &Case) -> Option<String> {
    let report = run(case).report;
    let legal = report.class == Class::Legal;
    let fine = report.violations.is_empty()
        && !report.notes.iter().any(|note| note.contains("panicked"))
        && (!legal || report.guest_result == GuestResult::Success)
        && matches!(
            report.guest_result,
            GuestResult::Success | GuestResult::Failure | GuestResult::None
        )
        && report.verdict != Verdict::Fail;
    (!fine).then(|| {
        let Case { policy, seed, plan, layout, range, vcpus, .. } = case;
        format!(
            "{policy} seed {seed} {plan:?} {layout:?} {range:#x} vcpus {vcpus}: {:?} {:?} {:?} {:?}",
            report.class, report.guest_result, report.violations, report.notes
        )
    })
}

#[test]
fn the_same_command_gives_the_same_trace() {
    let scratch = Scratch::new("again");
    for guest in guests() {
        for policy in POLICIES {
            let case = Case { range: M2 / 8, ..hosted(guest, policy) };
            let first = trace(&case, &scratch);
            assert!(!first.is_empty());
            assert_eq!(first, trace(&case, &scratch), "{guest:?} {policy}");
        }
    }
    for (guest, policy, vcpus) in [
        (Guest::Reference, "hostile-random", 1),
        (Guest::Linux67, "contention=0.5", 1),
        (Guest::Openvmm, "random", 1),
        (Guest::Edk2Y2023, "random", 3),
        (Guest::Reference, "chunk=16K,stall=1", 4),
    ] {
        let case = Case { range: M2 / 4, vcpus, seed: 9, ..hosted(guest, policy) };
        let first = trace(&case, &scratch);
        for _ in 1..100 {
            assert_eq!(first, trace(&case, &scratch), "{guest:?} {policy}");
        }
    }
}

#[test]
fn seeds_matter_to_draws_only() {
    let scratch = Scratch::new("seeds");
    let with = |policy, seed| trace(&Case { seed, ..hosted(Guest::Reference, policy) }, &scratch);
    for policy in ["random", "hostile-random", "contention=0.5"] {
        assert!((2..6).any(|seed| with(policy, 1) != with(policy, seed)), "{policy}");
    }
    assert_eq!(with("chunk=64K,stall=2", 1), with("chunk=64K,stall=2", 2));
}

fn all_cases(range: u64) -> Vec<Case> {
    let pairs = guests().flat_map(|guest| POLICIES.iter().map(move |policy| (guest, *policy)));
    pairs.map(|(guest, policy)| Case { range, ..hosted(guest, policy) }).collect()
}

#[test]
fn results_are_as_expected_and_independent_of_jobs() {
    let cases = all_cases(M2);
    let expectations = Expectations::built_in().expect("well formed");
    let seen = std::sync::atomic::AtomicUsize::new(0);
    let numbered: Vec<_> = (1..).zip(cases.iter().cloned()).collect();
    let one = suite::run(&numbered, &expectations, 1, |_| {
        seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(seen.into_inner(), cases.len());
    let many = suite::run(&numbered, &expectations, 7, |_| {});
    assert_eq!((one.cases.len(), one.left_out), (cases.len(), 0));
    for ((case, one), many) in cases.iter().zip(&one.cases).zip(&many.cases) {
        assert_eq!(one.policy, case.policy.name, "in order");
        let report = one.report.as_ref().expect("hosted runs");
        assert!(
            one.as_expected(),
            "{} under {}: {:?}, expected {:?}",
            one.guest,
            one.policy,
            one.failed_checks(),
            one.expected
        );
        assert_eq!(timeless(report), timeless(many.report.as_ref().expect("hosted runs")));
    }
}

#[test]
fn shards_are_parts_that_make_up_the_whole() {
    for count in [1, 2, 4, 7] {
        let mut parts = vec![0; usize::try_from(count).expect("few")];
        for info in GUESTS {
            for policy in POLICIES {
                let of: Vec<_> = (1..=count)
                    .filter(|index| in_shard(info.name, policy, *index, count))
                    .collect();
                assert_eq!(of.len(), 1, "{} {policy} in parts {of:?} of {count}", info.name);
                parts[usize::try_from(of[0] - 1).expect("few")] += 1;
            }
        }
        let even = GUESTS.len() * POLICIES.len() / parts.len();
        assert!(parts.iter().all(|part| (even / 2..even * 2).contains(part)), "{parts:?}");
    }
    // The hash is part of the contract: another would move every CI job's cases.
    let mine: Vec<_> = POLICIES.iter().filter(|policy| in_shard("svsm", policy, 1, 8)).collect();
    assert_eq!(mine, SVSM_1_OF_8);
}

const SVSM_1_OF_8: [&&str; 2] = [&"chunk=64K,stall=2", &"hostile-random"];

#[test]
fn reference_has_no_violation_whatever_the_range() {
    let mut faults = Vec::new();
    for policy in POLICIES {
        for plan in PLANS {
            for layout in [Layout::Contiguous, Layout::Scattered] {
                for range in [K4, 16 * K4, M2 / 2, M2, 3 * M2 + 5 * K4] {
                    if layout == Layout::Scattered && range > M2 / 2 {
                        continue;
                    }
                    let case = Case { plan, layout, range, ..hosted(Guest::Reference, policy) };
                    faults.extend(fault(&case));
                }
            }
        }
        let large = Case { range: 32 * M2, ..hosted(Guest::Reference, policy) };
        faults.extend(fault(&large));
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn reference_has_no_violation_on_many_vcpus() {
    let mut faults = Vec::new();
    for policy in POLICIES.iter().copied().chain(["chunk=4K,overlap=inuse"]) {
        for (layout, plan, vcpus, range) in [
            (Layout::Contiguous, Plan::RoundTrip, 2, M2),
            (Layout::Contiguous, Plan::One(Direction::ToPrivate), 5, M2 / 4),
            (Layout::Scattered, Plan::RoundTrip, 3, M2 / 4),
            (Layout::Overlapping, Plan::RoundTrip, 3, M2 / 4),
            (Layout::Overlapping, Plan::One(Direction::ToShared), 16, 16 * K4),
        ] {
            let case = Case { plan, layout, range, vcpus, ..hosted(Guest::Reference, policy) };
            faults.extend(fault(&case));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn reference_has_no_violation_for_thousands_of_seeds() {
    // More of them: MAPGPA_SEEDS=1000000 cargo test --release --test hosted
    let seeds = std::env::var("MAPGPA_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    let seeds: u64 = seeds.unwrap_or(10_000);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let faults: Vec<String> = std::thread::scope(|scope| {
        let hunts: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let mut faults = Vec::new();
                    for name in ["random", "hostile-random"] {
                        let mut case = hosted(Guest::Reference, name);
                        for seed in (thread..seeds).step_by(usize::try_from(threads).expect("few"))
                        {
                            case.seed = seed;
                            case.plan = PLANS[usize::try_from(seed % 3).expect("few")];
                            // From a page to 1 MiB, aligned and not.
                            case.range = K4 * (1 + seed % 7 + (1 << (seed % 9)) % 255);
                            faults.extend(fault(&case));
                        }
                    }
                    faults
                })
            })
            .collect();
        hunts.into_iter().flat_map(|hunt| hunt.join().expect("no panic")).collect()
    });
    assert!(faults.is_empty(), "{} faults: {:#?}", faults.len(), &faults[..faults.len().min(9)]);
}

#[test]
fn guests_that_should_survive_legal_behaviour_do_so_for_every_seed() {
    let expectations = Expectations::built_in().expect("well formed");
    for guest in guests() {
        let name = guest.info().name;
        for policy in ["random", "contention=0.1"] {
            if !expectations.of(name, policy, FrontEnd::Direct).is_empty() {
                continue;
            }
            for seed in 0..40 {
                let mut case = Case { seed, range: M2 / 4, ..hosted(guest, policy) };
                case.plan = PLANS[usize::try_from(seed % 3).expect("few")];
                let report = run(&case).report;
                let excused = report.class != Class::Legal;
                let fine = report.violations.is_empty();
                assert!(fine, "{name} {policy} {seed}: {:?}", report.violations);
                assert!(excused || report.guest_result == GuestResult::Success, "{name} {seed}");
            }
        }
    }
}

#[test]
fn legal_behaviour_is_survived_in_pieces_too() {
    for policy in ["chunk=4K", "chunk=64K,stall=2", "random", "accept=mismatch", "kvm-7.2"] {
        for guest_chunk in [K4, 64 * K4, M2, M2 + K4] {
            let case = Case { guest_chunk, range: 2 * M2, ..hosted(Guest::Reference, policy) };
            assert_eq!(fault(&case), None);
        }
    }
}

#[test]
fn a_bound_decides_how_much_stalling_is_survived() {
    let result = |guest, policy, bound| {
        let case = Case { bound, range: M2 / 8, ..hosted(guest, policy) };
        let report = run(&case).report;
        (report.guest_result, report.verdict)
    };
    let stalls = "chunk=64K,stall=5";
    let (success, failure) = (GuestResult::Success, GuestResult::Failure);
    assert_eq!(result(Guest::Linux67, stalls, 5), (failure, Verdict::Pass), "it may give up");
    assert_eq!(result(Guest::Linux67, stalls, 6), (success, Verdict::Pass));
    assert_eq!(result(Guest::Openvmm, "stall=forever", 3), (failure, Verdict::Pass));
    assert_eq!(result(Guest::Linux67, "stall=forever", BOUND_NONE).1, Verdict::Fail);
}

#[test]
fn the_limits_and_the_stop_are_options() {
    let report = |case: &Case| run(case).report;
    let endless = hosted(Guest::Openvmm, "stall=forever");
    assert_eq!(report(&endless).totals.calls, 17);
    let rules = Rules { max_no_progress: 40, ..Rules::default() };
    assert_eq!(report(&Case { rules, ..endless.clone() }).totals.calls, 41);
    let timeout = Duration::from_millis(30);
    let rules = Rules { max_no_progress: u64::MAX, max_calls: u64::MAX, stop: false };
    let report_of = report(&Case { rules, timeout, ..endless });
    assert_eq!(report_of.guest_result, GuestResult::Timeout);
    let wrong = hosted(Guest::Edk2Y2023, "chunk=64K");
    assert!(report(&wrong).violations.len() > 2);
    let rules = Rules { stop: true, ..Rules::default() };
    let report_of = report(&Case { rules, ..wrong });
    assert_eq!((report_of.violations.len(), report_of.guest_result), (1, GuestResult::None));
}

#[test]
fn totals_add_up() {
    let report = run(&hosted(Guest::Reference, "chunk=64K,stall=1")).report;
    let totals = report.totals;
    assert_eq!((totals.calls, totals.retries, totals.no_progress), (128, 126, 64));
    assert_eq!((totals.pages_to_shared, totals.pages_to_private), (512, 512));
    assert_eq!(totals.pages_accepted, 512);
    assert!(totals.exits > totals.calls && totals.wall_ns >= totals.handler_ns);
    let rows: Vec<_> =
        report.conversations.iter().map(|row| (&*row.to, row.requests, row.no_progress)).collect();
    assert_eq!(rows, [("shared", 64, 32), ("private", 64, 32)]);
    // The set-up of a test to private is no part of it.
    let plan = Plan::One(Direction::ToPrivate);
    let report = run(&Case { plan, ..hosted(Guest::Reference, "chunk=64K") }).report;
    assert_eq!((report.totals.pages_to_shared, report.totals.calls), (0, 32));
}

#[test]
fn what_never_occurred_is_no_pass() {
    for (policy, range) in [
        ("chunk=4M", M2),
        ("status=0x8000000000000000,after=600", M2),
        ("chunk=64K,stall=3,after=600", M2),
        ("r11=end", K4),
        ("qemu-tdx", M2),
        ("overlap=inuse", M2),
    ] {
        let report = run(&Case { range, ..hosted(Guest::Reference, policy) }).report;
        assert_eq!(report.verdict, Verdict::NotExercised, "{policy}");
    }
    // But a guest that fails meanwhile has failed.
    let report = run(&hosted(Guest::Mushroom, "status=0x8000000000000000,after=600")).report;
    assert_ne!(report.verdict, Verdict::Pass);
}

#[test]
fn an_r11_behind_the_truth_is_no_reason_to_fail_a_guest_that_cannot_see_progress() {
    // Each call converts a page, but R11 stays at the start. Who gives up at once has no such excuse.
    for guest in guests() {
        let report = run(&hosted(guest, "chunk=4K,r11=start")).report;
        if report.totals.calls >= 3 && report.guest_result == GuestResult::Failure {
            let gave_up = report.violations.iter().any(|v| v.check.to_string() == "gave-up");
            assert!(!gave_up, "{guest:?}: {:?} {:?}", report.class, report.violations);
        }
    }
}

#[test]
fn reports_say_whether_they_can_be_reproduced() {
    let of = |case: &Case| run(case).report.reproducible;
    let plain = hosted(Guest::Reference, "chunk=64K");
    assert!(of(&plain) && of(&hosted(Guest::Reference, "hyperv")));
    assert!(!of(&hosted(Guest::Reference, "budget=50us")));
    assert!(!of(&Case { layout: Layout::Overlapping, vcpus: 2, ..plain }));
}

#[test]
fn each_behaviour_breaks_some_guest_and_complete_breaks_none() {
    let mut broken: BTreeMap<&str, usize> = BTreeMap::new();
    for guest in guests() {
        for policy in ["complete", "chunk=4K", "stall=forever", "r11=unaligned", "r11=flip"] {
            let failed = run(&hosted(guest, policy)).report.verdict == Verdict::Fail;
            *broken.entry(policy).or_default() += usize::from(failed);
        }
    }
    // mushroom passes a page count for a size, which 4 KiB alignment refuses.
    assert!(broken["complete"] <= 1, "{broken:?}");
    assert!(broken.iter().all(|(policy, n)| *policy == "complete" || *n > 1), "{broken:?}");
    assert!(Policy::parse("complete").is_ok_and(|policy| !policy.is_special()));
}
