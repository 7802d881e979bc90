//! The judge on made-up event streams: each check with one that violates it and one that does not,
//! the limits, and when a run is stopped.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use mapgpa::engine::{Accept, Call, Conversation, Event, Malformed, Phase, Stray, Then, Truth};
use mapgpa::judge::{CHECKS, Check, Rules};
use mapgpa::pagemap::{PageState, Pages};
use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Alias, Direction};
use support::stream::{
    ACCEPT, CLOSED, Closed, EXIT, EXIT_FAILURE, GAVE_UP, PAGES, PART, RETRY, USE, checks, judge,
    then, touch,
};

/// Each check: a stream that violates it, and one nearly the same that does not.
fn proofs() -> Vec<(Check, Vec<Event<'static>>, Vec<Event<'static>>)> {
    let refused = Call { status: status::INVALID_OPERAND, truth: Truth::Refusal, ..RETRY };
    let missing = Closed { missing: Some(PART), ..CLOSED };
    let private = Closed { to: Direction::ToPrivate, ..CLOSED };
    let pending = Closed { pending: Some(PART), ..private };
    let call = |call| Event::Call(call);
    vec![
        (Check::FalseSuccess, vec![missing.event(), EXIT], vec![CLOSED.event(), EXIT]),
        (
            Check::GaveUp,
            vec![call(RETRY), GAVE_UP.event(), EXIT_FAILURE],
            vec![call(refused), GAVE_UP.event(), EXIT_FAILURE],
        ),
        (
            Check::Unbounded,
            vec![call(Call { standing: 17, ..RETRY })],
            vec![call(Call { standing: 16, ..RETRY })],
        ),
        (
            Check::Unbounded,
            vec![call(Call { requests: 4096 + 4 * 512 + 1, ..RETRY })],
            vec![call(Call { requests: 4096 + 4 * 512, ..RETRY })],
        ),
        (Check::Unbounded, vec![Event::Timeout], vec![EXIT]),
        (
            Check::WildRequest,
            vec![call(Call { stray: Some(Stray::Outside), ..RETRY })],
            vec![call(RETRY)],
        ),
        (
            Check::WildRequest,
            vec![call(Call { stray: Some(Stray::Flipped), ..RETRY })],
            vec![call(RETRY)],
        ),
        (
            Check::Skipped,
            vec![call(Call { stray: Some(Stray::Skipped(PART)), ..RETRY })],
            vec![call(RETRY)],
        ),
        (
            Check::WrongAlias,
            vec![touch(Alias::Private, PageState::Shared, false)],
            vec![touch(Alias::Private, PageState::Shared, true)],
        ),
        (
            Check::WrongAlias,
            vec![touch(Alias::Shared, PageState::PrivatePending, false)],
            vec![touch(Alias::Shared, PageState::PrivatePending, true)],
        ),
        (
            Check::WrongAlias,
            vec![Event::Accept(Accept { answer: None, shared: true, ..ACCEPT })],
            vec![Event::Accept(Accept { answer: None, special: true, ..ACCEPT })],
        ),
        (
            Check::AccessBeforeAccept,
            vec![touch(Alias::Private, PageState::PrivatePending, false)],
            vec![touch(Alias::Private, PageState::PrivatePending, true)],
        ),
        (Check::AcceptMissing, vec![pending.event()], vec![private.event()]),
        (
            Check::AcceptMissing,
            vec![Event::Unaccepted { range: PAGES, pending: PART }],
            vec![Event::Phase { phase: Phase::Dxe, at_ns: 1 }],
        ),
        (
            Check::LeftShared,
            vec![Event::Left { pages: PART, state: PageState::Shared }],
            vec![Event::Left { pages: PART, state: PageState::PrivatePending }],
        ),
        (
            Check::Protocol,
            vec![call(Call { malformed: Some(Malformed::Unaligned), ..RETRY })],
            vec![call(RETRY)],
        ),
        (
            Check::IgnoredFailure,
            vec![call(refused), GAVE_UP.event(), USE],
            vec![call(refused), GAVE_UP.event(), CLOSED.event(), USE],
        ),
        (
            Check::Crash,
            vec![Event::Crash { detail: "#PF" }],
            vec![call(refused), Event::Panic { text: "no" }],
        ),
    ]
}

