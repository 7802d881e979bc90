//! The judge on made-up event streams: the class of a case, what is then held against the guest, what
//! is a note, how the guest ended, and whether the policy showed.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use mapgpa::engine::{Accept, Call, Ending, Event, Malformed, Truth};
use mapgpa::judge::{Check, Class, GuestResult, Judge, Rules};
use mapgpa::pagemap::PageState;
use mapgpa_abi::tdcall::{module, status};
use mapgpa_abi::{Alias, Direction};
use support::stream::{
    ACCEPT, CLOSED, Closed, EXIT, EXIT_FAILURE, GAVE_UP, GPA, PART, RETRY, checks, judge, touch,
};

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
fn progress_that_r11_hides_is_none_to_the_guest() {
    let hidden = Event::Call(Call { r11: RETRY.raw_gpa, ..RETRY });
    let other = Event::Call(Call { vcpu: 1, r11: RETRY.raw_gpa, ..RETRY });
    let judged = |events: &[Event<'static>]| {
        let judgement = judge(&[events, &[GAVE_UP.event()]].concat());
        (judgement.class, judgement.violations.len())
    };
    assert_eq!(judged(&[hidden, hidden]), (Class::Legal, 1));
    assert_eq!(judged(&[hidden, hidden, hidden]), (Class::Stalling, 0));
    assert_eq!(judged(&[hidden, hidden, other]), (Class::Legal, 1), "each vCPU by itself");
    assert_eq!(judged(&[hidden, hidden, Event::Call(RETRY), hidden]), (Class::Legal, 1));
    assert_eq!(judged(&[hidden, hidden, CLOSED.event(), hidden]), (Class::Legal, 1));
}

#[test]
fn busy_accepts_are_judged_as_replies_without_progress_are() {
    let busy = Accept { answer: Some(module::OPERAND_BUSY | 1), special: true, ..ACCEPT };
    let other = Accept { vcpu: 1, ..busy };
    let judged = |accepts: &[Accept]| {
        let events: Vec<_> = accepts.iter().map(|accept| Event::Accept(*accept)).collect();
        let judgement = judge(&events);
        (judgement.class, judgement.violations.first().map(|violation| violation.check))
    };
    assert_eq!(judged(&[busy, busy, ACCEPT, busy, busy]), (Class::Legal, None));
    assert_eq!(judged(&[busy, busy, other]), (Class::Legal, None), "each vCPU by itself");
    assert_eq!(judged(&[busy, busy, busy]), (Class::Stalling, None));
    assert_eq!(judged(&[busy; 16]), (Class::Stalling, None));
    assert_eq!(judged(&[busy; 17]), (Class::Stalling, Some(Check::Unbounded)));
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
