//! MapGPA as KVM takes it to user space: the model that `--front-end kvm-*` uses, between the guest's
//! registers and `struct kvm_run`.
//!
//! Source: Linux, arch/x86/kvm/vmx/tdx.c (`tdx_map_gpa`, `__tdx_map_gpa`, `tdx_complete_vmcall_map_gpa`).

use kvm_bindings::{KVM_EXIT_HYPERCALL, kvm_regs, kvm_run};
use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::status;
use mapgpa_kvm_model::{CHUNK, Exit, MapGpa, Reply, Step, Td as ModelTd};

use crate::profile;
use crate::raw::Sys;
use crate::run::{Next, Pending};
use crate::td::lock;
use crate::tdcall::{passed, resume};
use crate::uapi::HC_MAP_GPA_RANGE;
use crate::vcpu::{Inner, Vcpu};

/// KVM_MAP_GPA_RANGE_ENCRYPTED.
const ENCRYPTED: u64 = 1 << 4;
/// KVM_EXIT_HYPERCALL_LONG_MODE.
const LONG_MODE: u64 = 1;

/// `tdx_map_gpa`.
pub(crate) fn begin(
    vcpu: &Vcpu,
    inner: &mut Inner,
    shown: &mut kvm_run,
    guest: kvm_regs,
    mut regs: kvm_regs,
) -> Sys<Next> {
    let td = {
        let state = lock(&vcpu.td.state);
        ModelTd {
            kernel: profile::get().kernel,
            shared_bit: state.shared_bit(),
            address_bits: inner.address_bits(),
            exits: state.exits,
        }
    };
    match MapGpa::begin(td, regs.r12, regs.r13) {
        Err(reply) => {
            told(&guest, reply);
            (regs.r10, regs.r11) = (reply.status, reply.r11);
            Ok(resume(vcpu, &guest, &regs))
        }
        Ok(call) => {
            // Only a call of several chunks looks for events.
            let events = if regs.r13 > CHUNK { vcpu.events()? } else { Default::default() };
            exit_map_gpa(shown, call.exit());
            inner.pending = Pending::MapGpa(guest, call, events);
            Ok(Next::Exit)
        }
    }
}

/// Notes what the guest asked and is told: the VMM sees no more than chunks.
fn told(guest: &kvm_regs, Reply { status, r11 }: Reply) {
    let r11 = if status == status::SUCCESS { "-".to_owned() } else { format!("{r11:#x}") };
    crate::log::line(&format!("reply: {:#x} {} {status:#x} {r11}", guest.r12, guest.r13));
}

fn exit_map_gpa(shown: &mut kvm_run, exit: Exit) {
    shown.exit_reason = KVM_EXIT_HYPERCALL;
    let run = &mut shown.__bindgen_anon_1;
    run.hypercall.nr = HC_MAP_GPA_RANGE;
    run.hypercall.ret = 0;
    run.hypercall.args = [exit.gpa, exit.pages, if exit.private { ENCRYPTED } else { 0 }, 0, 0, 0];
    run.hypercall.__bindgen_anon_1.flags = LONG_MODE;
}

/// Goes on when user space has answered for a chunk.
pub(crate) fn complete(
    vcpu: &Vcpu,
    inner: &mut Inner,
    shown: &mut kvm_run,
    (guest, mut call, before): (kvm_regs, MapGpa, ([u8; 32], bool)),
) -> Sys<Next> {
    // SAFETY: the exit was KVM_EXIT_HYPERCALL.
    let ret = unsafe { shown.__bindgen_anon_1.hypercall.ret };
    let pending = call.exit().pages == CHUNK / PAGE_SIZE && {
        let (irr, nmi) = vcpu.events()?;
        let more = irr.iter().zip(before.0).any(|(now, then)| now & !then != 0);
        more || nmi && !before.1
    };
    match call.complete(ret, pending) {
        Step::Exit(exit) => {
            exit_map_gpa(shown, exit);
            inner.pending = Pending::MapGpa(guest, call, before);
            Ok(Next::Exit)
        }
        Step::Reply(reply) => {
            told(&guest, reply);
            let Reply { status, r11 } = reply;
            let reply = kvm_regs { r10: status, r11, ..passed(&guest) };
            Ok(resume(vcpu, &guest, &reply))
        }
        Step::RunFails => {
            crate::log::refuse(libc::EINVAL, &format!("KVM_RUN: hypercall.ret {ret:#x}"))
        }
    }
}
