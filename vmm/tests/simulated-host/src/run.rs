//! KVM_RUN of a TD's vCPU: completes what user space answered, enters the guest, and turns the exits of
//! the VM underneath into those of a TD.
//!
//! Sources: Linux, arch/x86/kvm/x86.c (`kvm_arch_vcpu_ioctl_run`), arch/x86/kvm/vmx/tdx.c
//! (`tdx_vcpu_pre_run`, `tdx_handle_ept_violation`), arch/x86/kvm/mmu/mmu.c
//! (`kvm_mmu_prepare_memory_fault_exit`); TDX module base specification, "#VE injection".

use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_MEMORY_EXIT_FLAG_PRIVATE,
    KVM_SYNC_X86_REGS, kvm_regs, kvm_run, kvm_sregs, kvm_vcpu_events,
};
use mapgpa_abi::tdcall::{ATTR_SEPT_VE_DISABLE, TRAP_PORT};
use mapgpa_abi::{Alias, PAGE_SIZE};
use mapgpa_kvm_model::MapGpa;

use crate::faults::{self, Fault};
use crate::log::refuse;
use crate::memory::Touch;
use crate::raw::{self, Sys};
use crate::td::{Stage, lock};
use crate::uapi::ioctl;
use crate::vcpu::{Inner, Vcpu, VeInfo};
use crate::{profile, tdcall};

/// What the next KVM_RUN has to finish.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pending {
    /// Nothing.
    Nothing,
    /// A TDCALL that ended in an exit, and is executed again.
    Again(kvm_regs),
    /// A chunk of a MapGPA, and what waited for the vCPU when it called.
    MapGpa(kvm_regs, MapGpa, ([u8; 32], bool)),
    /// A port write.
    Out(kvm_regs),
    /// A port read of this many bytes.
    In(kvm_regs, usize),
    /// An MMIO read of this many bytes.
    MmioRead(kvm_regs, usize),
    /// A KVM_EXIT_TDX whose answer is a status.
    Tdx(kvm_regs),
    /// GetTdVmCallInfo.
    Info(kvm_regs),
}

/// Signals in a row, without an exit of the guest's, after which the log says where it is.
const STUCK: u32 = 100;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The guest.
    Enter,
    /// The program: KVM_RUN returns 0.
    Exit,
}

/// Why the guest finds a #VE: basic exit reasons (Intel SDM 3, appendix C).
mod reason {
    pub(super) const IO: u32 = 30;
    pub(super) const MSR_READ: u32 = 31;
    pub(super) const MSR_WRITE: u32 = 32;
    pub(super) const EPT_VIOLATION: u32 = 48;
}

