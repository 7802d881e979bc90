//! The engine over made-up memory: replies to well-formed and malformed requests, what becomes of
//! pages, the truth of replies, and accepts.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use mapgpa::engine::{Malformed, Stray, Truth};
use mapgpa::pagemap::{PageState, Pages};
use mapgpa::suite::POLICIES;
use mapgpa_abi::Direction;
use mapgpa_abi::tdcall::{Regs, level, status, sub};
use proptest::prelude::*;
use support::{Asked, BIT, Bench, GPA, GPAW, K4, M2};

const FIRST: u64 = GPA / K4;
const PAGES: Pages = Pages { first: FIRST, count: 512 };

#[test]
fn malformed_requests_get_the_status_that_ghci_gives_them() {
    for (gpa, size, malformed, code) in [
        (GPA, 0, Malformed::Empty, status::INVALID_OPERAND),
        (u64::MAX - 0xfff, 2 * K4, Malformed::Wraps, status::INVALID_OPERAND),
        (GPA, u64::MAX - 0xfff, Malformed::Wraps, status::INVALID_OPERAND),
        (GPA | (2 * BIT), K4, Malformed::IllegalGpa, status::INVALID_OPERAND),
        (GPA | (1 << 63), K4, Malformed::IllegalGpa, status::INVALID_OPERAND),
        (BIT - K4, 2 * K4, Malformed::MixedSharedBit, status::INVALID_OPERAND),
        (2 * BIT - K4, 2 * K4, Malformed::MixedSharedBit, status::INVALID_OPERAND),
        (GPA + 1, K4, Malformed::Unaligned, status::ALIGN_ERROR),
        (GPA, K4 + 1, Malformed::Unaligned, status::ALIGN_ERROR),
        (GPA, 1, Malformed::Unaligned, status::ALIGN_ERROR),
        // Both wrong: KVM looks at the operands first.
        (BIT - K4 + 1, 2 * K4, Malformed::MixedSharedBit, status::INVALID_OPERAND),
    ] {
        for policy in ["complete", "lie=success", "r11=end", "stall=forever"] {
            let mut bench = Bench::new(policy);
            let reply = bench.map(gpa, size);
            assert_eq!((reply.status, reply.r11), (code, gpa), "{gpa:#x}+{size:#x} {policy}");
            let call = bench.last();
            assert_eq!((call.malformed, call.truth), (Some(malformed), Truth::True));
            assert_eq!((call.converted, call.special, call.call), (0, false, 1));
            assert_eq!(bench.engine.memory().asked, []);
        }
    }
}

#[test]
fn memory_is_asked_for_each_run_and_a_failure_is_passed_on() {
    let mut bench = Bench::new("complete");
    bench.map(BIT | (GPA + K4), K4);
    bench.map(BIT | GPA, 4 * K4);
    let run = |first, count| Pages { first: FIRST + first, count };
    let shared = |pages| Asked::Convert(pages, Direction::ToShared, false);
    let expected = [shared(run(1, 1)), shared(run(0, 1)), shared(run(2, 2))];
    assert_eq!(bench.engine.memory().asked, expected);
    bench.map(GPA, 2 * K4);
    bench.accept(GPA, level::L4K);
    let asked = &bench.engine.memory().asked[3..];
    let private = Asked::Convert(run(0, 2), Direction::ToPrivate, false);
    assert_eq!(asked, [private, Asked::Accept(run(0, 1))]);
    bench.engine.memory().broken = true;
    let error = bench.engine.map_gpa(0, GPA + 2 * K4, K4).expect_err("broken");
    assert_eq!((error.gpa, error.size), (GPA + 2 * K4, K4));
    assert!(bench.engine.accept(0, GPA + K4).is_err());
}

#[test]
fn a_gpa_outside_memory_is_kept_in_the_map_too() {
    let mut bench = Bench::new("complete");
    for gpa in [0xfee0_0000, BIT - K4] {
        assert_eq!(bench.map(BIT | gpa, K4).status, status::SUCCESS);
        assert_eq!(bench.engine.map().state(gpa / K4), PageState::Shared);
    }
}

