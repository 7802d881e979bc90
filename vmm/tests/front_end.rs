//! Front-ends: what a guest sees of a policy behind KVM's chunks, and that a VMM on a real KVM, which
//! sees chunks only, gives the same replies as the model of it.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use mapgpa::case::Case;
use mapgpa::engine::{FrontEnd, Truth};
use mapgpa::expect::Expectations;
use mapgpa::express::express;
use mapgpa::pagemap::{PageState, Pages};
use mapgpa::policy::Policy;
use mapgpa::report::Verdict;
use mapgpa::suite::POLICIES;
use mapgpa_abi::channel::{header, range_words, tag};
use mapgpa_abi::tdcall::{level, module, status, sub};
use mapgpa_guests::GUESTS;
use mapgpa_kvm_model::{ADDRESS_BITS, Kernel, MapGpa, Step, Td};
use proptest::prelude::*;
use support::{BIT, Bench, GPA, GPAW, K4, M2, hosted};

const OLD: Kernel = Kernel::V6_16;
const NEW: Kernel = Kernel::V7_2;

fn bench(kernel: Kernel, policy: &str) -> Bench {
    Bench::behind(FrontEnd::Kvm(kernel), policy, 1, 1, GPAW)
}

/// The replies to a guest that follows each RETRY, to-shared, as (status, R11 from the start in
/// bytes, pages converted).
fn replies(kernel: Kernel, policy: &str, size: u64) -> Vec<(u64, u64, u64)> {
    let mut bench = bench(kernel, policy);
    let (mut start, end) = (GPA | BIT, (GPA | BIT) + size);
    for _ in 0..8 {
        let reply = bench.map(start, end - start);
        if reply.status != status::RETRY {
            break;
        }
        start = reply.r11;
    }
    let row = |call: mapgpa::engine::Call| {
        let r11 = if call.status == status::SUCCESS { call.r11 } else { call.r11 - (GPA | BIT) };
        (call.status, r11, call.converted)
    };
    bench.calls().into_iter().map(row).collect()
}

const DONE: u64 = status::SUCCESS;
const LATER: u64 = status::RETRY;
const NO: u64 = status::INVALID_OPERAND;
const SUB: u64 = sub::MAP_GPA;

#[test]
fn what_a_guest_sees_of_a_policy() {
    let m = 1 << 20;
    for (policy, size, old, new) in [
        ("complete", 5 * m, vec![(DONE, SUB, 1280)], vec![(DONE, SUB, 1280)]),
        (
            "chunk=2M",
            5 * m,
            vec![(LATER, M2, 512), (LATER, 2 * M2, 512), (DONE, SUB, 256)],
            vec![(LATER, M2, 512), (LATER, 2 * M2, 512), (DONE, SUB, 256)],
        ),
        ("chunk=4M", 4 * m, vec![(DONE, SUB, 1024)], vec![(DONE, SUB, 1024)]),
        ("status=0x8000000000000000", 4 * m, vec![(NO, 0, 0)], vec![(NO, 0, 0)]),
        (
            "chunk=2M,status=0x8000000000000000,after=1",
            6 * m,
            vec![(LATER, M2, 512), (NO, M2, 0)],
            vec![(LATER, M2, 512), (NO, M2, 0)],
        ),
        ("lie=success", 4 * m, vec![(DONE, SUB, 0)], vec![(DONE, SUB, 0)]),
        ("chunk=64K,lie=success", 4 * m, vec![(DONE, SUB, 16)], vec![(DONE, SUB, 16)]),
        (
            "chunk=2M,stall=2",
            4 * m,
            vec![],
            vec![
                (LATER, 0, 0),
                (LATER, 0, 0),
                (LATER, M2, 512),
                (LATER, M2, 0),
                (LATER, M2, 0),
                (DONE, SUB, 512),
            ],
        ),
    ] {
        if !old.is_empty() {
            assert_eq!(replies(OLD, policy, size), old, "{policy} on 6.16");
        }
        assert_eq!(replies(NEW, policy, size), new, "{policy} on 7.2");
    }
}