#[test]
fn each_check_is_proven_both_ways() {
    for (check, violating, not) in proofs() {
        assert_eq!(checks(&violating), [check], "{violating:#?}");
        assert_eq!(checks(&not), [], "{not:#?}");
    }
    for info in CHECKS {
        assert!(
            proofs().iter().any(|(check, ..)| *check == info.check),
            "no proof of {}",
            info.name
        );
    }
}

#[test]
fn the_table_of_checks_is_whole() {
    for info in CHECKS {
        assert_eq!(info.check.info().name, info.name);
        assert_eq!(Check::by_name(info.name), Some(info.check));
        assert!(info.sentence.len() > 20 && info.reason.len() > 20, "{}", info.name);
        for other in CHECKS {
            let same = std::ptr::eq(info, other);
            assert!(same || (info.name != other.name && info.letter != other.letter));
        }
    }
    assert_eq!(Check::by_name("crush"), None);
    assert_eq!(CHECKS.len(), 12);
}

#[test]
fn what_is_used_or_handed_over_after_a_failure_is_an_ignored_failure() {
    let refused = Event::Call(Call { call: 7, truth: Truth::Refusal, ..RETRY });
    let touch = touch(Alias::Shared, PageState::PrivateAccepted, false);
    assert_eq!(
        checks(&[refused, GAVE_UP.event(), touch]),
        [Check::IgnoredFailure, Check::WrongAlias]
    );
    assert_eq!(checks(&[refused, GAVE_UP.event(), CLOSED.event(), touch]), [Check::WrongAlias]);
    let left = Event::Left { pages: PAGES, state: PageState::Shared };
    let dxe = Event::Phase { phase: Phase::Dxe, at_ns: 1 };
    let judgement = judge(&[dxe, refused, GAVE_UP.event(), left]);
    let found: Vec<_> = judgement.violations.iter().map(|violation| violation.check).collect();
    assert_eq!(found, [Check::IgnoredFailure, Check::LeftShared]);
    for violation in &judgement.violations {
        assert_eq!(violation.phase, Some(Phase::Dxe));
        assert!(violation.detail.contains("512 pages"), "{}", violation.detail);
    }
    assert!(judgement.violations[0].detail.contains("call 7"), "the request that caused it");
}

#[test]
fn a_violation_says_which_call_where_and_what() {
    let stray = Some(Stray::Skipped(PART));
    let judgement = judge(&[Event::Call(Call { call: 7, stray, ..RETRY })]);
    let violation = &judgement.violations[0];
    assert_eq!((violation.call, violation.gpa), (7, Some(PART.gpa())));
    assert!(violation.detail.contains("4 pages"), "{}", violation.detail);
    for malformed in [
        (Malformed::Empty, "size 0"),
        (Malformed::Wraps, "wraps"),
        (Malformed::IllegalGpa, "GPAW"),
        (Malformed::MixedSharedBit, "alias"),
        (Malformed::Unaligned, "aligned"),
    ] {
        let call = Call { malformed: Some(malformed.0), ..RETRY };
        let judgement = judge(&[Event::Call(call)]);
        let detail = &judgement.violations[0].detail;
        assert!(detail.contains(malformed.1) && detail.contains("0x800001000000"), "{detail}");
    }
}

#[test]
fn a_range_that_another_vcpu_converted_may_be_used() {
    let refused = Event::Call(Call { truth: Truth::Refusal, ..RETRY });
    let by = |vcpu, closed: Closed| match closed.event() {
        Event::Closed { conversation, ending, marked, missing, lied, pending, .. } => {
            let conversation = Conversation { vcpu, ..conversation };
            let reported_accepted = 0;
            Event::Closed {
                conversation,
                ending,
                marked,
                reported_accepted,
                missing,
                lied,
                pending,
            }
        }
        other => other,
    };
    for (second, ignored) in [(1, vec![]), (0, vec![Check::IgnoredFailure])] {
        let order = [refused, by(0, CLOSED), by(second, GAVE_UP), USE];
        assert_eq!(checks(&order), ignored, "of what vCPU {second} gave up");
    }
    let back = Closed { to: Direction::ToPrivate, ..CLOSED };
    let order = [refused, by(0, back), by(1, GAVE_UP), USE];
    assert_eq!(checks(&order), [Check::IgnoredFailure], "converted the other way");
}

