//! The floor: what the bare work of a run costs here, without an engine, to hold the engine against.
//!
//! The same guest on the same kind of VM, its MapGPA calls answered at once, with what the
//! host has to do for each call that converts (a hole punch; the pages' attributes with guest_memfd), or
//! nothing. Benchmarks and comparisons run it beside the real thing.

use std::time::{Duration, Instant};

use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use mapgpa_abi::channel::{self, tag};
use mapgpa_abi::tdcall::{leaf, status, sub};
use mapgpa_abi::{Alias, Direction};

use super::image::Tdcalls;
use super::memory::Ram;
use super::tick::Tick;
use super::vm::{Host, Vm, failed};
use super::{EmulatedError, boot};
use crate::backend::Setup;
use crate::memory::MemoryError;
use crate::pagemap::Pages;

/// What the bare work took.
#[derive(Debug, Clone, Copy)]
pub struct Floor {
    /// MapGPA calls.
    pub calls: u64,
    /// From the first of them to the last.
    pub time: Duration,
    /// From begin to end of all conversations.
    pub conversations: Duration,
}

/// What is said to a MapGPA call, and done before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// R10.
    pub status: u64,
    /// R11.
    pub r11: u64,
    /// Bytes from the request's start that are discarded from the alias that they leave.
    pub punch: u64,
}

impl Answer {
    /// The truth to a request of `size` bytes at `raw_gpa` of which `chunk` are done, and discarded
    /// if `punch`.
    #[must_use]
    pub fn chunk(raw_gpa: u64, size: u64, chunk: u64, punch: bool) -> Self {
        let done = size.min(chunk);
        let status = if done == size { status::SUCCESS } else { status::RETRY };
        Self { status, r11: raw_gpa.wrapping_add(done), punch: if punch { done } else { 0 } }
    }
}

/// Runs `setup`'s guest on one vCPU; what its MapGPA calls are answered, `answer` says from R12 and
/// R13.
///
/// # Errors
/// The VM cannot be made, or KVM cannot run the guest.
pub fn calls(
    setup: &Setup<'_>,
    gpaw: u32,
    mut answer: impl FnMut(u64, u64) -> Answer,
) -> Result<Floor, EmulatedError> {
    let shared_bit = mapgpa_abi::shared_bit(gpaw);
    let ram = Ram::new(setup.memory)?;
    let image = boot::load(setup, &[], &ram, Tdcalls::Replaced)?;
    let vm = Vm::new(Host::get()?, &ram, &image, 1, gpaw, setup.memory_model)?;
    let protected = vm.protected()?;
    if let Some((memory, pages)) = protected.zip(setup.shared) {
        memory.convert(pages, Direction::ToShared)?;
    }
    let mut vcpu = vm.vcpu(0)?;
    let _tick = Tick::start().map_err(EmulatedError::Timer)?;
    let deadline = Instant::now() + setup.timeout;
    let (mut calls, mut first, mut last) = (0, deadline, deadline);
    let mut conversations = Conversations::default();
    loop {
        match exit(&mut vcpu)? {
            Exit::Ended => break,
            _ if Instant::now() >= deadline => break,
            Exit::Channel => conversations.word(),
            Exit::Port => {
                conversations.word();
                continue;
            }
            Exit::Tdcall => {}
        }
        let regs = &mut vcpu.sync_regs_mut().regs;
        match (regs.rax, regs.r11) {
            (leaf::VP_VMCALL, sub::MAP_GPA) => {
                last = Instant::now();
                if calls == 0 {
                    first = last;
                }
                calls += 1;
                conversations.called = true;
                let Answer { status, r11, punch } = answer(regs.r12, regs.r13);
                if punch > 0 {
                    let shared = regs.r12 & shared_bit != 0;
                    let to = if shared { Direction::ToShared } else { Direction::ToPrivate };
                    let run = Pages::of_bytes(regs.r12 & !shared_bit, punch);
                    match protected {
                        Some(memory) => memory.convert(run, to)?,
                        None => discard(&ram, to.reverse().alias(), run)?,
                    }
                }
                (regs.r10, regs.r11) = (status, r11);
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
    let time = last.saturating_duration_since(first);
    Ok(Floor { calls, time, conversations: conversations.total })
}

/// Drops the contents of what of `run` is RAM behind `alias`.
fn discard(ram: &Ram, alias: Alias, run: Pages) -> Result<(), MemoryError> {
    for region in ram.regions() {
        if let Some(part) = region.clip(run) {
            region.discard(alias, part)?;
        }
    }
    Ok(())
}

/// How long conversations take, from the words on the channel: from the last word before the first
/// call, which ends the mark of the begin, to the second after it, which ends the mark of the end.
#[derive(Debug, Default)]
struct Conversations {
    begun: Option<Instant>,
    called: bool,
    words_after: u32,
    total: Duration,
}

impl Conversations {
    fn word(&mut self) {
        let now = Instant::now();
        if !self.called {
            self.begun = Some(now);
            return;
        }
        self.words_after += 1;
        if self.words_after == 2 {
            let begun = self.begun.replace(now).unwrap_or(now);
            self.total += now - begun;
            (self.called, self.words_after) = (false, 0);
        }
    }
}

/// An exit of the guest.
enum Exit {
    /// A word on the channel: it ends.
    Ended,
    /// Another word on the channel, by TDCALL.
    Channel,
    /// Another word on the channel, by the guest's own port write.
    Port,
    /// Another TDCALL.
    Tdcall,
}

/// Runs the guest to its next TDCALL.
fn exit(vcpu: &mut VcpuFd) -> Result<Exit, EmulatedError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(channel::PORT, data)) => {
                let ends = data.last() == Some(&tag::EXIT);
                return Ok(if ends { Exit::Ended } else { Exit::Port });
            }
            Ok(VcpuExit::IoOut(..)) => {
                let regs = vcpu.sync_regs_mut().regs;
                let word = (regs.rax, regs.r11, regs.r14);
                let to_channel = (leaf::VP_VMCALL, sub::IO, u64::from(channel::PORT));
                return Ok(if word != to_channel {
                    Exit::Tdcall
                } else if regs.r15 >> 24 == u64::from(tag::EXIT) {
                    // A payload word that looks like EXIT would end the floor early: no GPA, size
                    // or count of these guests does.
                    Exit::Ended
                } else {
                    Exit::Channel
                });
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
    let image = boot::load(setup, &[], &ram, Tdcalls::Replaced)?;
    let began = Instant::now();
    let vm = Vm::new(Host::get()?, &ram, &image, 1, gpaw, setup.memory_model)?;
    let mut vcpu = vm.vcpu(0)?;
    exit(&mut vcpu)?;
    drop(vcpu);
    drop(vm);
    Ok(began.elapsed())
}