/// All that a guest may ask for are 67 million chunks: the time-out has to be looked at before that.
#[test]
fn a_request_for_everything_comes_back() {
    for kernel in [OLD, NEW] {
        let mut bench = bench(kernel, "complete");
        let reply = bench.map(BIT, BIT);
        assert_eq!((reply.status, reply.r11), (status::RETRY, BIT | (2 << 40)));
    }
}

#[test]
fn a_chunk_is_converted_whole_or_not_at_all() {
    for kernel in Kernel::ALL {
        let mut bench = bench(kernel, "chunk=2M");
        // 100 pages of the first chunk are there already, and use up nothing.
        bench.engine.preset_shared(Pages { first: GPA / K4, count: 100 }).expect("no error");
        let reply = bench.map(GPA | BIT, 2 * M2);
        assert_eq!((reply.status, reply.r11), (status::RETRY, (GPA + M2) | BIT));
        let call = bench.last();
        assert_eq!((call.converted, call.truth), (412, Truth::True));
        assert_eq!(bench.engine.map().state((GPA + M2) / K4), PageState::PrivateAccepted);
    }
}

#[test]
fn malformed_requests_get_kvm_s_reply_and_are_still_the_guest_s_fault() {
    for (gpa, size, code) in [
        (GPA, 0, status::INVALID_OPERAND),
        (BIT - K4, 2 * K4, status::INVALID_OPERAND),
        // Legal to KVM, whose guests have 52 bits; refused by user space.
        (GPA | 1 << 50, K4, status::INVALID_OPERAND),
        (GPA + 1, K4, status::ALIGN_ERROR),
    ] {
        let mut bench = bench(NEW, "complete");
        let reply = bench.map(gpa, size);
        assert_eq!((reply.status, reply.r11), (code, gpa), "{gpa:#x}+{size:#x}");
        assert!(bench.last().malformed.is_some());
    }
}

#[test]
fn two_mib_are_never_accepted_at_once() {
    let mut bench = bench(NEW, "complete");
    bench.map(GPA | BIT, M2);
    bench.map(GPA, M2);
    let answer = bench.accept(GPA, level::L2M);
    assert_eq!(answer, Some(module::PAGE_SIZE_MISMATCH | level::L2M));
    assert_eq!(bench.accept(GPA, level::L4K), Some(module::SUCCESS));
}

/// As [`map_in_silence`]; the guest says what it was told, as the guest kit does in a TD.
fn map_on_kvm(bench: &mut Bench, kernel: Kernel, r12: u64, r13: u64) -> (u64, u64) {
    let reply = map_in_silence(bench, kernel, r12, r13);
    bench.say(0, &[header(tag::REPLY, u32::try_from(reply.0).unwrap_or(2))]);
    reply
}

/// A vCPU of a real KVM with a VMM that sees chunks only: the model between a guest and the engine.
fn map_in_silence(bench: &mut Bench, kernel: Kernel, r12: u64, r13: u64) -> (u64, u64) {
    let td = Td { kernel, shared_bit: BIT, address_bits: ADDRESS_BITS, exits: true };
    let mut kvm = match MapGpa::begin(td, r12, r13) {
        Ok(kvm) => kvm,
        Err(reply) => return (reply.status, reply.r11),
    };
    loop {
        let (answer, _) = bench.engine.kvm_chunk(kernel, 0, kvm.exit()).expect("no error");
        match kvm.complete(answer.ret, answer.event) {
            Step::Exit(_) => {}
            Step::Reply(reply) => return (reply.status, reply.r11),
            Step::RunFails => panic!("KVM_RUN would fail"),
        }
    }
}

/// Policies that both kernels express, or one.
const SPECS: [&str; 8] = [
    "complete",
    "chunk=2M",
    "chunk=4M",
    "chunk=2M,stall=2",
    "chunk=2M,contention=0.5",
    "status=0x8000000000000000",
    "chunk=2M,status=0x8000000000000000,after=2",
    "chunk=64K,lie=success",
];

/// A request: start page and pages from `GPA` on, to shared, and whether the guest says something on
/// its channel before it.
type Asked = (u64, u64, bool, bool);

fn asked() -> impl Strategy<Value = Asked> {
    (0..1536u64, 1..1536u64, any::<bool>(), any::<bool>())
}