#[test]
fn without_marks_the_accepts_come_after_the_end() {
    let pending = Closed { to: Direction::ToPrivate, pending: Some(PART), ..CLOSED };
    assert_eq!(checks(&[Closed { marked: false, ..pending }.event()]), []);
    assert_eq!(checks(&[pending.event()]), [Check::AcceptMissing]);
    let to_shared = Closed { to: Direction::ToShared, ..pending };
    assert_eq!(checks(&[to_shared.event()]), [], "pending pages matter to private only");
}

#[test]
fn a_failed_range_stays_out_of_use_until_all_of_it_is_converted() {
    let refused = Event::Call(Call { truth: Truth::Refusal, ..RETRY });
    let failed = [refused, GAVE_UP.event()];
    let with = |more: &[Event<'static>]| checks(&[&failed[..], more].concat());
    let elsewhere = Pages { first: PAGES.end(), count: 1 };
    let other = Event::Use { pages: elsewhere, alias: Alias::Shared };
    assert_eq!(with(&[other]), []);
    let last =
        Event::Use { pages: Pages { first: PAGES.end() - 1, count: 9 }, alias: Alias::Shared };
    assert_eq!(with(&[last]), [Check::IgnoredFailure]);
    assert_eq!(with(&[CLOSED.event(), last]), []);
    // Only a part of it was converted after all.
    let part = Closed { pages: PART, ..CLOSED };
    assert_eq!(with(&[part.event(), USE]), []);
    assert_eq!(with(&[part.event(), last]), [Check::IgnoredFailure]);
}

#[test]
fn the_limits_are_options() {
    let call = |standing, requests| Event::Call(Call { standing, requests, ..RETRY });
    let unbounded = |rules, event| then(rules, &[event])[0] == Then::Stop;
    let rules = Rules { max_no_progress: 2, max_calls: 10, ..Rules::default() };
    assert!(!unbounded(rules, call(2, 1)) && unbounded(rules, call(3, 1)));
    assert!(!unbounded(rules, call(0, 10 + 4 * 512)) && unbounded(rules, call(0, 11 + 4 * 512)));
    let none = Rules { max_no_progress: u64::MAX, max_calls: u64::MAX, stop: false };
    assert!(!unbounded(none, call(u64::MAX, u64::MAX)));
}

#[test]
fn a_run_is_stopped_by_what_is_endless_and_else_only_if_asked() {
    let stop = Rules { stop: true, ..Rules::default() };
    let touch = touch(Alias::Shared, PageState::PrivatePending, false);
    assert_eq!(then(Rules::default(), &[touch, touch]), [Then::GoOn, Then::GoOn]);
    assert_eq!(then(stop, &[Event::Call(RETRY), touch]), [Then::GoOn, Then::Stop]);
    let endless = Event::Call(Call { standing: 17, ..RETRY });
    assert_eq!(then(Rules::default(), &[endless]), [Then::Stop]);
    assert_eq!(then(Rules::default(), &[Event::Timeout]), [Then::Stop]);
    // A note is no violation.
    let lie = Event::Call(Call { truth: Truth::Undetectable(PART), ..RETRY });
    assert_eq!(then(stop, &[lie]), [Then::GoOn]);
}

#[test]
fn of_many_violations_and_notes_some_are_kept_and_all_are_counted() {
    let touch = touch(Alias::Shared, PageState::PrivatePending, false);
    let mut events = vec![touch; 40];
    events.push(Event::Crash { detail: "#GP" });
    events.extend([Event::Text { text: "hello" }; 40]);
    let judgement = judge(&events);
    let count = |check| judgement.violations.iter().filter(|v| v.check == check).count();
    assert_eq!(
        (count(Check::WrongAlias), count(Check::Crash)),
        (16, 1),
        "others are not crowded out"
    );
    let last = judgement.notes.iter().rev().take(2).rev().cloned().collect::<Vec<_>>();
    assert_eq!(last, ["24 more violations are not listed", "24 more notes are not listed"]);
}
