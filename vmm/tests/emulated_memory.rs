//! Backend `emulated`: what guest memory does at conversions, and which accesses are caught.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

mod common;
mod harness;

use common::{GPA, K4, M2, Probe, Script, shared_bit};
use harness::{Needs, harness};
use mapgpa::memory::MemoryModel;
use mapgpa::pagemap::PageState::{PrivateAccepted, PrivatePending, Shared};
use mapgpa_abi::Alias;

fn probe(memory_model: MemoryModel) -> Probe {
    Probe { memory_model, ..Probe::default() }
}

fn contents_are_lost_at_conversion_and_zero_after_accept(memory_model: MemoryModel) {
    let script = Script::new()
        .fill(Alias::Private, GPA, 512, K4)
        .check(Alias::Private, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, true)
        .check(Alias::Shared, GPA, 512, K4)
        .fill(Alias::Shared, GPA, 512, K4)
        .check(Alias::Shared, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, false)
        .accept(GPA, 1, 0, 1)
        .check(Alias::Private, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, true)
        .check(Alias::Shared, GPA, 512, K4);
    let seen = probe(memory_model).run(&[script]);
    assert_eq!(
        seen.data,
        [0, 512, 1, 512, 0, 0, 512, 1, 1, 512, 0, 1, 512, 0],
        "written; converted and lost; written; converted, accepted and zero; lost again"
    );
    assert_eq!(seen.touches, []);
    assert_eq!(seen.exits, [(0, true)]);
}

fn pages_in_the_target_state_keep_their_contents(memory_model: MemoryModel) {
    let script = Script::new()
        .fill(Alias::Private, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, false)
        .check(Alias::Private, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, true)
        .fill(Alias::Shared, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, true)
        .convert(GPA, 2, K4, K4, true)
        .check(Alias::Shared, GPA, 512, K4);
    let seen = probe(memory_model).run(&[script]);
    assert_eq!(seen.data, [1, 0, 512, 1, 1, 2, 0, 512]);
    assert_eq!(seen.touches, []);
}

fn a_page_alone_is_converted_alone(memory_model: MemoryModel) {
    let page = GPA + 7 * K4;
    let script = Script::new()
        .fill(Alias::Private, GPA, 512, K4)
        .convert(page, 1, 0, K4, true)
        .check(Alias::Private, GPA, 7, K4)
        .check(Alias::Private, page + K4, 504, K4)
        .check(Alias::Shared, page, 1, K4);
    let seen = probe(memory_model).run(&[script]);
    assert_eq!(seen.data, [1, 0, 7, 0, 504, 1, 0]);
    assert_eq!(seen.touches, []);
}

fn pages_can_be_shared_from_the_start(memory_model: MemoryModel) {
    let probe =
        Probe { shared: Some(mapgpa::pagemap::Pages::of_bytes(GPA, M2)), ..probe(memory_model) };
    let script = Script::new()
        .fill(Alias::Shared, GPA, 512, K4)
        .check(Alias::Shared, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, false)
        .accept(GPA, 512, K4, 0)
        .check(Alias::Private, GPA, 512, K4);
    let seen = probe.run(&[script]);
    assert_eq!(seen.data, [0, 512, 1, 512, 512, 0]);
    assert_eq!(seen.touches, []);
}

fn the_wrong_alias_is_caught_with_its_gpa_in_both_directions(memory_model: MemoryModel) {
    let bit = shared_bit();
    let script = Script::new()
        // Private, through the shared alias, beside what is ever converted and in it.
        .read(Alias::Shared, GPA + 3 * M2 + 5 * K4)
        .read(Alias::Shared, GPA + 8)
        .convert(GPA, 1, 0, M2, true)
        .write(Alias::Shared, GPA + 6 * K4, 1)
        // Shared, through the private alias: a write and a read.
        .write(Alias::Private, GPA + 2 * K4, 42)
        .read(Alias::Private, GPA + 511 * K4)
        .convert(GPA, 1, 0, M2, false)
        .accept(GPA, 1, 0, 1)
        // What was written through the wrong alias is gone.
        .read(Alias::Private, GPA + 2 * K4)
        .read(Alias::Shared, GPA + 6 * K4);
    let seen = probe(memory_model).run(&[script]);
    assert_eq!(
        seen.touches,
        [
            ((GPA + 3 * M2 + 5 * K4) | bit, Alias::Shared, PrivateAccepted),
            (GPA | bit, Alias::Shared, PrivateAccepted),
            (GPA + 2 * K4, Alias::Private, Shared),
            (GPA + 511 * K4, Alias::Private, Shared),
            ((GPA + 6 * K4) | bit, Alias::Shared, PrivateAccepted),
        ]
    );
    assert_eq!(seen.data, [0, 0, 1, 0, 1, 1, 0, 0], "the guest goes on");
    assert_eq!(seen.exits, [(0, true)]);
}

