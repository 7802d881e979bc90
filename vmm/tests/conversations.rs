//! Which requests belong together, how conversations end, what the guest channel says of them, and
//! overlapping vCPUs.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use mapgpa::engine::{Ending, Flow, Stray};
use mapgpa::pagemap::Pages;
use mapgpa_abi::Direction;
use mapgpa_abi::channel::{TEXT_MAX, VERSION, header, range_words, tag};
use mapgpa_abi::tdcall::{level, module, status};
use support::{BIT, Bench, Closed, GPA, K4, M2};

const FIRST: u64 = GPA / K4;

fn range(tag: u8, field: u32, gpa: u64, size: u64) -> Vec<u32> {
    [&[header(tag, field)][..], &range_words(gpa, size)].concat()
}

fn begin(to: Direction, gpa: u64, size: u64) -> Vec<u32> {
    range(tag::BEGIN, u32::from(to == Direction::ToShared), gpa, size)
}

fn end(success: bool, accepted: u32) -> [u32; 2] {
    [header(tag::END, u32::from(!success)), accepted]
}

fn only(bench: &Bench) -> Closed {
    let closed = bench.closed();
    assert_eq!(closed.len(), 1, "{closed:?}");
    closed[0]
}

/// Obeys until the reply is not RETRY; without marks.
fn obey(bench: &mut Bench, bit: u64, gpa: u64, size: u64) -> u64 {
    let (mut start, end) = (gpa | bit, (gpa | bit) + size);
    loop {
        let reply = bench.map(start, end - start);
        if reply.status != status::RETRY {
            return reply.status;
        }
        start = reply.r11;
    }
}

#[test]
fn without_marks_retries_are_joined_by_r11() {
    let mut bench = Bench::new("chunk=64K");
    assert_eq!(obey(&mut bench, BIT, GPA, M2), status::SUCCESS);
    let closed = only(&bench);
    let conversation = closed.conversation;
    assert_eq!(conversation.pages, Pages { first: FIRST, count: 512 });
    assert_eq!((conversation.requests, conversation.retries), (32, 31));
    assert_eq!((closed.ending, closed.marked, closed.missing), (Ending::Completed, false, None));
    assert_eq!(obey(&mut bench, 0, GPA, M2), status::SUCCESS);
    assert_eq!(bench.closed()[1].conversation.to, Direction::ToPrivate);
    assert_eq!(bench.closed()[1].pending, Some(Pages { first: FIRST, count: 512 }));
}

#[test]
fn without_marks_a_wild_r11_that_is_followed_belongs_here() {
    for (spec, stray) in [
        ("chunk=64K,r11=flip", Stray::Flipped),
        ("chunk=64K,r11=past-end", Stray::Outside),
        ("chunk=64K,r11=below", Stray::Outside),
    ] {
        let mut bench = Bench::new(spec);
        let reply = bench.map(BIT | GPA, M2);
        bench.map(reply.r11, K4);
        assert_eq!(bench.last().stray, Some(stray), "{spec}");
        // One page fits in a chunk, thus SUCCESS, and it shows that the rest is not converted.
        let closed = only(&bench);
        assert_eq!((closed.conversation.requests, closed.ending), (2, Ending::Completed));
        assert!(closed.missing.is_some() && !closed.lied, "{spec}");
    }
}

#[test]
fn without_marks_another_request_gives_up_what_was_open() {
    let mut bench = Bench::new("chunk=64K");
    bench.map(BIT | GPA, M2);
    bench.map(BIT | (GPA + 4 * M2), M2);
    let closed = only(&bench);
    assert_eq!(closed.ending, Ending::GaveUp(Some(GPA + 16 * K4)));
    assert_eq!(closed.missing, Some(Pages { first: FIRST + 16, count: 496 }));
    assert_eq!(bench.last().stray, None, "it is a conversation of its own");
    // The same range the other way round, where R11 did not say so, is another one, too.
    bench.map(GPA + 4 * M2, M2);
    let endings: Vec<_> = bench.closed().iter().map(|closed| closed.ending).collect();
    assert_eq!(endings[1..], [Ending::GaveUp(Some(GPA + 4 * M2 + 16 * K4)), Ending::Completed]);
    assert_eq!((bench.last().requests, bench.last().stray), (1, None));
}

