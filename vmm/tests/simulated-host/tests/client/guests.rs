//! Tests that run a guest.

use kvm_bindings::{KVM_EXIT_HYPERCALL, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT};
use libc::{EFAULT, EINVAL, EIO};

use super::guest::{END, EVENT, NMI, Op, SHARED_VA, VE};
use super::td::Td;
use super::uapi::EXIT_TDX;
use super::{Needs, Test};

const OLD: &[(&str, &str)] = &[("MAPGPA_SIM_KERNEL", "6.16")];
const BIT: u64 = 1 << 47;
/// A range of RAM, 2 MiB aligned.
const RANGE: u64 = 4 << 20;
const MIB: u64 = 1 << 20;
/// High halves of statuses of accept.
const ALREADY: u32 = 0x0b0a;
const MISMATCH: u32 = 0xc000_0b0b;

pub const TESTS: &[Test] = &[
    ("the initial state", Needs::Guest, &[], initial_state),
    ("MapGPA in chunks", Needs::Guest, &[], chunks),
    ("MapGPA on 7.2", Needs::Guest, &[], map_gpa_7_2),
    ("MapGPA on 6.16", Needs::Guest, OLD, map_gpa_6_16),
    ("a pending interrupt", Needs::Guest, OLD, pending_interrupt),
    ("a pending NMI", Needs::Guest, OLD, pending_nmi),
    ("an interrupt without an APIC", Needs::Guest, OLD, no_apic),
    ("conversion and accept", Needs::Guest, &[], conversion),
    ("accepts of 2 MiB", Needs::Guest, &[], accept_2m),
    ("a shared page by its private alias", Needs::Guest, &[], private_alias),
    ("a private page by its shared alias", Needs::Guest, &[], shared_alias),
    ("a fault comes again", Needs::Restart, &[], again),
    ("a pending page", Needs::Guest, &[], pending_page),
    ("a pending page with #VE", Needs::Guest, &[], pending_page_ve),
    ("accept of a shared page", Needs::Guest, &[], accept_shared),
    ("contents", Needs::Guest, &[], contents),
    ("instructions that raise #VE", Needs::Guest, &[], ve),
    ("other TDVMCALLs", Needs::Guest, &[], others),
    ("an early end", Needs::Guest, &[], shutdown),
];

/// What a TDCALL is reported as.
fn tdcall(rax: u64, r10: u64, r11: u64) -> [u32; 6] {
    let words = [rax, r10, r11].map(|value| [value as u32, (value >> 32) as u32]);
    words.concat().try_into().expect("six words")
}

/// Runs a script to its end, all conversions done at once.
fn done(script: &[Op]) -> Vec<u32> {
    let mut td = Td::build(script).expect("a TD");
    while let exit @ 1.. = td.run().expect("KVM_RUN") {
        assert_eq!(exit, KVM_EXIT_HYPERCALL);
        convert(&td);
    }
    let reports = std::mem::take(&mut td.reports);
    td.close();
    reports
}

/// Does what a KVM_EXIT_HYPERCALL asks for.
fn convert(td: &Td) {
    let [nr, gpa, pages, attributes] = [0, 1, 2, 3].map(|index| td.word(index));
    assert_eq!(nr, 12);
    td.attributes(gpa, pages * 4096, attributes == 16).expect("attributes");
    td.answer(0);
}

/// A guest runs at all.
pub fn a_guest_reports() {
    let mut td = Td::build(&[]).unwrap_or_else(|failed| panic!("{failed:?}"));
    let result = td.run();
    if (result, td.reports.as_slice()) != (Ok(0), &[END]) {
        eprintln!("missing: this KVM does not run the guest: {result:?} {:x?}", td.reports);
        std::process::exit(1);
    }
    td.close();
}

fn initial_state() {
    // TDG.VP.INFO with its outputs where the script reports them: RAX, R10, R11.
    let mut expected = tdcall(0, 1, 0).to_vec();
    expected.push(END);
    assert_eq!(done(&[Op::Tdcall(1, 0, [0; 6])]), expected);
}

fn chunks() {
    let start = RANGE + 0x1000;
    let mut td = Td::build(&[Op::map_gpa(BIT | start, 5 * MIB)]).expect("a TD");
    for (gpa, pages) in [(start, 512), (start + 2 * MIB, 512), (start + 4 * MIB, 256)] {
        assert_eq!(td.run(), Ok(KVM_EXIT_HYPERCALL));
        let words = [0, 1, 2, 3, 7].map(|index| td.word(index));
        assert_eq!(words, [12, gpa, pages, 0, 0], "nr, GPA, pages, attributes, ret");
        convert(&td);
    }
    assert_eq!(td.run(), Ok(0));
    assert_eq!(td.reports[..6], tdcall(0, 0, 0x10001));
    td.close();
}