#[test]
fn pages_in_the_target_state_use_no_chunk_and_stay_as_they_are() {
    let mut bench = Bench::new("chunk=8K");
    bench.engine.preset_shared(Pages { first: FIRST + 1, count: 2 }).expect("memory");
    // Page 0 and page 3 are the two of the chunk.
    let reply = bench.map(BIT | GPA, 8 * K4);
    assert_eq!((reply.status, reply.r11), (status::RETRY, BIT | (GPA + 4 * K4)));
    assert_eq!(bench.last().converted, 2);
    // All there already: SUCCESS at once, even where nothing may be converted, and no progress is no
    // stall then.
    for policy in ["chunk=4K", "stall=forever", "contention=1", "r11=end", "complete"] {
        let mut bench = Bench::new(policy);
        bench.engine.preset_shared(PAGES).expect("memory");
        bench.engine.memory().asked.clear();
        let reply = bench.map(BIT | GPA, M2);
        assert_eq!(reply.status, status::SUCCESS, "{policy}");
        assert_eq!((bench.last().converted, bench.last().special), (0, false), "{policy}");
        assert_eq!(bench.engine.memory().asked, []);
    }
    // Accepted pages stay accepted.
    let mut bench = Bench::new("complete");
    assert_eq!(bench.map(GPA, M2).status, status::SUCCESS);
    assert_eq!(bench.engine.map().uniform(PAGES), Some(PageState::PrivateAccepted));
}

/// The reply to a request for 16 pages when `policy` answers from the start.
fn truth(policy: &str) -> (Truth, u64, u64, bool) {
    let mut bench = Bench::new(policy);
    let reply = bench.map(BIT | GPA, 16 * K4);
    let call = bench.last();
    assert_eq!((reply.status, reply.r11), (call.status, call.r11));
    (call.truth, reply.status, reply.r11.wrapping_sub(BIT | GPA), call.special)
}

#[test]
fn the_truth_of_a_reply_is_worked_out_from_the_pages() {
    let from = |first: u64| Pages { first: FIRST + first, count: 16 - first };
    let (ok, retry) = (status::SUCCESS, status::RETRY);
    let refused = status::INVALID_OPERAND;
    for (policy, expected) in [
        ("complete", (Truth::True, ok, (BIT | GPA).wrapping_neg(), false)),
        ("chunk=16K", (Truth::True, retry, 4 * K4, true)),
        ("stall=1", (Truth::True, retry, 0, true)),
        ("lie=success", (Truth::Undetectable(from(0)), ok, (BIT | GPA).wrapping_neg(), true)),
        (
            "chunk=16K,lie=success",
            (Truth::Undetectable(from(4)), ok, (BIT | GPA).wrapping_neg(), true),
        ),
        ("chunk=16K,r11=end", (Truth::Detectable, retry, 16 * K4, true)),
        ("chunk=16K,r11=past-end", (Truth::Detectable, retry, (16 * K4) + (1 << 30), true)),
        ("chunk=16K,r11=below", (Truth::Detectable, retry, K4.wrapping_neg(), true)),
        ("chunk=16K,r11=start-1", (Truth::Detectable, retry, u64::MAX, true)),
        ("chunk=16K,r11=unaligned", (Truth::Detectable, retry, 4 * K4 + 0x800, true)),
        (
            "chunk=16K,r11=strip-shared",
            (Truth::Detectable, retry, (4 * K4).wrapping_sub(BIT), true),
        ),
        ("chunk=16K,r11=flip", (Truth::Detectable, retry, (4 * K4).wrapping_sub(BIT), true)),
        (
            "chunk=4K,r11=next+8K",
            (Truth::Undetectable(Pages { first: FIRST + 1, count: 2 }), retry, 3 * K4, true),
        ),
        (
            "chunk=16K,r11=skip",
            (Truth::Undetectable(Pages { first: FIRST + 4, count: 11 }), retry, 15 * K4, true),
        ),
        ("chunk=16K,r11=next-4K", (Truth::True, retry, 3 * K4, true)),
        // The truth after all.
        ("chunk=16K,r11=start+16K", (Truth::True, retry, 4 * K4, false)),
        ("status=0x8000000000000000", (Truth::Refusal, refused, 0, true)),
        ("status=0x8000000000000001", (Truth::Refusal, status::GPA_INUSE, 0, true)),
        ("status=0x8000000000000002", (Truth::Refusal, status::ALIGN_ERROR, 0, true)),
        ("chunk=4K,status=0x8000000000000000,r11=next+8K", (Truth::Refusal, refused, 2 * K4, true)),
        ("status=0x2,r11=end", (Truth::Detectable, 2, 16 * K4, true)),
        ("status=0x2", (Truth::Detectable, 2, (BIT | GPA).wrapping_neg(), true)),
    ] {
        assert_eq!(truth(policy), expected, "{policy}");
    }
}