proptest! {
    #![proptest_config(support::cases(256))]

    #[test]
    fn a_vmm_that_sees_chunks_only_says_the_same(
        spec in prop::sample::select(&SPECS[..]),
        old in any::<bool>(),
        requests in prop::collection::vec(asked(), 1..12),
    ) {
        let kernel = if old { OLD } else { NEW };
        prop_assume!(express(&Policy::parse(spec).expect(spec), kernel).is_ok());
        let (mut model, mut real) = (bench(kernel, spec), bench(kernel, spec));
        let mut retry = None;
        for (first, count, shared, says) in requests {
            let raw = (GPA + first * K4) | if shared { BIT } else { 0 };
            // Who does not go on where RETRY said, and says nothing of it, leaves a VMM to guess.
            if says || retry.is_some_and(|r11| r11 != raw) {
                let words = range_words(GPA, 8 << 20);
                let begin = header(tag::BEGIN, u32::from(shared));
                for bench in [&mut model, &mut real] {
                    bench.say(0, &[begin, words[0], words[1], words[2]]);
                }
            }
            let reply = model.map(raw, count * K4);
            let seen = map_on_kvm(&mut real, kernel, raw, count * K4);
            prop_assert_eq!((reply.status, reply.r11), seen);
            retry = (reply.status == status::RETRY).then_some(reply.r11);
        }
        let all = Pages { first: GPA / K4, count: 4096 };
        let states = |bench: &Bench| {
            let mut pieces = Vec::new();
            bench.engine.map().scan(all, |piece, state| {
                pieces.push((piece, state));
                true
            });
            pieces
        };
        prop_assert_eq!(states(&model), states(&real));
    }
}

#[test]
fn what_is_observed_of_chunks_is_what_was_said() {
    for kernel in Kernel::ALL {
        for spec in ["complete", "chunk=2M", "status=0x8000000000000000", "chunk=64K,lie=success"] {
            let (mut model, mut real) = (bench(kernel, spec), bench(kernel, spec));
            let words = range_words(GPA, 5 << 20);
            let begin = [header(tag::BEGIN, 1), words[0], words[1], words[2]];
            model.say(0, &begin);
            real.say(0, &begin);
            let (mut start, end) = (GPA | BIT, (GPA | BIT) + (5 << 20));
            loop {
                let reply = model.map(start, end - start);
                assert_eq!(
                    map_on_kvm(&mut real, kernel, start, end - start),
                    (reply.status, reply.r11)
                );
                if reply.status != status::RETRY {
                    break;
                }
                start = reply.r11;
            }
            let end_words = [header(tag::END, 0), 0];
            model.say(0, &end_words);
            real.say(0, &end_words);
            let rows = |bench: &Bench| {
                let row = |call: mapgpa::engine::Call| {
                    let size = if call.status == status::SUCCESS { call.size } else { 0 };
                    let r11 = call.r11;
                    (call.raw_gpa, size, call.converted, call.status, r11, call.truth, call.special)
                };
                bench.calls().into_iter().map(row).collect::<Vec<_>>()
            };
            // How far a lie reached is known for what was handed on only.
            assert_eq!(rows(&model), rows(&real), "{spec} on {}", kernel.name());
            assert_eq!(model.closed().len(), real.closed().len());
        }
    }
}

#[test]
fn the_suite_s_expectations_hold_behind_kvm() {
    let expectations = Expectations::built_in().expect("they are ours");
    let mut exercised = 0;
    for kernel in Kernel::ALL {
        for policy in POLICIES {
            if express(&Policy::parse(policy).expect(policy), kernel).is_err() {
                continue;
            }
            for info in GUESTS.iter().filter(|info| info.hosted) {
                let front_end = FrontEnd::Kvm(kernel);
                let case = Case { front_end, ..hosted(info.guest, policy) };
                let report = case.run().expect("a run").report;
                assert_eq!(report.front_end, kernel.name());
                if report.verdict == Verdict::NotExercised {
                    continue;
                }
                exercised += 1;
                let expected = expectations.of(info.name, policy, front_end);
                let what = format!("{} under {policy} on {}", info.name, kernel.name());
                assert_eq!(report.failed_checks(), expected, "{what}");
            }
        }
    }
    assert!(exercised > 50, "{exercised}");
}