/// Answers the `at`th chunk, from 0, of a call of 6 MiB with `ret`; what the guest sees.
fn answered(at: u64, ret: u64) -> Result<[u32; 6], i32> {
    let mut td = Td::build(&[Op::map_gpa(BIT | RANGE, 6 * MIB)]).expect("a TD");
    for _ in 0..at {
        assert_eq!(td.run(), Ok(KVM_EXIT_HYPERCALL));
        convert(&td);
    }
    assert_eq!(td.run(), Ok(KVM_EXIT_HYPERCALL));
    td.answer(ret);
    let result = td.run().map(|exit| {
        assert_eq!(exit, 0);
        td.reports[..6].try_into().expect("six words")
    });
    td.close();
    result
}

fn map_gpa_7_2() {
    let (again, invalid) = (libc::EAGAIN as u64, EINVAL as u64);
    assert_eq!(answered(0, again), Ok(tdcall(0, 1, BIT | RANGE)));
    assert_eq!(answered(1, again), Ok(tdcall(0, 1, BIT | (RANGE + 2 * MIB))));
    assert_eq!(answered(1, invalid), Ok(tdcall(0, 1 << 63, BIT | (RANGE + 2 * MIB))));
    assert_eq!(answered(0, 1), Err(EINVAL));
    assert_eq!(answered(0, (-libc::EAGAIN) as u64), Err(EINVAL));
    for (gpa, size, status) in [
        (BIT | RANGE, 0, 1u64 << 63),
        (BIT | RANGE, !0, 1 << 63),
        (RANGE, BIT, 1 << 63),
        (RANGE + 1, 0x1000, 1 << 63 | 2),
        (RANGE, 0x1001, 1 << 63 | 2),
        (1 << 52, 0x1000, 1 << 63),
    ] {
        assert_eq!(
            done(&[Op::map_gpa(gpa, size)])[..6],
            tdcall(0, status, gpa),
            "{gpa:#x} {size:#x}"
        );
    }
}

fn map_gpa_6_16() {
    for ret in [1, libc::EAGAIN as u64, EINVAL as u64] {
        let expected = tdcall(0, 1 << 63, BIT | (RANGE + 2 * MIB));
        assert_eq!(answered(1, ret), Ok(expected), "{ret}");
    }
}

/// SVR with the APIC enabled in software, through the VMM as it is not virtualized.
const ENABLE_APIC: Op = Op::vmcall(32, [0x80f, 0x1ff, 0, 0]);

/// Has an event waiting after the first chunk of two; what the guest reports.
fn with_event(script: &[Op], event: impl Fn(&Td)) -> Vec<u32> {
    let mut td = Td::build(script).expect("a TD");
    let mut first = true;
    while let exit @ 1.. = td.run().expect("KVM_RUN") {
        assert_eq!(exit, KVM_EXIT_HYPERCALL);
        convert(&td);
        if std::mem::take(&mut first) {
            event(&td);
        }
    }
    let reports = std::mem::take(&mut td.reports);
    td.close();
    reports
}

fn pending_interrupt() {
    let script = [
        ENABLE_APIC,
        Op::map_gpa(BIT | RANGE, 4 * MIB),
        Op::Interrupts,
        Op::map_gpa(BIT | RANGE, 4 * MIB),
    ];
    let reports = with_event(&script, |td| assert_eq!(td.signal_msi(0x40), Ok(1)));
    let mut expected = tdcall(0, 0, 32).to_vec();
    expected.extend(tdcall(0, 1, BIT | (RANGE + 2 * MIB)));
    expected.push(EVENT);
    expected.extend(tdcall(0, 0, 0x10001));
    expected.push(END);
    assert_eq!(reports, expected);
}

fn pending_nmi() {
    let reports = with_event(&[Op::map_gpa(BIT | RANGE, 4 * MIB)], |td| {
        td.nmi().expect("KVM_NMI");
    });
    let mut expected = vec![NMI];
    expected.extend(tdcall(0, 1, BIT | (RANGE + 2 * MIB)));
    expected.push(END);
    assert_eq!(reports, expected);
}

fn no_apic() {
    // The guest has not enabled its APIC: the message is dropped, and nothing is pending.
    let reports = with_event(&[Op::map_gpa(BIT | RANGE, 4 * MIB)], |td| {
        assert_ne!(td.signal_msi(0x40), Ok(1));
    });
    assert_eq!(reports[..6], tdcall(0, 0, 0x10001));
}