#[test]
fn a_request_that_the_chunk_covers_shows_nothing() {
    for policy in ["chunk=64K", "r11=end", "r11=skip", "qemu-tdx", "kvm-6.16", "hyperv"] {
        let (truth, code, _, special) = truth(policy);
        assert_eq!((truth, code, special), (Truth::True, status::SUCCESS, false), "{policy}");
    }
}

#[test]
fn an_error_after_progress_has_the_r11_that_kvm_leaves() {
    let mut bench = Bench::new("chunk=16K,status=0x8000000000000000,after=1");
    assert_eq!(bench.map(BIT | GPA, M2).r11, BIT | (GPA + 4 * K4));
    let reply = bench.map(BIT | (GPA + 2 * K4), M2 - 2 * K4);
    assert_eq!((reply.status, reply.r11), (status::INVALID_OPERAND, BIT | (GPA + 4 * K4)));
    let mut bench = Bench::new("chunk=16K,status=0x8000000000000002,after=1");
    bench.map(BIT | GPA, M2);
    let reply = bench.map(BIT | (GPA + 2 * K4), M2 - 2 * K4);
    assert_eq!(reply.r11, BIT | (GPA + 2 * K4), "ALIGN_ERROR: the original GPA");
}

#[test]
fn a_lie_is_forgotten_once_it_has_come_true() {
    let touch = |bench: &mut Bench, raw_gpa| {
        bench.engine.touch(raw_gpa).expect_err("not allowed");
        *bench.events.borrow().touches.last().expect("a touch")
    };
    let mut bench = Bench::new("lie=success");
    bench.map(BIT | GPA, M2);
    assert!(touch(&mut bench, BIT | GPA));
    assert!(!touch(&mut bench, BIT | (GPA + M2)), "nothing was said about that page");
    // The first call lies, the others do not.
    let scratch = support::Scratch::new("lie");
    let file = scratch.path("p.toml");
    let text = "schema = \"mapgpa.policy/1\"\n[[rule]]\ncalls = [1, 1]\ndo = \"lie=success\"\n\
                [[rule]]\ndo = \"complete\"\n";
    std::fs::write(&file, text).expect("a file");
    let mut bench = Bench::new(&file.display().to_string());
    bench.map(BIT | GPA, M2);
    bench.map(GPA, M2);
    assert!(!touch(&mut bench, BIT | GPA), "it is private, and that is what the guest was told");
}

#[test]
fn retries_that_leave_the_conversation_are_odd() {
    let odd = |second: (u64, u64)| {
        let mut bench = Bench::new("chunk=16K");
        bench.say(0, &begin(1, GPA, M2));
        assert_eq!(bench.map(BIT | GPA, M2).r11, BIT | (GPA + 4 * K4));
        bench.map(second.0, second.1);
        bench.last().stray
    };
    let skipped = |count| Some(Stray::Skipped(Pages { first: FIRST + 4, count }));
    assert_eq!(odd((BIT | (GPA + 4 * K4), M2 - 4 * K4)), None, "as R11 says");
    assert_eq!(odd((BIT | GPA, M2)), None, "again from the start");
    assert_eq!(odd((BIT | (GPA + 8 * K4), K4)), skipped(4));
    assert_eq!(odd((GPA + 4 * K4, K4)), Some(Stray::Flipped));
    assert_eq!(odd((BIT | (GPA + M2), K4)), Some(Stray::Outside));
    assert_eq!(odd((BIT | (GPA - K4), M2)), Some(Stray::Outside));
    assert_eq!(odd((BIT | (GPA + 4 * K4), M2)), Some(Stray::Outside), "its end");
    // Malformed requests have a direction and a start, too.
    assert_eq!(odd((GPA + 4 * K4, 0)), Some(Stray::Flipped));
    assert_eq!(odd((BIT | (GPA + M2), 0)), Some(Stray::Outside));
    assert_eq!(odd((BIT | (GPA + 4 * K4 + 1), K4)), None);
}

/// BEGIN of a conversation, to shared if `shared` is 1.
fn begin(shared: u32, gpa: u64, size: u64) -> Vec<u32> {
    let [low, high, pages] = mapgpa_abi::channel::range_words(gpa, size);
    let header = mapgpa_abi::channel::header(mapgpa_abi::channel::tag::BEGIN, shared);
    vec![header, low, high, pages]
}

/// R12 and R13 as a confused guest might have them, near every limit.
fn operand() -> impl Strategy<Value = u64> {
    let near = [0, K4, GPA, M2, BIT, BIT | GPA, 2 * BIT, 1 << 52, 1 << 63, u64::MAX - K4 + 1];
    let edge =
        (proptest::sample::select(near.to_vec()), -2_i64..=2, prop_oneof![Just(1), Just(4096)])
            .prop_map(|(near, off, unit)| near.wrapping_add_signed(off * unit));
    prop_oneof![any::<u64>(), edge, (0..1_u64 << 16).prop_map(|page| BIT | (page * K4))]
}

