//! Backend `emulated`: how guests end that do not end well.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

mod common;
mod harness;

use std::time::{Duration, Instant};

use common::{GPA, K4, Probe, Script, shared_bit};
use harness::{Needs, harness};
use mapgpa_abi::Alias;
use mapgpa_abi::tdcall::{module, status};

const SHORT: Duration = Duration::from_millis(200);

/// A static ELF of one page of `code` at 1 MiB, without a note.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    let size = code.len() as u64;
    for word in [0x10_0000, 64, 0, 0x0038_0040_0000_0000, 1] {
        file.extend_from_slice(&u64::to_le_bytes(word));
    }
    // PT_LOAD, read and execute; offset, both addresses, both sizes, alignment.
    file.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [120, 0x10_0000, 0x10_0000, size, size, 1] {
        file.extend_from_slice(&u64::to_le_bytes(word));
    }
    file.extend_from_slice(code);
    file
}

fn an_exception_is_a_crash_with_registers() {
    let seen = Probe::default().run(&[Script::new().ud2()]);
    assert_eq!(seen.crashes.len(), 1, "{seen:?}");
    assert!(seen.crashes[0].contains("#UD") && seen.crashes[0].contains("rip=0x10"), "{seen:?}");
}

fn a_stack_overflow_is_a_crash_with_registers() {
    let seen = Probe::default().run(&[Script::new().overflow()]);
    assert!(seen.crashes[0].contains("#PF") && seen.crashes[0].contains("rip=0x10"), "{seen:?}");
}

fn an_exception_without_entry_points_is_a_triple_fault() {
    let image = elf(&[0x0f, 0x0b]);
    let seen = Probe { image, ..Probe::default() }.run(&[Script::new()]);
    assert!(seen.crashes[0].contains("triple fault, at rip=0x100000"), "{seen:?}");
}

fn what_is_beyond_memory_crashes_with_its_gpa() {
    let beyond = (32 << 20) + 0x18;
    for (alias, bit) in [(Alias::Private, 0), (Alias::Shared, shared_bit())] {
        let seen = Probe::default().run(&[Script::new().write(alias, beyond, 1)]);
        let gpa = format!("write of 8 bytes at GPA {:#x}", beyond | bit);
        assert!(seen.crashes[0].contains(&gpa), "{seen:?}");
    }
    let seen = Probe::default().run(&[Script::new().read(Alias::Private, 0)]);
    assert!(seen.crashes[0].contains("#PF"), "{seen:?}");
}

fn a_jump_beyond_memory_is_a_crash() {
    // mov eax, 0x3000000; jmp rax
    let image = elf(&[0xb8, 0, 0, 0, 3, 0xff, 0xe0]);
    let seen = Probe { image, ..Probe::default() }.run(&[Script::new()]);
    assert!(seen.crashes[0].contains("nothing is, at rip=0x3000000"), "{seen:?}");
}

fn a_guest_that_never_exits_times_out() {
    let begun = Instant::now();
    let seen = Probe { timeout: SHORT, ..Probe::default() }.run(&[Script::new().spin()]);
    assert_eq!(seen.timeouts, 1);
    assert!((SHORT..SHORT + Duration::from_secs(2)).contains(&begun.elapsed()));
}

fn vcpus_that_wait_for_one_that_never_comes_time_out() {
    let scripts = [Script::new().barrier(), Script::new().spin(), Script::new().barrier()];
    let seen = Probe { timeout: SHORT, ..Probe::default() }.run(&scripts);
    assert_eq!(seen.timeouts, 1);
}

fn a_flood_of_exits_times_out() {
    let seen = Probe { timeout: SHORT, ..Probe::default() }.run(&[Script::new().out(0x80, 0)]);
    assert_eq!(seen.timeouts, 1);
    assert_eq!(seen.odd.len(), 1, "told once: {:?}", seen.odd);
}

