//! TDCALL: the leaves that the TDX module answers, and the TDVMCALLs that KVM answers or passes to user
//! space.
//!
//! Sources: `intel/tdx-module`, src/td_dispatcher (TDG.VP.INFO, TDG.MEM.PAGE.ACCEPT, TDG.VP.VMCALL,
//! TDG.VP.VEINFO.GET); Linux, arch/x86/kvm/vmx/tdx.c (`handle_tdvmcall`, `tdx_emulate_*` and their
//! `tdx_complete_*`); GHCI.

use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_SYSTEM_EVENT, kvm_regs,
    kvm_run,
};
use mapgpa_abi::tdcall::{leaf, level, module, status, sub};
use mapgpa_abi::{Alias, PAGE_SIZE, PAGE_SIZE_2M};

use crate::memory::Sept;
use crate::raw::Sys;
use crate::run::{Next, Pending, memory_fault};
use crate::td::lock;
use crate::uapi::{EXIT_TDX, SYSTEM_EVENT_TDX_FATAL};
use crate::vcpu::{Inner, Vcpu};
use crate::{cpuid, map_gpa};

/// Where the data of a KVM_EXIT_IO are in `struct kvm_run`: the second page, as KVM has it.
const IO_DATA: u64 = PAGE_SIZE;
/// TDX_NO_VALID_VE_INFO.
const NO_VE_INFO: u64 = 0xc000_0704_0000_0000;
/// KVM_ENOSYS, as R10 of a hypercall that KVM does not know.
const ENOSYS: u64 = (-1000i64).cast_unsigned();
/// mp_state of a vCPU that waits for an event.
const HALTED: u32 = 3;

/// Answers a TDCALL of the guest's.
pub(crate) fn handle(
    vcpu: &Vcpu,
    inner: &mut Inner,
    shown: &mut kvm_run,
    mut regs: kvm_regs,
) -> Sys<Next> {
    match regs.rax {
        leaf::VP_VMCALL => return vmcall(vcpu, inner, shown, regs),
        leaf::VP_INFO => {
            let state = lock(&vcpu.td.state);
            regs.rcx = u64::from(state.gpaw);
            regs.rdx = state.attributes;
            regs.r8 = u64::from(state.initialized) | u64::from(state.created) << 32;
            (regs.r9, regs.r10, regs.r11) = (u64::from(inner.index), 1, 0);
            regs.rax = module::SUCCESS;
        }
        leaf::VP_VEINFO_GET => match inner.ve.take() {
            Some(info) => {
                (regs.rax, regs.rcx, regs.rdx) = (0, u64::from(info.reason), info.qualification);
                (regs.r8, regs.r9, regs.r10) = (0, info.gpa, u64::from(info.length));
            }
            None => regs.rax = NO_VE_INFO,
        },
        leaf::MEM_PAGE_ACCEPT => match accept(vcpu, regs.rcx) {
            Ok(done) => regs.rax = done,
            // The TD exits before the instruction, which is executed again when it goes on.
            Err(gpa) => {
                inner.pending = Pending::Again(regs);
                return memory_fault(shown, Alias::Private, gpa);
            }
        },
        other => {
            crate::log::line(&format!("TDCALL leaf {other:#x} is not modelled"));
            regs.rax = module::OPERAND_INVALID | module::OPERAND_RAX;
        }
    }
    vcpu.set_regs(&regs);
    Ok(Next::Enter)
}

