//! The judge on made-up event streams: each check with one that violates it and one that does not,
//! the classes, the notes, the limits, and when a run is stopped.

use mapgpa::engine::{Accept, Call, Conversation, Ending, Event, Malformed, Stray, Then, Truth};
use mapgpa::judge::{CHECKS, Check, Class, GuestResult, Judge, Judgement, Rules};
use mapgpa::pagemap::{PageState, Pages};
use mapgpa_abi::tdcall::{module, status};
use mapgpa_abi::{Alias, Direction};

const GPA: u64 = 16 << 20;
const BIT: u64 = 1 << 47;
const PAGES: Pages = Pages { first: GPA / 4096, count: 512 };
const PART: Pages = Pages { first: PAGES.first + 8, count: 4 };

/// A reply RETRY with progress, in the middle of a conversation of [`PAGES`].
const RETRY: Call = Call {
    vcpu: 0,
    call: 1,
    raw_gpa: GPA | BIT,
    size: 512 * 4096,
    to: Direction::ToShared,
    converted: 8,
    status: status::RETRY,
    r11: PART.first * 4096 | BIT,
    truth: Truth::True,
    malformed: None,
    stray: None,
    no_progress: 0,
    requests: 1,
    pages: PAGES.count,
    special: false,
    at_ns: 0,
    took_ns: 0,
};

const CONVERSATION: Conversation = Conversation {
    vcpu: 0,
    pages: PAGES,
    to: Direction::ToShared,
    requests: 1,
    retries: 1,
    no_progress: 0,
};

/// A conversation that ended well.
#[derive(Clone, Copy)]
struct Closed {
    to: Direction,
    pages: Pages,
    ending: Ending,
    marked: bool,
    missing: Option<Pages>,
    lied: bool,
    pending: Option<Pages>,
}

const CLOSED: Closed = Closed {
    to: Direction::ToShared,
    pages: PAGES,
    ending: Ending::Completed,
    marked: true,
    missing: None,
    lied: false,
    pending: None,
};

const GAVE_UP: Closed = Closed { ending: Ending::GaveUp(Some(GPA)), missing: Some(PART), ..CLOSED };

impl Closed {
    fn event(self) -> Event<'static> {
        Event::Closed {
            conversation: Conversation { to: self.to, pages: self.pages, ..CONVERSATION },
            ending: self.ending,
            marked: self.marked,
            reported_accepted: 0,
            missing: self.missing,
            lied: self.lied,
            pending: self.pending,
        }
    }
}

const ACCEPT: Accept = Accept {
    vcpu: 0,
    pages: PART,
    answer: Some(module::SUCCESS),
    shared: false,
    lied: false,
    special: false,
};

const EXIT: Event<'static> = Event::Exit { vcpu: 0, success: true };
const EXIT_FAILURE: Event<'static> = Event::Exit { vcpu: 0, success: false };
const USE: Event<'static> = Event::Use { pages: PART, alias: Alias::Private };

fn touch(alias: Alias, state: PageState, lied: bool) -> Event<'static> {
    let bit = if alias == Alias::Shared { BIT } else { 0 };
    Event::Touch { raw_gpa: PART.gpa() | bit, alias, page: PART.first, state, lied }
}

