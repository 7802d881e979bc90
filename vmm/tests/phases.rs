//! What a guest without marks (a kernel, a firmware) leaves undone: pages without an accept, and what
//! is not private when boot services have been exited. Requests outside RAM.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use mapgpa::engine::{Ending, Phase};
use mapgpa::pagemap::{PageState, Pages};
use mapgpa_abi::tdcall::{level, status};
use support::{BIT, Bench, GPA, K4, M2};

const FIRST: u64 = GPA / K4;
const RAM: Pages = Pages { first: 0, count: (64 << 20) / K4 };

fn pages(first: u64, count: u64) -> Pages {
    Pages { first, count }
}

/// Obeys until the reply is not RETRY, both ways, and accepts the last `accepted` pages.
fn round_trip(bench: &mut Bench, gpa: u64, size: u64, accepted: u64) {
    for bit in [BIT, 0] {
        let (mut start, end) = (gpa | bit, (gpa | bit) + size);
        while bench.map(start, end - start).status == status::RETRY {
            start = bench.last().r11;
        }
    }
    for page in 0..accepted {
        bench.accept(gpa + size - (page + 1) * K4, level::L4K);
    }
}

#[test]
fn an_accept_of_the_tail_only_is_found_by_the_first_touch() {
    let mut bench = Bench::new("chunk=64K");
    round_trip(&mut bench, GPA, M2, 16);
    assert_eq!(bench.events.borrow().unaccepted, []);
    bench.engine.touch(GPA + 5 * K4).expect_err("pending");
    let expected = [(pages(FIRST, 512), pages(FIRST, 496))];
    assert_eq!(bench.events.borrow().unaccepted, expected);
    bench.engine.touch(GPA + 6 * K4).expect_err("pending");
    assert_eq!(bench.events.borrow().unaccepted, expected, "said once");
    assert_eq!(bench.events.borrow().touches.len(), 2);
}

#[test]
fn what_is_accepted_or_marked_lacks_nothing() {
    let mut bench = Bench::new("chunk=64K");
    round_trip(&mut bench, GPA, M2, 512);
    bench.engine.check_accepts();
    bench.engine.phase(Phase::BootServicesExited, RAM);
    assert_eq!(bench.events.borrow().unaccepted, []);
    assert_eq!(bench.events.borrow().left, []);
}

#[test]
fn what_is_left_at_the_end_is_found_once() {
    let mut bench = Bench::new("chunk=64K");
    round_trip(&mut bench, GPA, M2, 16);
    bench.engine.check_accepts();
    bench.engine.check_accepts();
    assert_eq!(bench.events.borrow().unaccepted.len(), 1);
}

#[test]
fn exit_boot_services_tells_every_range_that_is_not_private() {
    let mut bench = Bench::new("complete");
    bench.engine.preset_pending(pages(0, 16)).expect("memory does not fail");
    bench.map(GPA | BIT, 2 * K4);
    bench.map((GPA + M2) | BIT, K4);
    round_trip(&mut bench, GPA + 2 * M2, K4, 0);
    // Beyond RAM a firmware shares what belongs to devices.
    assert_eq!(bench.map(0x8000_0000 | BIT, 1 << 30).status, status::SUCCESS);
    bench.engine.phase(Phase::Bds, RAM);
    assert_eq!(bench.events.borrow().left, [], "not yet");
    bench.engine.phase(Phase::BootServicesExited, RAM);
    let events = bench.events.borrow();
    assert_eq!(
        events.left,
        [
            (pages(0, 16), PageState::PrivatePending),
            (pages(FIRST, 2), PageState::Shared),
            (pages(FIRST + 512, 1), PageState::Shared),
            (pages(FIRST + 1024, 1), PageState::PrivatePending),
        ]
    );
    assert_eq!(events.unaccepted, [(pages(FIRST + 1024, 1), pages(FIRST + 1024, 1))]);
}

#[test]
fn what_is_not_got_through_with_by_exit_boot_services_was_given_up() {
    let mut bench = Bench::new("stall=forever");
    bench.map(GPA | BIT, K4);
    bench.engine.phase(Phase::BootServicesExited, RAM);
    let closed = bench.closed();
    assert_eq!(closed.len(), 1);
    assert_eq!(closed[0].ending, Ending::GaveUp(Some(GPA)));
    assert_eq!(bench.engine.reached(), Some(Phase::BootServicesExited));
    bench.map((GPA + M2) | BIT, K4);
    bench.engine.phase(Phase::Bds, RAM);
    assert_eq!(bench.engine.reached(), Some(Phase::BootServicesExited), "no way back");
}

#[test]
fn requests_outside_ram_are_kept_and_chunked_like_others() {
    let mut bench = Bench::new("chunk=64M");
    let gpa = 0x8000_0000;
    assert_eq!(bench.map(gpa | BIT, 1 << 30).status, status::RETRY);
    assert_eq!(bench.last().r11, (gpa + (64 << 20)) | BIT);
    assert_eq!(bench.engine.map().uniform(Pages::of_bytes(gpa, 64 << 20)), Some(PageState::Shared));
    let rest = Pages::of_bytes(gpa + (64 << 20), (1 << 30) - (64 << 20));
    assert_eq!(bench.engine.map().uniform(rest), Some(PageState::PrivateAccepted));
    let top = BIT - (1 << 30);
    assert_eq!(bench.map(top | BIT, 1 << 30).status, status::RETRY, "the highest legal GPA");
}