fn access_before_accept_is_caught_where_it_can_be(memory_model: MemoryModel) {
    let script = Script::new()
        .convert(GPA, 1, 0, M2, true)
        .convert(GPA, 1, 0, M2, false)
        .accept(GPA, 100, K4, 0)
        .fill(Alias::Private, GPA, 100, K4)
        .write(Alias::Private, GPA + 100 * K4, 1)
        .accept(GPA + 100 * K4, 412, K4, 0)
        .read(Alias::Private, GPA + 100 * K4)
        .check(Alias::Private, GPA, 512, K4);
    let seen = probe(memory_model).run(&[script]);
    match memory_model {
        MemoryModel::Alias => {
            assert_eq!(seen.touches, [(GPA + 100 * K4, Alias::Private, PrivatePending)]);
            let cleared = [1, 1, 100, 412, 0, 412, 100];
            assert_eq!(seen.data, cleared, "accept clears what was written before");
        }
        // `checks_off` says so.
        MemoryModel::GuestMemfd => {
            assert_eq!(seen.touches, []);
            assert_eq!(seen.data, [1, 1, 100, 412, 1, 411, 100]);
        }
    }
}

fn a_page_that_was_never_removed_keeps_its_contents_and_is_watched_all_the_same(
    memory_model: MemoryModel,
) {
    let probe = Probe { policy: "accept=already", ..probe(memory_model) };
    let script = Script::new()
        .fill(Alias::Private, GPA, 100, K4)
        .convert(GPA, 1, 0, M2, true)
        .fill(Alias::Shared, GPA, 512, K4)
        .read(Alias::Private, GPA + K4)
        .convert(GPA, 1, 0, M2 / 2, false)
        .check(Alias::Private, GPA, 256, K4)
        .convert(GPA, 1, 0, M2, false)
        .check(Alias::Private, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, true)
        .check(Alias::Shared, GPA, 512, K4);
    let seen = probe.run(&[script]);
    assert_eq!(seen.touches, [(GPA + K4, Alias::Private, Shared)]);
    // The page that was touched while it was shared is as it was, too.
    assert_eq!(seen.data, [1, 0, 1, 156, 100, 1, 412, 100, 1, 512, 0]);
}

fn a_run_can_stop_at_a_violation(memory_model: MemoryModel) {
    let probe = Probe { stop_at_touch: true, ..probe(memory_model) };
    let seen =
        probe.run(&[Script::new().read(Alias::Shared, GPA).read(Alias::Shared, GPA + K4).spin()]);
    assert_eq!(seen.touches, [(GPA | shared_bit(), Alias::Shared, PrivateAccepted)]);
    assert_eq!(seen.timeouts, 0);
    assert_eq!(seen.exits, []);
}