proptest! {
    #![proptest_config(support::cases(600))]

    /// Whatever a guest puts into its registers, accepts or says on the channel: no panic, and a
    /// reply that GHCI knows.
    #[test]
    fn nothing_that_a_guest_can_say_is_too_much(
        policy in 0..POLICIES.len(),
        vcpus in 1..4_usize,
        gpaw in 36..=52_u32,
        calls in proptest::collection::vec(
            (0..8_u8, any::<u32>(), operand(), operand(), any::<u64>(), any::<u32>()), 1..30),
    ) {
        let mut bench = Bench::with(POLICIES[policy], 7, vcpus, gpaw);
        for (kind, vcpu, a, b, c, word) in calls {
            let vcpu = vcpu % u32::try_from(vcpus).expect("few");
            let engine = &mut bench.engine;
            match kind {
                0 => drop(engine.touch(a)),
                1 => drop(engine.accept(vcpu, a)),
                2 => drop(engine.channel_word(vcpu, word)),
                3 => drop(engine.channel_word(vcpu, word & 0x0f00_00ff)),
                4 => {
                    let mut regs = Regs { rcx: c, r10: c & 1, ..Regs::vmcall(sub::MAP_GPA, a, b) };
                    mapgpa::tdcall::tdcall(engine, vcpu, &mut regs, &mapgpa::platform::Bare, &mapgpa::platform::NoCpu).expect("memory");
                }
                5 => {
                    let mut regs = Regs {
                        rax: c & 7, rcx: a, r10: c >> 8 & 1, r11: b, r12: c, r13: a, r14: c,
                        r15: b, ..Regs::default()
                    };
                    mapgpa::tdcall::tdcall(engine, vcpu, &mut regs, &mapgpa::platform::Bare, &mapgpa::platform::NoCpu).expect("memory");
                }
                _ => {
                    let reply = engine.map_gpa(vcpu, a, b).expect("memory");
                    let call = bench.last();
                    prop_assert_eq!((reply.status, reply.r11), (call.status, call.r11));
                    prop_assert!(call.malformed.is_none() || call.status >> 63 == 1);
                    prop_assert!(call.converted <= b / K4);
                }
            }
        }
        bench.engine.end();
    }

    /// Under a legal policy RETRY names a page of what is left, and obedience ends in SUCCESS.
    #[test]
    fn legal_policies_lead_to_the_end(
        chunk in 1..600_u64,
        stall in 0..=2_u64,
        mode in 0..4_u8,
        seed in any::<u64>(),
        first in 0..2048_u64,
        count in 1..1500_u64,
        shared in any::<bool>(),
        already in proptest::collection::vec((0..1500_u64, 1..64_u64), 0..4),
    ) {
        let spec = match mode {
            0 => format!("chunk={}K", chunk * 4),
            1 if stall > 0 => format!("chunk={}K,stall={stall}", chunk * 4),
            2 => format!("budget={chunk}us,cost=1us"),
            _ => "random".to_owned(),
        };
        let mut bench = Bench::with(&spec, seed, 1, GPAW);
        let gpa = GPA + first * K4;
        for (at, pages) in already {
            let pages = Pages { first: gpa / K4 + at, count: pages };
            bench.engine.preset_shared(pages).expect("memory");
        }
        let bit = if shared { BIT } else { 0 };
        let (mut start, end) = (gpa | bit, (gpa | bit) + count * K4);
        let mut in_a_row = 0;
        loop {
            let reply = bench.map(start, end - start);
            let call = bench.last();
            prop_assert_eq!(call.truth, Truth::True, "{}", &spec);
            prop_assert_eq!(call.stray, None);
            if reply.status == status::SUCCESS {
                break;
            }
            prop_assert_eq!(reply.status, status::RETRY);
            prop_assert!(reply.r11 >= start && reply.r11 < end && reply.r11.is_multiple_of(K4));
            in_a_row = if call.converted == 0 { in_a_row + 1 } else { 0 };
            prop_assert_eq!(in_a_row, call.no_progress);
            prop_assert!(in_a_row <= 2, "{}", &spec);
            start = reply.r11;
        }
        let pages = Pages { first: gpa / K4, count };
        let left = bench.engine.map().find(pages, |state| (state == PageState::Shared) != shared);
        prop_assert_eq!(left, None);
    }
}