#[test]
fn the_nearest_policies_exercise_guests_as_expected() {
    let expectations = Expectations::built_in().expect("they are ours");
    let mut count = 0;
    for kernel in Kernel::ALL {
        for policy in POLICIES {
            let Err(error) = express(&Policy::parse(policy).expect(policy), kernel) else {
                continue;
            };
            for info in GUESTS.iter().filter(|info| info.hosted) {
                let case = hosted(info.guest, &error.nearest.name);
                let case = Case { front_end: FrontEnd::Kvm(kernel), range: 10 << 20, ..case };
                let report = case.run().expect("a run").report;
                count += u32::from(report.verdict != Verdict::NotExercised);
                // At this range nothing is expected of those that the suite has at its own, nor of what
                // does not occur.
                let exercised = report.verdict != Verdict::NotExercised;
                if exercised && error.nearest.name.starts_with("chunk=2M") {
                    let expected =
                        expectations.of(info.name, &error.nearest.name, FrontEnd::Kvm(kernel));
                    let what =
                        format!("{} under {} on {}", info.name, error.nearest, kernel.name());
                    assert_eq!(report.failed_checks(), expected, "{what}");
                }
            }
        }
    }
    assert!(count > 500, "{count}");
}

#[test]
fn accepts_that_nobody_sees_are_as_the_guest_reports_them() {
    for (reported, pending) in [(512, None), (1000, None), (511, Some(512))] {
        let mut bench = bench(NEW, "complete");
        bench.engine.accepts_are_unseen();
        bench.engine.preset_shared(Pages::of_bytes(GPA, M2)).expect("no error");
        let words = range_words(GPA, M2);
        bench.say(0, &[header(tag::BEGIN, 0), words[0], words[1], words[2]]);
        bench.map(GPA, M2);
        bench.say(0, &[header(tag::END, 0), reported]);
        let closed = bench.closed();
        assert_eq!(closed[0].pending.map(|pages| pages.count), pending, "{reported}");
        let accepted: u64 = bench.accepts().iter().map(|accept| accept.pages.count).sum();
        assert_eq!(accepted, 512 - pending.unwrap_or(0), "{reported}");
    }
}

#[test]
fn a_retry_that_may_have_made_no_progress_counts_as_such() {
    // A guest that asks for one 2 MiB leaf after the other: the second is refused three times.
    let mut bench = bench(NEW, "chunk=2M,stall=2");
    let words = range_words(GPA, 2 * M2);
    bench.say(0, &[header(tag::BEGIN, 1), words[0], words[1], words[2]]);
    for (leaf, tries) in [(0, 3), (1, 3)] {
        for _ in 0..tries {
            map_in_silence(&mut bench, NEW, (GPA + leaf * M2) | BIT, M2);
        }
    }
    let counts: Vec<u64> = bench.calls().iter().map(|call| call.no_progress).collect();
    assert_eq!(counts, [1, 2, 1, 2, 3]);
}

#[test]
fn a_guest_that_says_what_it_was_told_is_not_said_to_have_met_retry() {
    // Two leaves, one request each, on a kernel that is made to say RETRY by an event after a chunk:
    // there is nothing left to retry, whatever the range that was marked.
    for (says, statuses) in
        [(true, [status::SUCCESS, status::SUCCESS]), (false, [status::RETRY, status::SUCCESS])]
    {
        let mut bench = bench(OLD, "chunk=2M");
        let words = range_words(GPA, 2 * M2);
        bench.say(0, &[header(tag::BEGIN, 1), words[0], words[1], words[2]]);
        for leaf in 0..2 {
            let map = if says { map_on_kvm } else { map_in_silence };
            let reply = map(&mut bench, OLD, (GPA + leaf * M2) | BIT, M2);
            assert_eq!(reply.0, status::SUCCESS);
        }
        bench.say(0, &[header(tag::END, 0), 0]);
        let told: Vec<u64> = bench.calls().iter().map(|call| call.status).collect();
        assert_eq!(told, statuses);
        assert_eq!(bench.calls().iter().any(|call| call.special), !says);
    }
}
