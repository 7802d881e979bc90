//! The model against the kernel's code, line by line.

extern crate std;

use super::*;

const BIT: u64 = 1 << 47;
const M: u64 = 1 << 20;

const fn td(kernel: Kernel) -> Td {
    Td { kernel, shared_bit: BIT, address_bits: ADDRESS_BITS, exits: true }
}

fn refused(r12: u64, r13: u64) -> Option<Reply> {
    MapGpa::begin(td(Kernel::V7_2), r12, r13).err()
}

#[test]
fn the_entry_checks_answer_with_the_request_s_own_gpa() {
    let invalid = |r12| Some(Reply { status: status::INVALID_OPERAND, r11: r12 });
    let unaligned = |r12| Some(Reply { status: status::ALIGN_ERROR, r11: r12 });
    for (r12, r13, reply) in [
        (0x1000, 0x1000, None),
        (0x1000 | BIT, 2 * M, None),
        (BIT - 0x1000, 0x1000, None),
        (0x1000, 0, invalid(0x1000)),
        (0x1000, u64::MAX, invalid(0x1000)),
        (u64::MAX - 0xfff, 0x1000, invalid(u64::MAX - 0xfff)),
        (1 << 52, 0x1000, invalid(1 << 52)),
        ((1 << 52) - 0x1000, 0x2000, invalid((1 << 52) - 0x1000)),
        (BIT - 0x1000, 0x2000, invalid(BIT - 0x1000)),
        // Bits between GPAW and MAXPHYADDR are legal to KVM.
        (1 << 50, 0x1000, None),
        (0x1800, 0x1000, unaligned(0x1800)),
        (0x1000, 0x1001, unaligned(0x1000)),
        // What is illegal and unaligned is illegal.
        (BIT - 0x800, 0x1000, invalid(BIT - 0x800)),
    ] {
        assert_eq!(refused(r12, r13), reply, "{r12:#x}+{r13:#x}");
    }
}

#[test]
fn without_the_exit_no_request_is_looked_at() {
    let td = Td { exits: false, ..td(Kernel::V6_16) };
    let reply = Reply { status: status::SUBFUNC_UNSUPPORTED, r11: 0x1800 };
    assert_eq!(MapGpa::begin(td, 0x1800, 0), Err(reply));
}

#[test]
fn without_cpuid_no_shared_gpa_is_legal() {
    let td = Td { address_bits: 36, ..td(Kernel::V6_16) };
    assert!(MapGpa::begin(td, 0x1000, 0x1000).is_ok());
    assert!(MapGpa::begin(td, 0x1000 | BIT, 0x1000).is_err());
}

#[test]
fn chunks_are_counted_from_the_start() {
    let mut call = MapGpa::begin(td(Kernel::V6_16), (M + 0x1000) | BIT, 5 * M).expect("legal");
    let mut exits = vec_of(call.exit());
    while let Step::Exit(exit) = call.complete(0, false) {
        exits.push(exit);
    }
    let exit = |gpa, pages| Exit { gpa, pages, private: false };
    let expected = [exit(M + 0x1000, 512), exit(3 * M + 0x1000, 512), exit(5 * M + 0x1000, 256)];
    assert_eq!(exits.as_slice(), &expected);
}

#[test]
fn success_leaves_r11_as_the_guest_passed_it() {
    let mut call = MapGpa::begin(td(Kernel::V7_2), 0, 0x1000).expect("legal");
    assert!(call.exit().private);
    let reply = Reply { status: 0, r11: 0x10001 };
    // An event counts between chunks only.
    assert_eq!(call.complete(0, true), Step::Reply(reply));
}

#[test]
fn a_pending_event_between_chunks_is_retry_at_the_next() {
    for kernel in Kernel::ALL {
        let mut call = MapGpa::begin(td(kernel), BIT, 4 * M).expect("legal");
        let reply = Reply { status: status::RETRY, r11: BIT + 2 * M };
        assert_eq!(call.complete(0, true), Step::Reply(reply));
    }
}

#[test]
fn what_user_space_says_of_a_chunk() {
    let second = |kernel, ret| {
        let mut call = MapGpa::begin(td(kernel), BIT, 4 * M).expect("legal");
        assert!(matches!(call.complete(0, false), Step::Exit(_)));
        call.complete(ret, true)
    };
    let reply = |status| Step::Reply(Reply { status, r11: BIT + 2 * M });
    for (ret, old, new) in [
        (EAGAIN, reply(status::INVALID_OPERAND), reply(status::RETRY)),
        (EINVAL, reply(status::INVALID_OPERAND), reply(status::INVALID_OPERAND)),
        (1, reply(status::INVALID_OPERAND), Step::RunFails),
        // The negative errno is not what the kernel looks for.
        (EAGAIN.wrapping_neg(), reply(status::INVALID_OPERAND), Step::RunFails),
    ] {
        assert_eq!(second(Kernel::V6_16, ret), old, "{ret:#x} on 6.16");
        assert_eq!(second(Kernel::V7_2, ret), new, "{ret:#x} on 7.2");
    }
}

#[test]
fn releases() {
    for (release, kernel) in [
        ((6, 15), None),
        ((6, 16), Some(Kernel::V6_16)),
        ((6, 19), Some(Kernel::V6_16)),
        ((7, 0), Some(Kernel::V6_16)),
        ((7, 1), Some(Kernel::V6_16)),
        ((7, 2), Some(Kernel::V7_2)),
        ((8, 0), Some(Kernel::V7_2)),
        ((5, 19), None),
    ] {
        assert_eq!(Kernel::of_release(release.0, release.1), kernel, "{release:?}");
    }
}

fn vec_of(first: Exit) -> std::vec::Vec<Exit> {
    std::vec![first]
}