#[test]
fn without_marks_a_refusal_ends_it() {
    let mut bench = Bench::new("chunk=64K,status=0x8000000000000000,after=1");
    let reply = bench.map(BIT | GPA, M2);
    bench.map(reply.r11, M2 - 16 * K4);
    assert_eq!(only(&bench).ending, Ending::GaveUp(Some(GPA + 16 * K4)));
    // So does a malformed request.
    let mut bench = Bench::new("chunk=64K");
    bench.map(BIT | GPA, M2);
    bench.map(BIT | GPA, 0);
    assert_eq!(only(&bench).ending, Ending::GaveUp(Some(GPA + 16 * K4)));
}

#[test]
fn replies_without_progress_are_counted_in_a_row() {
    let mut bench = Bench::new("chunk=64K,stall=2");
    obey(&mut bench, BIT, GPA, 32 * K4);
    let rows: Vec<_> = bench.calls().iter().map(|call| call.no_progress).collect();
    assert_eq!(rows, [1, 2, 0, 1, 2, 0]);
    assert_eq!(only(&bench).conversation.no_progress, 4);
    let counts: Vec<_> = bench.calls().iter().map(|call| call.requests).collect();
    assert_eq!(counts, [1, 2, 3, 4, 5, 6]);
    // An R11 ahead of the truth is progress as far as the guest can see.
    let mut bench = Bench::new("stall=forever,r11=skip");
    bench.map(BIT | GPA, M2);
    assert_eq!(bench.last().no_progress, 1, "stall comes first");
    let mut bench = Bench::new("chunk=4K,r11=start+64K");
    for _ in 0..3 {
        bench.map(BIT | GPA, M2);
        assert_eq!(bench.last().no_progress, 0);
    }
}

#[test]
fn progress_that_r11_hid_is_seen_when_r11_moves() {
    // The first reply converts a page and points at the start; the second points past that page.
    let scratch = support::Scratch::new("hidden");
    let file = scratch.path("p.toml");
    let text = "schema = \"mapgpa.policy/1\"\n[[rule]]\ncalls = [1, 1]\n\
                do = \"chunk=4K,r11=start\"\n[[rule]]\ndo = \"stall=forever\"\n";
    std::fs::write(&file, text).expect("a file");
    let mut bench = Bench::new(&file.display().to_string());
    bench.map(BIT | GPA, M2);
    let row = |bench: &mut Bench, gpa| {
        bench.map(BIT | gpa, GPA + M2 - gpa);
        let call = bench.last();
        (call.r11, call.no_progress, call.standing)
    };
    let next = BIT | (GPA + K4);
    assert_eq!(row(&mut bench, GPA), (next, 1, 0));
    assert_eq!(row(&mut bench, GPA + K4), (next, 2, 1));
    // Asking from the start again is no way to see progress twice.
    assert_eq!(row(&mut bench, GPA), (next, 3, 2));
}

#[test]
fn marks_hold_a_conversation_together() {
    let mut bench = Bench::new("chunk=64K");
    bench.say(0, &begin(Direction::ToPrivate, GPA, M2));
    bench.engine.preset_shared(Pages { first: FIRST, count: 512 }).expect("memory");
    // In pieces, and a second time, and beside it: all of it is one conversation.
    assert_eq!(obey(&mut bench, 0, GPA, M2 / 2), status::SUCCESS);
    assert_eq!(obey(&mut bench, 0, GPA + M2 / 2, M2 / 2), status::SUCCESS);
    bench.map(BIT | (GPA + M2), K4);
    assert_eq!(bench.last().stray, Some(Stray::Flipped));
    assert_eq!(bench.closed(), []);
    bench.accept(GPA, level::L4K);
    bench.say(0, &end(true, 1));
    let closed = only(&bench);
    assert_eq!((closed.ending, closed.marked), (Ending::Completed, true));
    assert_eq!(closed.pending, Some(Pages { first: FIRST + 1, count: 511 }));
    assert_eq!(closed.conversation.requests, 33);
}

