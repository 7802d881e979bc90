//! A vCPU of a TD: TDCALL and memory access as instructions.

use core::arch::naked_asm;
use core::mem::offset_of;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use mapgpa_abi::Alias;
use mapgpa_abi::layout::SHARED_VA;
use mapgpa_abi::tdcall::{Regs, leaf, sub};

use crate::{Td, report};

/// The vCPU that the code runs on.
#[derive(Debug)]
pub struct BareTd {
    vcpu: u64,
    /// Replies to MapGPA are said on the channel.
    pub(super) marks: bool,
}

impl BareTd {
    /// The handle of vCPU `vcpu`, for code on that vCPU.
    pub(super) const fn new(vcpu: u64) -> Self {
        Self { vcpu, marks: false }
    }

    /// Index of this vCPU, from 0.
    #[must_use]
    pub const fn vcpu(&self) -> u64 {
        self.vcpu
    }
}

impl Td for BareTd {
    fn tdcall(&mut self, regs: &mut Regs) {
        let map_gpa = (regs.rax, regs.r10, regs.r11) == (leaf::VP_VMCALL, 0, sub::MAP_GPA);
        // SAFETY: `regs` is exclusive; `tdcall` saves what its ABI demands. What a TDCALL does to
        // memory (conversion, accept) concerns pages that no Rust object lives in.
        unsafe { tdcall(regs) }
        if self.marks && map_gpa {
            report::reply(self, regs.r10);
        }
    }

    fn read(&mut self, alias: Alias, gpa: u64) -> u64 {
        // SAFETY: both aliases of all memory are mapped; a GPA outside RAM crashes the guest, which
        // is reported. Volatile, as the host can change shared memory at any time.
        unsafe { with_exposed_provenance::<u64>(address(alias, gpa)).read_volatile() }
    }

    fn write(&mut self, alias: Alias, gpa: u64, value: u64) {
        // SAFETY: as in `read`; ranges that guest tests convert are apart from the image.
        unsafe { with_exposed_provenance_mut::<u64>(address(alias, gpa)).write_volatile(value) }
    }

    fn stop(&mut self) -> ! {
        loop {
            self.tdcall(&mut Regs::vmcall(sub::HLT, 1, 0));
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits here")]
const fn address(alias: Alias, gpa: u64) -> usize {
    match alias {
        Alias::Private => gpa as usize,
        Alias::Shared => (SHARED_VA + gpa) as usize,
    }
}

/// TDCALL with all of `regs` as inputs, and as outputs afterwards.
///
/// A function of its own, as inline assembly can name neither RBX nor all the others at once.
#[unsafe(naked)]
unsafe extern "sysv64" fn tdcall(regs: *mut Regs) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "mov rax, [rdi + {rax}]",
        "mov rbx, [rdi + {rbx}]",
        "mov rcx, [rdi + {rcx}]",
        "mov rdx, [rdi + {rdx}]",
        "mov rsi, [rdi + {rsi}]",
        "mov r8, [rdi + {r8}]",
        "mov r9, [rdi + {r9}]",
        "mov r10, [rdi + {r10}]",
        "mov r11, [rdi + {r11}]",
        "mov r12, [rdi + {r12}]",
        "mov r13, [rdi + {r13}]",
        "mov r14, [rdi + {r14}]",
        "mov r15, [rdi + {r15}]",
        "mov rdi, [rdi + {rdi}]",
        ".byte 0x66, 0x0f, 0x01, 0xcc", // abi::tdcall::INSTRUCTION
        "xchg rdi, [rsp]",
        "mov [rdi + {rax}], rax",
        "mov [rdi + {rbx}], rbx",
        "mov [rdi + {rcx}], rcx",
        "mov [rdi + {rdx}], rdx",
        "mov [rdi + {rsi}], rsi",
        "mov [rdi + {r8}], r8",
        "mov [rdi + {r9}], r9",
        "mov [rdi + {r10}], r10",
        "mov [rdi + {r11}], r11",
        "mov [rdi + {r12}], r12",
        "mov [rdi + {r13}], r13",
        "mov [rdi + {r14}], r14",
        "mov [rdi + {r15}], r15",
        "pop rax",
        "mov [rdi + {rdi}], rax",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        rax = const offset_of!(Regs, rax),
        rbx = const offset_of!(Regs, rbx),
        rcx = const offset_of!(Regs, rcx),
        rdx = const offset_of!(Regs, rdx),
        rsi = const offset_of!(Regs, rsi),
        rdi = const offset_of!(Regs, rdi),
        r8 = const offset_of!(Regs, r8),
        r9 = const offset_of!(Regs, r9),
        r10 = const offset_of!(Regs, r10),
        r11 = const offset_of!(Regs, r11),
        r12 = const offset_of!(Regs, r12),
        r13 = const offset_of!(Regs, r13),
        r14 = const offset_of!(Regs, r14),
        r15 = const offset_of!(Regs, r15),
    )
}