fn alternating_pages_of_2m_behave_and_are_watched(memory_model: MemoryModel) {
    let odd = GPA + K4;
    let script = Script::new()
        .fill(Alias::Private, GPA, 512, K4)
        .convert(GPA, 256, 2 * K4, K4, true)
        .fill(Alias::Shared, GPA, 256, 2 * K4)
        .check(Alias::Shared, GPA, 256, 2 * K4)
        .check(Alias::Private, odd, 256, 2 * K4)
        // Wrong both ways, in the midst of them.
        .read(Alias::Private, GPA + 100 * K4)
        .read(Alias::Shared, GPA + 101 * K4)
        .convert(GPA, 256, 2 * K4, K4, false)
        .accept(GPA, 256, 2 * K4, 0)
        .check(Alias::Private, GPA, 512, K4);
    let seen = probe(memory_model).run(&[script]);
    assert_eq!(
        seen.touches,
        [
            (GPA + 100 * K4, Alias::Private, Shared),
            ((GPA + 101 * K4) | shared_bit(), Alias::Shared, PrivateAccepted),
        ]
    );
    assert_eq!(seen.data, [256, 0, 256, 0, 256, 0, 0, 256, 256, 256, 256]);
}

fn alternating_pages_of_1g_do_not_run_out_of_mappings(memory_model: MemoryModel) {
    let pages: u64 = match memory_model {
        MemoryModel::Alias => 1 << 17,
        // No conversion registers anything, so that fewer show it.
        MemoryModel::GuestMemfd => 1 << 13,
    };
    let last = GPA + (pages * 2 - 2) * K4;
    let probe = Probe {
        memory: 2 << 30,
        timeout: std::time::Duration::from_secs(120),
        ..probe(memory_model)
    };
    let script = Script::new()
        .convert(GPA, pages, 2 * K4, K4, true)
        .fill(Alias::Shared, GPA, 1000, 2 * K4)
        .check(Alias::Shared, GPA, 1000, 2 * K4)
        .write(Alias::Shared, last, 1)
        .write(Alias::Private, last + K4, 1)
        .read(Alias::Private, last);
    let seen = probe.run(&[script]);
    assert_eq!(seen.data, [pages, 0, 1000, 0]);
    assert_eq!(seen.touches, [(last, Alias::Private, Shared)]);
}

fn memory_above_the_hole_has_both_aliases(memory_model: MemoryModel) {
    let high = (4 << 30) + M2;
    let probe = Probe { memory: (3 << 30) + (8 << 20), ..probe(memory_model) };
    let script = Script::new()
        .fill(Alias::Private, high, 512, K4)
        .check(Alias::Private, high, 512, K4)
        .convert(high, 1, 0, M2, true)
        .fill(Alias::Shared, high, 512, K4)
        .check(Alias::Shared, high, 512, K4)
        .read(Alias::Private, high + K4)
        // The hole, and what lies beyond memory, can be converted; nothing is behind it.
        .convert(3 << 30, 1, 0, M2, true)
        .convert(8 << 30, 1, 0, M2, true);
    let seen = probe.run(&[script]);
    assert_eq!(seen.data, [0, 512, 1, 0, 512, 0, 1, 1]);
    assert_eq!(seen.touches, [(high + K4, Alias::Private, Shared)]);
}

/// Each test for each memory model.
macro_rules! for_each_model {
    ($($needs:ident $name:ident,)*) => {
        vec![$(
            (
                concat!("alias::", stringify!($name)),
                Needs::$needs,
                (|| $name(MemoryModel::Alias)) as fn(),
            ),
            (
                concat!("guest_memfd::", stringify!($name)),
                Needs::GuestMemfd,
                (|| $name(MemoryModel::GuestMemfd)) as fn(),
            ),
        )*]
    };
}

fn main() -> std::process::ExitCode {
    harness(for_each_model![
        Kvm contents_are_lost_at_conversion_and_zero_after_accept,
        Kvm pages_in_the_target_state_keep_their_contents,
        Kvm a_page_alone_is_converted_alone,
        Kvm pages_can_be_shared_from_the_start,
        Userfaultfd the_wrong_alias_is_caught_with_its_gpa_in_both_directions,
        Userfaultfd access_before_accept_is_caught_where_it_can_be,
        Userfaultfd a_page_that_was_never_removed_keeps_its_contents_and_is_watched_all_the_same,
        Userfaultfd a_run_can_stop_at_a_violation,
        Userfaultfd alternating_pages_of_2m_behave_and_are_watched,
        Userfaultfd alternating_pages_of_1g_do_not_run_out_of_mappings,
        Userfaultfd memory_above_the_hole_has_both_aliases,
    ])
}