/// TDG.MEM.PAGE.ACCEPT: RAX, or the GPA at which KVM cannot put a page.
fn accept(vcpu: &Vcpu, operand: u64) -> Result<u64, u64> {
    let invalid = Ok(module::OPERAND_INVALID | module::OPERAND_RCX);
    let (gpa, size) = (operand & !(PAGE_SIZE - 1), operand & 7);
    let mut state = lock(&vcpu.td.state);
    if operand & 0xff8 != 0 || size > level::L2M || gpa >= state.shared_bit() {
        return invalid;
    }
    if size == level::L2M {
        if !gpa.is_multiple_of(PAGE_SIZE_2M) {
            return invalid;
        }
        // KVM maps pages of 4 KiB only, which makes a page table.
        if !state.memory.has_table(gpa) {
            state.memory.fault_in(gpa).ok_or(gpa)?;
        }
        return Ok(module::PAGE_SIZE_MISMATCH | level::L2M);
    }
    match state.memory.sept(gpa) {
        Sept::Mapped => return Ok(module::PAGE_ALREADY_ACCEPTED | level::L4K),
        Sept::Pending => {}
        Sept::Free => {
            state.memory.fault_in(gpa).ok_or(gpa)?;
        }
    }
    // Its contents are zero when it is first touched.
    state.memory.set_sept(gpa, Sept::Mapped);
    Ok(module::SUCCESS)
}

/// The registers that RCX passes, the others as 0.
pub(crate) fn passed(regs: &kvm_regs) -> kvm_regs {
    let if_passed = |bit: u32, value| if regs.rcx >> bit & 1 != 0 { value } else { 0 };
    kvm_regs {
        rdx: if_passed(2, regs.rdx),
        rbx: if_passed(3, regs.rbx),
        rsi: if_passed(6, regs.rsi),
        rdi: if_passed(7, regs.rdi),
        r8: if_passed(8, regs.r8),
        r9: if_passed(9, regs.r9),
        r10: if_passed(10, regs.r10),
        r11: if_passed(11, regs.r11),
        r12: if_passed(12, regs.r12),
        r13: if_passed(13, regs.r13),
        r14: if_passed(14, regs.r14),
        r15: if_passed(15, regs.r15),
        ..*regs
    }
}

/// Goes on in the guest, with those of R10 to R15 that it passed as `reply` has them, and RAX 0.
pub(crate) fn resume(vcpu: &Vcpu, guest: &kvm_regs, reply: &kvm_regs) -> Next {
    let if_passed = |bit: u32, old, new| if guest.rcx >> bit & 1 != 0 { new } else { old };
    vcpu.set_regs(&kvm_regs {
        rax: module::SUCCESS,
        r10: if_passed(10, guest.r10, reply.r10),
        r11: if_passed(11, guest.r11, reply.r11),
        r12: if_passed(12, guest.r12, reply.r12),
        r13: if_passed(13, guest.r13, reply.r13),
        r14: if_passed(14, guest.r14, reply.r14),
        r15: if_passed(15, guest.r15, reply.r15),
        ..*guest
    });
    Next::Enter
}