fn judge(events: &[Event<'_>]) -> Judgement {
    let mut judge = Judge::new(Rules::default(), false);
    for event in events {
        judge.on(event);
    }
    judge.finish()
}

/// The checks that `events` violate, in order.
fn checks(events: &[Event<'_>]) -> Vec<Check> {
    judge(events).violations.iter().map(|violation| violation.check).collect()
}

fn then(rules: Rules, events: &[Event<'_>]) -> Vec<Then> {
    let mut judge = Judge::new(rules, false);
    events.iter().map(|event| judge.on(event)).collect()
}

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
            vec![call(Call { no_progress: 17, ..RETRY })],
            vec![call(Call { no_progress: 16, ..RETRY })],
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
    assert_eq!(CHECKS.len(), 11, "DESIGN.md has eleven");
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
fn the_class_follows_the_replies() {
    let class = |calls: &[Call]| {
        judge(&calls.iter().map(|call| Event::Call(*call)).collect::<Vec<_>>()).class
    };
    let stalled = |no_progress| Call { converted: 0, no_progress, ..RETRY };
    let refusal = Call { status: status::GPA_INUSE, truth: Truth::Refusal, ..RETRY };
    let lie = Call { truth: Truth::Undetectable(PART), ..RETRY };
    let odd = Call { truth: Truth::Detectable, ..RETRY };
    assert_eq!(class(&[]), Class::Legal);
    assert_eq!(class(&[RETRY]), Class::Legal);
    assert_eq!(class(&[stalled(1), stalled(2)]), Class::Legal, "at most two in a row");
    assert_eq!(class(&[stalled(1), stalled(2), stalled(3), RETRY]), Class::Stalling);
    assert_eq!(class(&[stalled(3), refusal]), Class::Refusing);
    assert_eq!(class(&[refusal, stalled(3)]), Class::Refusing, "the gravest, in any order");
    assert_eq!(class(&[refusal, lie]), Class::Hostile);
    assert_eq!(class(&[odd, refusal]), Class::Hostile);
    let malformed =
        Call { malformed: Some(Malformed::Empty), status: status::INVALID_OPERAND, ..RETRY };
    assert_eq!(class(&[malformed]), Class::Legal, "the guest's fault, not the host's");
}

#[test]
fn accepts_make_a_case_hostile_when_the_host_did_not_do_what_it_said() {
    let class = |accept| judge(&[Event::Accept(accept)]).class;
    let already = module::PAGE_ALREADY_ACCEPTED | 1;
    assert_eq!(class(ACCEPT), Class::Legal);
    assert_eq!(class(Accept { answer: None, special: true, ..ACCEPT }), Class::Hostile);
    assert_eq!(class(Accept { answer: Some(already), special: true, ..ACCEPT }), Class::Hostile);
    let twice = Accept { answer: Some(already), ..ACCEPT };
    assert_eq!(class(twice), Class::Legal, "the guest accepted twice by itself");
    let mismatch = Accept { answer: Some(module::PAGE_SIZE_MISMATCH), special: true, ..ACCEPT };
    assert_eq!(class(mismatch), Class::Legal, "a guest falls back to 4 KiB");
    let lied = Accept { answer: None, shared: true, lied: true, ..ACCEPT };
    assert_eq!(class(lied), Class::Hostile);
}

#[test]
fn giving_up_is_held_against_a_guest_under_legal_replies_only() {
    let stalling = Event::Call(Call { no_progress: 3, converted: 0, ..RETRY });
    let refusal = Event::Call(Call { truth: Truth::Refusal, ..RETRY });
    let hostile = Event::Call(Call { truth: Truth::Detectable, ..RETRY });
    for end in [GAVE_UP.event(), EXIT_FAILURE, Event::Panic { text: "cannot go on" }] {
        assert_eq!(checks(&[Event::Call(RETRY), end]), [Check::GaveUp]);
        assert_eq!(checks(&[end]), [Check::GaveUp], "without a call too");
        for class in [stalling, refusal, hostile] {
            assert_eq!(checks(&[class, end]), []);
            assert_eq!(checks(&[end, class]), [], "the class is that of the whole run");
        }
    }
    let all = [GAVE_UP.event(), Event::Panic { text: "no" }, EXIT_FAILURE];
    assert_eq!(checks(&all), [Check::GaveUp], "once, by its first sign");
    assert_eq!(judge(&all).violations[0].gpa, Some(GPA));
    let gone = Closed { ending: Ending::NeverReturned, missing: Some(PART), ..CLOSED };
    assert_eq!(checks(&[gone.event()]), []);
}

#[test]
fn what_no_guest_can_detect_is_a_note() {
    for said in [status::SUCCESS, status::RETRY] {
        let call = Call { status: said, truth: Truth::Undetectable(PART), ..RETRY };
        let missing = Closed { missing: Some(PART), lied: true, ..CLOSED };
        let judgement = judge(&[Event::Call(call), missing.event(), EXIT]);
        assert_eq!(judgement.violations, []);
        assert_eq!(judgement.notes.len(), 2, "{:?}", judgement.notes);
        let word = if said == status::SUCCESS { "SUCCESS" } else { "R11" };
        assert!(judgement.notes[0].contains(word) && judgement.notes[0].contains("0x1008000"));
    }
    let judgement = judge(&[touch(Alias::Shared, PageState::PrivateAccepted, true)]);
    assert_eq!((judgement.violations.len(), judgement.notes.len()), (0, 1));
    let pending = Closed { to: Direction::ToPrivate, pending: Some(PART), lied: true, ..CLOSED };
    assert_eq!(checks(&[pending.event()]), [Check::AcceptMissing], "a lie is no excuse for that");
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
fn the_result_is_how_the_guest_ended() {
    let result = |events: &[Event<'static>]| judge(events).result;
    let panic = Event::Panic { text: "no" };
    let second = Event::Exit { vcpu: 1, success: true };
    assert_eq!(result(&[]), GuestResult::None);
    assert_eq!(result(&[EXIT]), GuestResult::Success);
    assert_eq!(result(&[EXIT_FAILURE]), GuestResult::Failure);
    assert_eq!(result(&[EXIT_FAILURE, second]), GuestResult::Failure, "one vCPU failed");
    assert_eq!(result(&[second, EXIT_FAILURE]), GuestResult::Failure);
    assert_eq!(result(&[panic]), GuestResult::Failure);
    assert_eq!(result(&[Event::Crash { detail: "#UD" }]), GuestResult::Crash);
    assert_eq!(result(&[EXIT, Event::Timeout]), GuestResult::Timeout);
    assert!(judge(&[panic]).notes[0].contains("panicked: no"));
}

#[test]
fn a_special_policy_is_exercised_by_what_is_special_only() {
    let exercised = |special, events: &[Event<'static>]| {
        let mut judge = Judge::new(Rules::default(), special);
        for event in events {
            judge.on(event);
        }
        judge.finish().exercised
    };
    assert!(exercised(false, &[EXIT]));
    assert!(!exercised(true, &[Event::Call(RETRY), Event::Accept(ACCEPT), EXIT]));
    assert!(exercised(true, &[Event::Call(Call { special: true, ..RETRY }), Event::Call(RETRY)]));
    assert!(exercised(true, &[Event::Accept(Accept { special: true, ..ACCEPT })]));
}

#[test]
fn the_limits_are_options() {
    let call = |no_progress, requests| Event::Call(Call { no_progress, requests, ..RETRY });
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
    let endless = Event::Call(Call { no_progress: 17, ..RETRY });
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