fn a_vcpu_that_crashes_ends_the_others() {
    let begun = Instant::now();
    let seen =
        Probe::default().run(&[Script::new().spin(), Script::new().ud2(), Script::new().barrier()]);
    assert_eq!((seen.crashes.len(), seen.timeouts), (1, 0));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

fn vcpus_meet_and_convert_side_by_side() {
    let part = |vcpu: u64| {
        let gpa = GPA + vcpu * 64 * K4;
        Script::new()
            .convert(gpa, 64, K4, K4, true)
            .barrier()
            .fill(Alias::Shared, gpa, 64, K4)
            .check(Alias::Shared, gpa, 64, K4)
            .barrier()
            .convert(gpa, 64, K4, K4, false)
            .accept(gpa, 64, K4, 0)
    };
    let seen = Probe::default().run(&[part(0), part(1), part(2), part(3)]);
    assert_eq!(seen.exits.len(), 4);
    assert_eq!(seen.touches, []);
    assert_eq!(seen.calls.len(), 4 * 128);
    assert_eq!(seen.data.iter().filter(|value| **value == 64).count(), 4 * 4);
}

fn registers_outside_the_mask_are_neither_read_nor_written() {
    let bit = shared_bit();
    // R10 to R13 passed, but not R12: MapGPA of GPA 0. Then without R10 and R11: no sub-function.
    let script = Script::new()
        .tdcall([0, 1, 0x2c00, 3, 4, 5, 6, 7, 0, 0x10001, GPA | bit, K4, 12, 13])
        .tdcall([0, 0, 0xf000, 0, 0, 0, 0, 0, 77, 78, GPA | bit, K4, 0, 0])
        .tdcall([0, 0, 0xfc10, 0, 0, 0, 0, 0, 0, 0x10001, GPA | bit, K4, 0, 0])
        .map_gpa(GPA | bit, K4);
    let seen = Probe::default().run(&[script]);
    let regs: Vec<_> = seen.data.chunks(14).collect();
    assert_eq!(seen.calls[0].raw_gpa, 0);
    assert_eq!(regs[0][1], 1, "RBX is as it was");
    assert_eq!(regs[0][10..], [GPA | bit, K4, 12, 13]);
    assert_eq!(regs[1][8..10], [77, 78], "not passed, not written");
    assert_eq!(regs[2][0] & module::STATUS_MASK, module::OPERAND_INVALID, "RSP cannot be passed");
    assert_eq!((regs[3][0], regs[3][8]), (0, status::SUCCESS));
}

fn images_that_cannot_run_are_refused() {
    let good = elf(&[0x0f, 0x0b]);
    let mut machine = good.clone();
    machine[18] = 3;
    let mut pie = good.clone();
    pie[16] = 3;
    let mut entry = good.clone();
    entry[24] = 0xff;
    let mut low = good.clone();
    low[64 + 16 + 2] = 0;
    // An empty segment may lie anywhere; the entry point is in none then.
    let mut empty = low.clone();
    empty[64 + 32] = 0;
    empty[64 + 40] = 0;
    let truncated = good[..121].to_vec();
    let expected = [
        (machine, "another machine"),
        (pie, "position-independent"),
        (entry, "entry point 0x1000ff"),
        (low, "a segment of 2 bytes at 0x0"),
        (empty, "entry point 0x100000"),
        (truncated, "shorter"),
        (good[..40].to_vec(), "not a usable ELF file"),
        (Vec::new(), "not a usable ELF file"),
    ];
    for (image, text) in expected {
        let error = Probe { image, ..Probe::default() }.try_run(&[Script::new()]).unwrap_err();
        assert!(error.is_bad_image());
        assert!(error.to_string().contains(text), "{error}");
    }
}

fn main() -> std::process::ExitCode {
    harness(vec![
        (
            "an_exception_is_a_crash_with_registers",
            Needs::Kvm,
            an_exception_is_a_crash_with_registers,
        ),
        (
            "a_stack_overflow_is_a_crash_with_registers",
            Needs::Kvm,
            a_stack_overflow_is_a_crash_with_registers,
        ),
        (
            "an_exception_without_entry_points_is_a_triple_fault",
            Needs::Kvm,
            an_exception_without_entry_points_is_a_triple_fault,
        ),
        (
            "what_is_beyond_memory_crashes_with_its_gpa",
            Needs::Kvm,
            what_is_beyond_memory_crashes_with_its_gpa,
        ),
        ("a_jump_beyond_memory_is_a_crash", Needs::Kvm, a_jump_beyond_memory_is_a_crash),
        ("a_guest_that_never_exits_times_out", Needs::Kvm, a_guest_that_never_exits_times_out),
        (
            "vcpus_that_wait_for_one_that_never_comes_time_out",
            Needs::Kvm,
            vcpus_that_wait_for_one_that_never_comes_time_out,
        ),
        ("a_flood_of_exits_times_out", Needs::Kvm, a_flood_of_exits_times_out),
        ("a_vcpu_that_crashes_ends_the_others", Needs::Kvm, a_vcpu_that_crashes_ends_the_others),
        ("vcpus_meet_and_convert_side_by_side", Needs::Kvm, vcpus_meet_and_convert_side_by_side),
        (
            "registers_outside_the_mask_are_neither_read_nor_written",
            Needs::Kvm,
            registers_outside_the_mask_are_neither_read_nor_written,
        ),
        ("images_that_cannot_run_are_refused", Needs::Kvm, images_that_cannot_run_are_refused),
    ])
}