/// TDG.VP.VMCALL.
fn vmcall(vcpu: &Vcpu, inner: &mut Inner, shown: &mut kvm_run, guest: kvm_regs) -> Sys<Next> {
    // RAX, RCX, RSP and RBP cannot be passed; KVM configures TDs so that RBP is left alone.
    if guest.rcx & !0xffff != 0 || guest.rcx & 0b11_0011 != 0 {
        let rax = module::OPERAND_INVALID | module::OPERAND_RCX;
        vcpu.set_regs(&kvm_regs { rax, ..guest });
        return Ok(Next::Enter);
    }
    let mut regs = passed(&guest);
    if regs.r10 != 0 {
        regs.r10 = ENOSYS;
        return Ok(resume(vcpu, &guest, &regs));
    }
    let bit = lock(&vcpu.td.state).shared_bit();
    match regs.r11 {
        sub::MAP_GPA => return map_gpa::begin(vcpu, inner, shown, guest, regs),
        sub::IO => {
            let (size, write, port) = (regs.r12, regs.r13, regs.r14);
            if write > 1 || !matches!(size, 1 | 2 | 4) {
                regs.r10 = status::INVALID_OPERAND;
                return Ok(resume(vcpu, &guest, &regs));
            }
            return Ok(port_io(vcpu, inner, shown, guest, (size, write == 1, port, regs.r15)));
        }
        sub::REQUEST_MMIO => {
            let (size, write, gpa) = (regs.r12, regs.r13, regs.r14);
            let private = gpa & bit == 0 || gpa.wrapping_add(size.wrapping_sub(1)) & bit == 0;
            if !matches!(size, 1 | 2 | 4 | 8) || write > 1 || private {
                regs.r10 = status::INVALID_OPERAND;
                return Ok(resume(vcpu, &guest, &regs));
            }
            shown.exit_reason = KVM_EXIT_MMIO;
            let run = &mut shown.__bindgen_anon_1;
            run.mmio.phys_addr = gpa & !bit;
            run.mmio.data = if write == 1 { regs.r15.to_le_bytes() } else { [0; 8] };
            run.mmio.len = size as u32;
            run.mmio.is_write = u8::from(write == 1);
            inner.pending = if write == 1 {
                Pending::Out(guest)
            } else {
                Pending::MmioRead(guest, size as usize)
            };
            return Ok(Next::Exit);
        }
        sub::HLT => vcpu.set_mp_state(HALTED)?,
        sub::CPUID => {
            let (function, index) = (regs.r12 as u32, regs.r13 as u32);
            let leaf = cpuid::find(&inner.cpuid, function, index).copied().unwrap_or_default();
            (regs.r12, regs.r13) = (leaf.eax.into(), leaf.ebx.into());
            (regs.r14, regs.r15) = (leaf.ecx.into(), leaf.edx.into());
        }
        sub::RDMSR => match vcpu.read_msr(regs.r12 as u32) {
            Some(value) => regs.r11 = value,
            None => regs.r10 = status::INVALID_OPERAND,
        },
        sub::WRMSR => {
            if vcpu.write_msr(regs.r12 as u32, regs.r13).is_none() {
                regs.r10 = status::INVALID_OPERAND;
            }
        }
        sub::GET_TDVMCALL_INFO if regs.r12 == 0 => {
            (regs.r11, regs.r12, regs.r13, regs.r14) = (0, 0, 0, 0);
        }
        sub::GET_TDVMCALL_INFO if regs.r12 == 1 => {
            inner.pending = Pending::Info(guest);
            return Ok(exit_tdx(shown, regs.r11, [status::SUCCESS, 1, 0, 0, 0, 0]));
        }
        sub::GET_TDVMCALL_INFO => regs.r10 = status::INVALID_OPERAND,
        sub::GET_QUOTE if regs.r12 & bit != 0 => {
            inner.pending = Pending::Tdx(guest);
            let data = [status::SUBFUNC_UNSUPPORTED, regs.r12 & !bit, regs.r13, 0, 0, 0];
            return Ok(exit_tdx(shown, regs.r11, data));
        }
        sub::GET_QUOTE => regs.r10 = status::INVALID_OPERAND,
        sub::SETUP_EVENT_NOTIFY if (32..=255).contains(&regs.r12) => {
            inner.pending = Pending::Tdx(guest);
            return Ok(exit_tdx(
                shown,
                regs.r11,
                [status::SUBFUNC_UNSUPPORTED, regs.r12, 0, 0, 0, 0],
            ));
        }
        sub::SETUP_EVENT_NOTIFY => regs.r10 = status::INVALID_OPERAND,
        sub::REPORT_FATAL_ERROR => {
            fatal_error(shown, &regs);
            inner.pending = Pending::Out(guest);
            return Ok(Next::Exit);
        }
        _ => regs.r10 = status::SUBFUNC_UNSUPPORTED,
    }
    Ok(resume(vcpu, &guest, &regs))
}

/// KVM_EXIT_TDX: flags, number, then what the number says.
fn exit_tdx(shown: &mut kvm_run, nr: u64, data: [u64; 6]) -> Next {
    shown.exit_reason = EXIT_TDX;
    put_words(shown, [0, nr].into_iter().chain(data));
    Next::Exit
}