fn conversion() {
    let (private, shared) = (RANGE, SHARED_VA + RANGE);
    let reports = done(&[
        Op::accept(RANGE, 0),
        Op::accept(RANGE, 0),
        Op::Write(private, 0x5a),
        Op::Read(private),
        Op::map_gpa(BIT | RANGE, 0x1000),
        Op::Write(shared, 0x77),
        Op::Read(shared),
        Op::map_gpa(RANGE, 0x1000),
        Op::accept(RANGE, 0),
        Op::Read(private),
    ]);
    let mut expected = tdcall(0, 0, 0).to_vec();
    expected.extend([0, ALREADY, 0, 0, 0, 0, 0x5a]);
    expected.extend(tdcall(0, 0, 0x10001));
    expected.push(0x77);
    expected.extend(tdcall(0, 0, 0x10001));
    expected.extend(tdcall(0, 0, 0));
    expected.extend([0, END]);
    assert_eq!(reports, expected, "accepted pages are zero");
}

fn accept_2m() {
    let reports = done(&[
        Op::accept(RANGE, 1),
        Op::accept(RANGE + 0x1000, 1),
        Op::accept(RANGE, 2),
        Op::accept(BIT | RANGE, 0),
    ]);
    assert_eq!(reports[..2], [1, MISMATCH], "KVM maps pages of 4 KiB");
    for at in [6, 12, 18] {
        assert_eq!(reports[at..at + 2], [1, 0xc000_0100], "TDX_OPERAND_INVALID, RCX");
    }
}

/// Runs a script that ends in a memory fault; its flags and GPA.
fn faults(script: &[Op]) -> (u64, u64) {
    let mut td = Td::build(script).expect("a TD");
    let errno = loop {
        match td.run() {
            Ok(KVM_EXIT_HYPERCALL) => convert(&td),
            Ok(exit) => panic!("exit {exit}, {:x?}", td.reports),
            Err(errno) => break errno,
        }
    };
    assert_eq!(errno, EFAULT);
    // SAFETY: the vCPU is not running.
    assert_eq!(unsafe { (*td.run).exit_reason }, kvm_bindings::KVM_EXIT_MEMORY_FAULT);
    assert_eq!(td.word(2), 4096);
    let fault = (td.word(0), td.word(1));
    td.close();
    fault
}

fn private_alias() {
    let script = [Op::accept(RANGE, 0), Op::map_gpa(BIT | RANGE, 0x2000), Op::Read(RANGE + 0x1234)];
    assert_eq!(faults(&script), (8, RANGE + 0x1000));
}

fn shared_alias() {
    // Memory of the VMM's is there, as it may be, but the attributes say private.
    let script = [Op::accept(RANGE, 0), Op::Write(SHARED_VA + RANGE + 8, 1)];
    assert_eq!(faults(&script), (0, RANGE));
}

/// The instruction that met a memory fault is executed again, until the VMM does something about it.
pub fn again() {
    let mut td = Td::build(&[Op::Read(SHARED_VA + RANGE)]).expect("a TD");
    let runs = [td.run(), td.run(), td.run()];
    if runs != [Err(EFAULT); 3] {
        eprintln!(
            "missing: this KVM reads guest memory itself, and cannot be interrupted: {runs:?}"
        );
        std::process::exit(1);
    }
    td.attributes(RANGE, 4096, false).expect("attributes");
    assert_eq!(td.run(), Ok(0));
    assert_eq!(td.reports, [0, END]);
    td.close();
}

fn accept_shared() {
    let script = [Op::map_gpa(BIT | RANGE, 0x1000), Op::accept(RANGE, 0)];
    assert_eq!(faults(&script), (8, RANGE));
}

fn pending_page() {
    for script in [vec![Op::Read(RANGE)], vec![Op::map_gpa(RANGE, 0x1000), Op::Write(RANGE, 1)]] {
        let mut td = Td::build(&script).expect("a TD");
        let errno = loop {
            match td.run() {
                Ok(KVM_EXIT_HYPERCALL) => convert(&td),
                other => break other.expect_err("an end"),
            }
        };
        assert_eq!(errno, EIO);
        assert_eq!(td.enter(), Err(EIO), "the TD is dead");
        assert_eq!(td.attributes(0, 4096, false), Err(EIO));
        td.close();
    }
}

fn pending_page_ve() {
    let td = Td::build_with(&[Op::Read(RANGE)], |params| params.attributes = 0).expect("a TD");
    // The guest's handler goes on at the same instruction for ever: the second time the page is
    // pending still.
    assert_eq!(td.enter(), Ok(0), "the report of a #VE");
    td.close();
}