thread_local! {
    static SIGNAL_ALLOWED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl Vcpu {
    /// KVM_RUN.
    pub(crate) fn run(&self) -> Sys<i32> {
        let mut inner = lock(&self.inner);
        if lock(&self.td.state).dead {
            return refuse(libc::EIO, "KVM_RUN: the TD is dead");
        }
        // SAFETY: `shown` is this vCPU's, alive with it; the program writes it between calls.
        let shown = unsafe { &mut *self.shown() };
        if shown.kvm_valid_regs != 0 || shown.kvm_dirty_regs != 0 {
            return refuse(libc::EINVAL, "KVM_RUN: a TD has no registers to synchronize");
        }
        let next = tdcall::complete(self, &mut inner, shown)?;
        if next == Next::Exit {
            return Ok(0);
        }
        if shown.immediate_exit != 0 {
            return Err(libc::EINTR);
        }
        if !inner.initialized || lock(&self.td.state).stage != Stage::Runnable {
            return refuse(libc::EINVAL, "KVM_RUN: before INIT_VCPU or FINALIZE_VM");
        }
        self.broken(shown)?;
        if profile::get().host_is("internal-error") {
            shown.exit_reason = KVM_EXIT_INTERNAL_ERROR;
            return Ok(0);
        }
        if !SIGNAL_ALLOWED.replace(true) {
            faults::allow_signal();
        }
        loop {
            if self.enter(&mut inner, shown)? == Next::Exit {
                return Ok(0);
            }
        }
    }

    /// Hosts on which no vCPU ever runs.
    fn broken(&self, shown: &mut kvm_run) -> Sys<()> {
        let profile = profile::get();
        if profile.host_is("run") {
            return refuse(libc::EIO, "KVM_RUN");
        }
        if profile.host_is("memory-faults") {
            return memory_fault(shown, Alias::Private, 0x10_0000);
        }
        Ok(())
    }

    /// The registers at the last exit.
    fn regs(&self) -> kvm_regs {
        // SAFETY: the kernel filled them, as KVM_SYNC_X86_REGS was asked for; this thread holds the
        // vCPU's lock.
        unsafe { (*self.real()).s.regs.regs }
    }

    /// What the guest's registers are when it goes on after a TDCALL.
    pub(crate) fn set_regs(&self, regs: &kvm_regs) {
        // SAFETY: as in `regs`.
        unsafe {
            let real = &mut *self.real();
            real.s.regs.regs = *regs;
            real.kvm_dirty_regs = u64::from(KVM_SYNC_X86_REGS);
        }
    }

    /// Runs the guest until it exits, and sees what that is to a TD.
    fn enter(&self, inner: &mut Inner, shown: &mut kvm_run) -> Sys<Next> {
        // SAFETY: this vCPU's, and this thread holds its lock; nobody else uses it.
        let real = unsafe { &mut *self.real() };
        real.kvm_valid_regs = u64::from(KVM_SYNC_X86_REGS);
        real.immediate_exit = shown.immediate_exit;
        self.runner.thread.store(raw::gettid(), Ordering::Release);
        // SAFETY: KVM_RUN has no argument.
        let ran = unsafe { raw::ioctl(self.fd.0, ioctl::RUN, 0) };
        self.runner.thread.store(0, Ordering::Release);
        real.kvm_dirty_regs = 0;
        shown.if_flag = 1;
        shown.ready_for_interrupt_injection = real.ready_for_interrupt_injection;
        if let Err(errno) = ran {
            inner.interrupted += 1;
            if inner.interrupted == STUCK {
                let (index, regs) = (inner.index, self.regs());
                crate::log::line(&format!(
                    "stuck: vCPU {index} makes no exits of its own: {regs:x?}"
                ));
            }
            return match self.runner.take() {
                Some(fault) => self.touched(inner, shown, fault, None),
                None if errno == libc::EINTR || errno == libc::EAGAIN => Err(errno),
                None => refuse(errno, "KVM_RUN of the VM underneath"),
            };
        }
        inner.interrupted = 0;
        // SAFETY: the exit reason says which member of the union the kernel filled.
        unsafe {
            match real.exit_reason {
                KVM_EXIT_IO => {
                    let io = real.__bindgen_anon_1.io;
                    if io.port == TRAP_PORT && u32::from(io.direction) != KVM_EXIT_IO_IN {
                        return tdcall::handle(self, inner, shown, self.regs());
                    }
                    let read = u64::from(u32::from(io.direction) == KVM_EXIT_IO_IN);
                    let qualification =
                        u64::from(io.size - 1) | read << 3 | u64::from(io.port) << 16;
                    let info = VeInfo { reason: reason::IO, qualification, ..VeInfo::default() };
                    self.inject_ve(inner, info)
                }
                KVM_EXIT_MMIO => {
                    let bit = lock(&self.td.state).shared_bit();
                    let at = real.__bindgen_anon_1.mmio.phys_addr;
                    let (alias, gpa) = if at & bit == 0 {
                        (Alias::Private, at)
                    } else {
                        (Alias::Shared, at & !bit)
                    };
                    let touch = lock(&self.td.state).memory.touch(alias, gpa);
                    self.touched(inner, shown, Fault { alias, gpa, touch }, Some(self.regs()))
                }
                KVM_EXIT_X86_RDMSR => self.rdmsr_wrmsr(inner, reason::MSR_READ),
                KVM_EXIT_X86_WRMSR if self.efer_stays() => {
                    real.__bindgen_anon_1.msr.error = 0;
                    Ok(Next::Enter)
                }
                KVM_EXIT_X86_WRMSR => self.rdmsr_wrmsr(inner, reason::MSR_WRITE),
                KVM_EXIT_SHUTDOWN => {
                    crate::log::line(&format!("shutdown: {:x?}", self.regs()));
                    shown.exit_reason = KVM_EXIT_SHUTDOWN;
                    Ok(Next::Exit)
                }
                other => {
                    crate::log::line(&format!(
                        "exit {other} of the VM underneath: {:x?}",
                        self.regs()
                    ));
                    shown.exit_reason = KVM_EXIT_INTERNAL_ERROR;
                    shown.__bindgen_anon_1.internal.suberror = 4; // UNEXPECTED_EXIT_REASON
                    shown.__bindgen_anon_1.internal.ndata = 0;
                    Ok(Next::Exit)
                }
            }
        }
    }

    /// A touch that should not be. With `regs` the VM underneath has begun to emulate the instruction,
    /// which is called off.
    fn touched(
        &self,
        inner: &mut Inner,
        shown: &mut kvm_run,
        fault: Fault,
        regs: Option<kvm_regs>,
    ) -> Sys<Next> {
        let length = match regs {
            Some(regs) => self.call_off(regs)?,
            None => 0,
        };
        let Fault { alias, gpa, touch } = fault;
        if touch != Touch::Fine {
            // It may have been resolved to get the vCPU out.
            lock(&self.td.state).memory.forget(alias, gpa)?;
        }
        match touch {
            Touch::MemoryFault => memory_fault(shown, alias, gpa).map(|()| Next::Exit),
            Touch::Pending => self.pending(inner, gpa),
            Touch::Nowhere => {
                let gpa = gpa | lock(&self.td.state).shared_bit();
                let info =
                    VeInfo { reason: reason::EPT_VIOLATION, gpa, length, ..VeInfo::default() };
                self.deliver_ve(inner, info)
            }
            // The page was converted meanwhile.
            Touch::Fine => Ok(Next::Enter),
        }
    }

    /// An access to a pending page: the end of the TD, unless it wants a #VE.
    fn pending(&self, inner: &mut Inner, gpa: u64) -> Sys<Next> {
        let mut state = lock(&self.td.state);
        if state.attributes & ATTR_SEPT_VE_DISABLE == 0 {
            drop(state);
            let info = VeInfo { reason: reason::EPT_VIOLATION, gpa, ..VeInfo::default() };
            return self.deliver_ve(inner, info);
        }
        state.dead = true;
        refuse(libc::EIO, &format!("KVM_RUN: guest access before accepting {gpa:#x}"))
    }

    /// Takes back an instruction that waits for user space: it is completed, and the registers are set
    /// to what they were before it. Gives its length in bytes.
    fn call_off(&self, mut regs: kvm_regs) -> Sys<u32> {
        // SAFETY: this vCPU's, and this thread holds its lock.
        unsafe {
            (*self.real()).immediate_exit = 1;
            let ran = raw::ioctl(self.fd.0, ioctl::RUN, 0);
            (*self.real()).immediate_exit = 0;
            if ran != Err(libc::EINTR) {
                return refuse(libc::EIO, "an instruction could not be called off");
            }
        }
        let mut after = kvm_regs::default();
        raw::ioctl_with(self.fd.0, ioctl::GET_REGS, &mut after)?;
        raw::ioctl_with(self.fd.0, ioctl::SET_REGS, &mut regs)?;
        Ok(after.rip.wrapping_sub(regs.rip) as u32)
    }

    fn inject_ve(&self, inner: &mut Inner, info: VeInfo) -> Sys<Next> {
        let length = self.call_off(self.regs())?;
        self.deliver_ve(inner, VeInfo { length, ..info })
    }

    /// Has the guest take a #VE; one that comes before the guest asked what the last was is a #DF.
    fn deliver_ve(&self, inner: &mut Inner, info: VeInfo) -> Sys<Next> {
        let twice = inner.ve.replace(info).is_some();
        let mut events = kvm_vcpu_events::default();
        raw::ioctl_with(self.fd.0, ioctl::GET_VCPU_EVENTS, &mut events)?;
        events.flags = 0;
        events.exception.injected = 1;
        events.exception.nr = if twice { 8 } else { 20 };
        events.exception.has_error_code = u8::from(twice);
        events.exception.error_code = 0;
        raw::ioctl_with(self.fd.0, ioctl::SET_VCPU_EVENTS, &mut events)?;
        Ok(Next::Enter)
    }

    fn rdmsr_wrmsr(&self, inner: &mut Inner, reason: u32) -> Sys<Next> {
        self.inject_ve(inner, VeInfo { reason, ..VeInfo::default() })
    }

    /// Whether the guest writes to EFER what is in it, SCE and the read-only LMA aside: that is no #VE
    /// (`wrmsr_ia32_efer` in `intel/tdx-module`).
    fn efer_stays(&self) -> bool {
        // SAFETY: the exit is a WRMSR; this thread holds the vCPU's lock.
        let msr = unsafe { (*self.real()).__bindgen_anon_1.msr };
        let mut sregs = kvm_sregs::default();
        let got = raw::ioctl_with(self.fd.0, ioctl::GET_SREGS, &mut sregs);
        msr.index == 0xc000_0080 && got.is_ok() && (msr.data ^ sregs.efer) & !(1 | 1 << 10) == 0
    }
}

/// KVM_EXIT_MEMORY_FAULT of the page at `gpa`: KVM_RUN fails with EFAULT.
pub(crate) fn memory_fault<T>(shown: &mut kvm_run, alias: Alias, gpa: u64) -> Sys<T> {
    shown.exit_reason = KVM_EXIT_MEMORY_FAULT;
    let fault = &mut shown.__bindgen_anon_1;
    fault.memory_fault.flags = match alias {
        Alias::Private => u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE),
        Alias::Shared => 0,
    };
    fault.memory_fault.gpa = gpa & !(PAGE_SIZE - 1);
    fault.memory_fault.size = PAGE_SIZE;
    refuse(libc::EFAULT, &format!("KVM_RUN: memory fault at {gpa:#x}, {alias:?}"))
}