#[test]
fn a_marked_end_is_the_guests_word_and_the_pages_are_the_truth() {
    for (success, ending) in
        [(true, Ending::Completed), (false, Ending::GaveUp(Some(GPA + 16 * K4)))]
    {
        let mut bench = Bench::new("chunk=64K");
        bench.say(0, &begin(Direction::ToShared, GPA, M2));
        bench.map(BIT | GPA, M2);
        bench.say(0, &end(success, 0));
        let closed = only(&bench);
        assert_eq!((closed.ending, closed.lied), (ending, false));
        assert_eq!(closed.missing, Some(Pages { first: FIRST + 16, count: 496 }));
    }
    let mut bench = Bench::new("lie=success");
    bench.say(0, &begin(Direction::ToShared, GPA, M2));
    bench.map(BIT | GPA, M2);
    bench.say(0, &end(true, 0));
    assert!(only(&bench).lied);
}

#[test]
fn an_exit_ends_the_conversation_that_it_is_in() {
    for (success, ending) in
        [(true, Ending::Completed), (false, Ending::GaveUp(Some(GPA + 16 * K4)))]
    {
        let mut bench = Bench::new("chunk=64K");
        bench.say(0, &begin(Direction::ToShared, GPA, M2));
        bench.map(BIT | GPA, M2);
        bench.say(0, &[header(tag::EXIT, u32::from(!success))]);
        let closed = only(&bench);
        assert_eq!((closed.ending, closed.marked), (ending, true));
        assert_eq!(closed.missing, Some(Pages { first: FIRST + 16, count: 496 }));
    }
}

#[test]
fn what_is_open_at_the_end_never_returned() {
    let mut bench = Bench::new("chunk=64K");
    bench.say(0, &begin(Direction::ToShared, GPA, M2));
    let events = std::rc::Rc::clone(&bench.events);
    bench.engine.end();
    assert_eq!(events.borrow().closed[0].ending, Ending::NeverReturned);
    let mut bench = Bench::new("chunk=64K");
    bench.map(BIT | GPA, M2);
    let events = std::rc::Rc::clone(&bench.events);
    bench.engine.end();
    assert_eq!(events.borrow().closed[0].ending, Ending::NeverReturned);
}

#[test]
fn a_panic_gives_up_and_stops() {
    let mut bench = Bench::new("chunk=64K");
    bench.say(0, &begin(Direction::ToShared, GPA, M2));
    bench.map(BIT | GPA, M2);
    bench.say(0, &[header(tag::PANIC, 5), u32::from_le_bytes(*b"oops")]);
    assert_eq!(bench.closed(), []);
    let flow = bench.engine.channel_word(0, u32::from(b'!'));
    assert_eq!(flow, Flow::Stop);
    assert_eq!(only(&bench).ending, Ending::GaveUp(Some(GPA + 16 * K4)));
    assert_eq!(bench.events.borrow().texts, ["oops!"]);
}

