//! The floor: what the bare work of a run costs here, without an engine, to hold the engine against.
//!
//! The same guest on the same kind of VM, its MapGPA calls answered at once from the registers, with
//! one hole punch for each chunk or none. Benchmarks and comparisons run it beside the real thing.

use std::time::{Duration, Instant};

use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use mapgpa_abi::channel::{self, tag};
use mapgpa_abi::tdcall::{leaf, status, sub};
use mapgpa_abi::Alias;

use super::memory::Ram;
use super::tick::Tick;
use super::vm::{Host, Vm, failed};
use super::{EmulatedError, boot};
use crate::backend::Setup;
use crate::pagemap::Pages;

/// What the bare work took.
#[derive(Debug, Clone, Copy)]
pub struct Floor {
    /// MapGPA calls.
    pub calls: u64,
    /// From the first of them to the last.
    pub time: Duration,
}

/// Runs `setup`'s guest on one vCPU; each MapGPA call is answered RETRY after `chunk` bytes, and
/// with `punch` those are discarded from the alias that they leave.
///
/// # Errors
/// The VM cannot be made, or KVM cannot run the guest.
pub fn calls(
    setup: &Setup<'_>,
    gpaw: u32,
    chunk: u64,
    punch: bool,
) -> Result<Floor, EmulatedError> {
    let shared_bit = mapgpa_abi::shared_bit(gpaw);
    let ram = Ram::new(setup.memory)?;
    let image = boot::load(setup, &[], &ram)?;
    let vm = Vm::new(Host::get()?, &ram, &image, 1, gpaw)?;
    let mut vcpu = vm.vcpu(0)?;
    let _tick = Tick::start().map_err(EmulatedError::Timer)?;
    let deadline = Instant::now() + setup.timeout;
    let (mut calls, mut first, mut last) = (0, deadline, deadline);
    while !ended(&mut vcpu)? && Instant::now() < deadline {
        let regs = &mut vcpu.sync_regs_mut().regs;
        match (regs.rax, regs.r11) {
            (leaf::VP_VMCALL, sub::MAP_GPA) => {
                last = Instant::now();
                if calls == 0 {
                    first = last;
                }
                calls += 1;
                let size = regs.r13.min(chunk);
                if punch {
                    let alias =
                        if regs.r12 & shared_bit == 0 { Alias::Shared } else { Alias::Private };
                    let run = Pages::of_bytes(regs.r12 & !shared_bit, size);
                    for region in ram.regions() {
                        if let Some(part) = region.clip(run) {
                            region.discard(alias, part)?;
                        }
                    }
                }
                let done = size == regs.r13;
                regs.r10 = if done { status::SUCCESS } else { status::RETRY };
                regs.r11 = regs.r12 + size;
            }
            (leaf::VP_INFO, _) => {
                regs.rcx = gpaw.into();
                (regs.r8, regs.r9) = (1 << 32 | 1, 0);
            }
            _ => regs.r10 = status::SUCCESS,
        }
        regs.rax = 0;
        vcpu.set_sync_dirty_reg(SyncReg::Register);
    }
    Ok(Floor { calls, time: last.saturating_duration_since(first) })
}

/// Runs the guest to its next TDCALL; true if it has ended.
fn ended(vcpu: &mut VcpuFd) -> Result<bool, EmulatedError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => {
                let regs = vcpu.sync_regs_mut().regs;
                let word = (regs.rax, regs.r11, regs.r14);
                let to_channel = (leaf::VP_VMCALL, sub::IO, u64::from(channel::PORT));
                // A payload word that looks like EXIT would end the floor early: no GPA, size or
                // count of these guests does.
                return Ok(word == to_channel && regs.r15 >> 24 == u64::from(tag::EXIT));
            }
            Ok(VcpuExit::Intr) => {}
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(failed("KVM_RUN")(error).into()),
            Ok(other) => {
                return Err(EmulatedError::Exit { vcpu: 0, exit: format!("{other:?}") });
            }
        }
    }
}

/// Makes a VM with a vCPU, runs `setup`'s guest to its first exit, and destroys it all; returns what
/// that took, without the loading of the guest.
///
/// # Errors
/// As [`calls`].
pub fn bare_vm(setup: &Setup<'_>, gpaw: u32) -> Result<Duration, EmulatedError> {
    let ram = Ram::new(setup.memory)?;
    let image = boot::load(setup, &[], &ram)?;
    let began = Instant::now();
    let vm = Vm::new(Host::get()?, &ram, &image, 1, gpaw)?;
    let mut vcpu = vm.vcpu(0)?;
    ended(&mut vcpu)?;
    drop(vcpu);
    drop(vm);
    Ok(began.elapsed())
}