fn put_words(shown: &mut kvm_run, words: impl Iterator<Item = u64>) {
    // SAFETY: bytes of a union of integers; those that are written are initialized, and more are not
    // written than it has.
    let padding = unsafe { &mut shown.__bindgen_anon_1.padding };
    for (slot, word) in padding.chunks_exact_mut(8).zip(words) {
        for (byte, value) in slot.iter_mut().zip(word.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
}

fn word(shown: &kvm_run, index: usize) -> u64 {
    // SAFETY: as above; whoever reads a word knows that the exit has it.
    let padding = unsafe { &shown.__bindgen_anon_1.padding };
    u64::from_le_bytes(std::array::from_fn(|i| padding[8 * index + i].cast_unsigned()))
}

/// `tdx_report_fatal_error`: 16 registers in the processor's order, RSP and RBP as 0.
fn fatal_error(shown: &mut kvm_run, regs: &kvm_regs) {
    shown.exit_reason = KVM_EXIT_SYSTEM_EVENT;
    // RAX is what TDH.VP.ENTER returned: the exit reason of a TDCALL.
    let data = [
        77, regs.rcx, regs.rdx, regs.rbx, 0, 0, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    let head = u64::from(SYSTEM_EVENT_TDX_FATAL) | 16 << 32;
    put_words(shown, [head].into_iter().chain(data));
}

/// `tdx_emulate_io`, as far as user space.
fn port_io(
    vcpu: &Vcpu,
    inner: &mut Inner,
    shown: &mut kvm_run,
    guest: kvm_regs,
    (size, write, port, value): (u64, bool, u64, u64),
) -> Next {
    shown.exit_reason = KVM_EXIT_IO;
    let run = &mut shown.__bindgen_anon_1;
    run.io.direction = if write { KVM_EXIT_IO_OUT } else { KVM_EXIT_IO_IN } as u8;
    (run.io.size, run.io.port, run.io.count, run.io.data_offset) =
        (size as u8, port as u16, 1, IO_DATA);
    let size = size as usize;
    // SAFETY: the second page of the program's `struct kvm_run`, which has three; the vCPU's lock is
    // held, and the program is in KVM_RUN.
    unsafe { io_data(vcpu).write_unaligned(value.to_le_bytes()) };
    inner.pending = if write { Pending::Out(guest) } else { Pending::In(guest, size) };
    Next::Exit
}

/// The data of a KVM_EXIT_IO.
fn io_data(vcpu: &Vcpu) -> *mut [u8; 8] {
    vcpu.shown().wrapping_byte_add(IO_DATA as usize).cast()
}

/// Finishes what user space was asked for.
pub(crate) fn complete(vcpu: &Vcpu, inner: &mut Inner, shown: &mut kvm_run) -> Sys<Next> {
    match std::mem::replace(&mut inner.pending, Pending::Nothing) {
        Pending::Nothing => Ok(Next::Enter),
        Pending::Again(regs) => handle(vcpu, inner, shown, regs),
        Pending::Out(guest) => Ok(resume(vcpu, &guest, &passed(&guest))),
        Pending::In(guest, size) => {
            let mut value = [0; 8];
            // SAFETY: as in `port_io`.
            let data = unsafe { io_data(vcpu).read_unaligned() };
            value[..size].copy_from_slice(&data[..size]);
            let r11 = u64::from_le_bytes(value);
            Ok(resume(vcpu, &guest, &kvm_regs { r11, ..passed(&guest) }))
        }
        Pending::MmioRead(guest, size) => {
            let mut value = [0; 8];
            // SAFETY: the exit was KVM_EXIT_MMIO.
            value[..size].copy_from_slice(unsafe { &shown.__bindgen_anon_1.mmio.data[..size] });
            let r11 = u64::from_le_bytes(value);
            Ok(resume(vcpu, &guest, &kvm_regs { r11, ..passed(&guest) }))
        }
        Pending::Tdx(guest) => {
            let r10 = word(shown, 2);
            Ok(resume(vcpu, &guest, &kvm_regs { r10, ..passed(&guest) }))
        }
        Pending::Info(guest) => {
            let [r10, r11, r12, r13, r14] = [2, 4, 5, 6, 7].map(|index| word(shown, index));
            let reply = kvm_regs { r10, r11, r12, r13, r14, ..passed(&guest) };
            Ok(resume(vcpu, &guest, &reply))
        }
        Pending::MapGpa(guest, call, before) => {
            map_gpa::complete(vcpu, inner, shown, (guest, call, before))
        }
    }
}