fn contents() {
    // What the host has in shared memory the guest sees, and the other way round.
    let script = [
        Op::map_gpa(BIT | RANGE, 0x1000),
        Op::Read(SHARED_VA + RANGE + 5),
        Op::Write(SHARED_VA + RANGE + 6, 0x42),
    ];
    let mut td = Td::build(&script).expect("a TD");
    let at = |td: &Td, offset: u64| td.ram.wrapping_add((RANGE + offset) as usize);
    assert_eq!(td.run(), Ok(KVM_EXIT_HYPERCALL));
    convert(&td);
    // SAFETY: within the TD's memory.
    unsafe { at(&td, 5).write_volatile(0x99) };
    assert_eq!(td.run(), Ok(0));
    assert_eq!(td.reports[6..], [0x99, END]);
    // SAFETY: as above.
    assert_eq!(unsafe { at(&td, 6).read_volatile() }, 0x42);
    // SAFETY: as above.
    unsafe { libc::madvise(at(&td, 0).cast(), 4096, libc::MADV_DONTNEED) };
    // SAFETY: as above.
    assert_eq!(unsafe { at(&td, 6).read_volatile() }, 0, "discarded");
    td.close();
}

fn ve() {
    let script = [
        Op::PortWrite,
        // LME cleared; an MSR that the VMM emulates; and no #VE: EFER as it is.
        Op::Wrmsr(0xc000_0080, 0x800),
        Op::Wrmsr(0x1a0, 0),
        Op::Wrmsr(0xc000_0080, 0xd01),
        Op::Tdcall(3, 0, [0; 6]),
    ];
    let reports = done(&script);
    let mut expected = vec![VE | 30, VE | 32, VE | 32, 0, 0xc000_0704, 0, 0, 0, 0];
    expected.push(END);
    assert_eq!(reports, expected);
}

fn others() {
    let script = [
        Op::vmcall(99, [0; 4]),                           // unknown
        Op::vmcall(0x10000, [0, 1, 1, 1]),                // GetTdVmCallInfo
        Op::Tdcall(0, 0xfc00, [1, 0, 0, 0, 0, 0]),        // not a GHCI call
        Op::Tdcall(0, 0xfc01, [0; 6]),                    // RAX cannot be passed
        Op::vmcall(30, [3, 1, 0x80, 0]),                  // 3 bytes
        Op::vmcall(48, [4, 0, 0xfee0_0000, 0]),           // MMIO at a private address
        Op::vmcall(31, [0x808, 0, 0, 0]),                 // an MSR that the module virtualizes
        Op::vmcall(48, [4, 0, BIT | 0xe000_0000, 0]),     // MMIO
        Op::vmcall(0x10002, [BIT | RANGE, 0x1000, 0, 0]), // GetQuote
        Op::vmcall(0x10003, [7, 0, 0, 0]),                // ReportFatalError
    ];
    let mut td = Td::build(&script).expect("a TD");
    assert_eq!(td.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!((td.word(0), td.word(2) as u32), (0xe000_0000, 4));
    td.set_word(1, 0x1122_3344);
    assert_eq!(td.run(), Ok(EXIT_TDX));
    let quote = [0, 1, 2, 3, 4].map(|index| td.word(index));
    assert_eq!(quote, [0, 0x10002, 1 << 63 | 3, RANGE, 0x1000]);
    td.set_word(2, 1);
    assert_eq!(td.run(), Ok(KVM_EXIT_SYSTEM_EVENT));
    assert_eq!(td.word(0), 7 | 16 << 32, "TDX_FATAL");
    assert_eq!([td.word(12), td.word(13)], [0x10003, 7], "R11, R12");
    assert_eq!(td.run(), Ok(0));
    let reports: Vec<_> = td.reports.chunks_exact(6).map(<[u32]>::to_vec).collect();
    let expected = [
        tdcall(0, 1 << 63 | 3, 99),
        tdcall(0, 0, 0),
        tdcall(0, (-1000i64).cast_unsigned(), 0),
        tdcall(0xc000_0100_0000_0001, 0, 0),
        tdcall(0, 1 << 63, 30),
        tdcall(0, 1 << 63, 48),
        tdcall(0, 1 << 63, 31),
        tdcall(0, 0, 0x1122_3344),
        tdcall(0, 1, 0x10002),
        tdcall(0, 0, 0x10003),
    ];
    assert_eq!(reports, expected.map(|words| words.to_vec()));
    td.close();
}

fn shutdown() {
    // A touch beyond the page tables, with no handler for it.
    let mut td = Td::build(&[Op::Read(2 << 30)]).expect("a TD");
    assert_eq!(td.run(), Ok(KVM_EXIT_SHUTDOWN));
    td.close();
}