#[test]
fn nonsense_on_the_channel_is_noted_and_survived() {
    let mut bench = Bench::with("complete", 1, 2, support::GPAW);
    for (vcpu, words) in [
        (0, vec![header(99, 0)]),
        (0, vec![header(tag::HELLO, VERSION + 1)]),
        (0, vec![header(tag::TEXT, 257)]),
        (0, vec![header(tag::DATA, 65)]),
        (0, end(true, 0).to_vec()),
        (0, begin(Direction::ToShared, GPA, 0)),
        (1, range(tag::USE, 1, GPA, 0)),
    ] {
        let before = bench.events.borrow().texts.len();
        bench.say(vcpu, &words);
        assert_eq!(bench.events.borrow().texts.len(), before + 1, "{words:x?}");
    }
    // A conversation inside another ends that.
    bench.say(0, &begin(Direction::ToShared, GPA, M2));
    bench.say(0, &begin(Direction::ToShared, GPA, K4));
    assert_eq!(only(&bench).ending, Ending::GaveUp(Some(GPA)));
    assert_eq!(bench.events.borrow().texts.len(), 8);
    // The longest text there is, and bytes that are no text, or would move a terminal's cursor.
    let text = vec![0x7a7a_7a7a; TEXT_MAX / 4];
    bench.say(1, &[&[header(tag::TEXT, 256)][..], &text].concat());
    assert_eq!(bench.events.borrow().texts[8], "z".repeat(TEXT_MAX));
    bench.say(1, &[header(tag::TEXT, 4), u32::from_le_bytes([b'a', 0xff, b'\n', 0x1b])]);
    let events = bench.events.borrow();
    assert!(events.texts[9].starts_with('a') && !events.texts[9].contains(char::is_control));
}

#[test]
fn the_run_ends_when_all_vcpus_have() {
    let mut bench = Bench::with("complete", 1, 2, support::GPAW);
    assert_eq!(bench.engine.channel_word(0, header(tag::HELLO, VERSION)), Flow::Continue);
    assert_eq!(bench.engine.channel_word(0, header(tag::BARRIER, 0)), Flow::Barrier);
    assert_eq!(bench.engine.channel_word(0, header(tag::EXIT, 0)), Flow::Exit);
    assert_eq!(bench.engine.channel_word(1, header(tag::EXIT, 1)), Flow::Stop);
    assert_eq!(bench.events.borrow().exits, [(0, true), (1, false)]);
}

#[test]
fn overlapping_conversations_of_two_vcpus() {
    let start = |spec: &str| {
        let mut bench = Bench::with(spec, 1, 2, support::GPAW);
        assert_eq!(bench.map_on(0, BIT | GPA, M2).status, status::RETRY);
        bench
    };
    let spec = "chunk=64K,overlap=inuse";
    let mut bench = start(spec);
    let reply = bench.map_on(1, BIT | (GPA + M2 - K4), M2);
    assert_eq!((reply.status, reply.r11), (status::GPA_INUSE, BIT | (GPA + M2 - K4)));
    assert!(bench.last().special);
    assert_eq!(bench.map_on(1, BIT | (GPA + M2), M2).status, status::RETRY, "beside it");
    let mut bench = start(spec);
    assert_eq!(obey(&mut bench, BIT, GPA + 16 * K4, M2 - 16 * K4), status::SUCCESS, "its own");
    assert_eq!(bench.map_on(1, BIT | GPA, K4).status, status::SUCCESS, "it is over");
    // Without it both get through, and each page is converted once.
    let mut bench = start("chunk=64K");
    let mut at = [BIT | (GPA + 16 * K4), BIT | GPA];
    let end = BIT | (GPA + M2);
    while at.iter().any(|at| *at != end) {
        for (vcpu, at) in (0..).zip(&mut at).filter(|(_, at)| **at != end) {
            let reply = bench.map_on(vcpu, *at, end - *at);
            *at = if reply.status == status::SUCCESS { end } else { reply.r11 };
        }
    }
    let converted: u64 = bench.calls().iter().map(|call| call.converted).sum();
    assert_eq!(converted, 512);
    assert!(bench.closed().iter().all(|closed| closed.missing.is_none()));
}

#[test]
fn accepts_of_a_whole_conversation_leave_nothing_pending() {
    let mut bench = Bench::new("chunk=64K");
    obey(&mut bench, BIT, GPA, M2);
    bench.say(0, &begin(Direction::ToPrivate, GPA, M2));
    obey(&mut bench, 0, GPA, M2);
    assert_eq!(bench.accept(GPA, level::L2M), Some(module::SUCCESS));
    bench.say(0, &end(true, 512));
    assert_eq!(bench.closed()[1].pending, None);
}
