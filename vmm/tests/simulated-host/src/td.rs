//! A TD: an ordinary VM underneath, and what KVM and the TDX module keep of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE,
    KVM_X86_DISABLE_EXITS_HLT, kvm_cpuid_entry2, kvm_enable_cap, kvm_msr_filter,
    kvm_msr_filter_range, kvm_userspace_memory_region,
};

use crate::faults::{self, Runner, Userfaultfd};
use crate::memory::{Memory, Slot};
use crate::raw::{self, OwnFd, Sys};
use crate::uapi::ioctl;

/// How far a TD is: `kvm_tdx->state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// TD_STATE_UNINITIALIZED.
    Uninitialized,
    /// TD_STATE_INITIALIZED: KVM_TDX_INIT_VM is done.
    Initialized,
    /// TD_STATE_RUNNABLE: KVM_TDX_FINALIZE_VM is done.
    Runnable,
}

/// What is behind a TD's lock.
#[derive(Debug)]
pub(crate) struct State {
    /// `kvm->vm_dead`: every call fails with EIO.
    pub(crate) dead: bool,
    pub(crate) stage: Stage,
    /// ATTRIBUTES of the TD.
    pub(crate) attributes: u64,
    /// 48 or 52, 0 before KVM_TDX_INIT_VM.
    pub(crate) gpaw: u32,
    /// The CPUID configuration.
    pub(crate) config: Vec<kvm_cpuid_entry2>,
    /// KVM_CAP_SPLIT_IRQCHIP is enabled.
    pub(crate) split_irqchip: bool,
    /// KVM_CAP_EXIT_HYPERCALL is enabled for KVM_HC_MAP_GPA_RANGE.
    pub(crate) exits: bool,
    /// vCPUs made, and those for which KVM_TDX_INIT_VCPU is done.
    pub(crate) created: u32,
    pub(crate) initialized: u32,
    pub(crate) memory: Memory,
    /// Numbers of slots in the VM underneath, by number of the TD's slot and alias.
    numbers: HashMap<(u32, bool), u32>,
}

/// A TD.
#[derive(Debug)]
pub(crate) struct Td {
    /// The VM underneath.
    pub(crate) fd: OwnFd,
    /// /dev/kvm.
    pub(crate) kvm: OwnFd,
    pub(crate) state: Mutex<State>,
    /// Its vCPUs.
    pub(crate) runners: Mutex<Vec<Arc<Runner>>>,
    pub(crate) uffd: Arc<Userfaultfd>,
    stop: Arc<OwnFd>,
    thread: libc::pthread_t,
}

/// Locks, whatever happened to another thread that held it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// The shared bit as a mask; 0 before KVM_TDX_INIT_VM, so that all GPAs are private.
    pub(crate) fn shared_bit(&self) -> u64 {
        mapgpa_abi::shared_bit(self.gpaw)
    }
}

impl Td {
    /// A TD on the VM `fd` of /dev/kvm `kvm`; the program keeps both descriptors.
    pub(crate) fn new(kvm: i32, fd: i32) -> Sys<Arc<Self>> {
        let (fd, kvm) = (raw::dup(fd)?, raw::dup(kvm)?);
        prepare(fd.0)?;
        let uffd = Arc::new(Userfaultfd::new()?);
        let stop = Arc::new(raw::eventfd()?);
        let state = State {
            dead: false,
            stage: Stage::Uninitialized,
            attributes: 0,
            gpaw: 0,
            config: Vec::new(),
            split_irqchip: false,
            exits: false,
            created: 0,
            initialized: 0,
            memory: Memory::default(),
            numbers: HashMap::new(),
        };
        let mut failed = None;
        let td = Arc::new_cyclic(|this: &Weak<Self>| {
            let thread = faults::serve(this.clone(), Arc::clone(&uffd), Arc::clone(&stop));
            failed = thread.err();
            Self {
                fd,
                kvm,
                state: Mutex::new(state),
                runners: Mutex::default(),
                uffd,
                stop,
                thread: thread.unwrap_or(0),
            }
        });
        match failed {
            Some(errno) => Err(errno),
            None => Ok(td),
        }
    }

    /// Puts the memory of slot `number` behind both aliases in the VM underneath. The shared one has an
    /// address only when KVM_TDX_INIT_VM has said which bit it is.
    pub(crate) fn map(&self, state: &mut State, number: u32) -> Sys<()> {
        let Some(slot) = state.memory.slots.get(&number) else { return Err(libc::EINVAL) };
        let mut parts = Vec::new();
        if let Some(host) = slot.host(mapgpa_abi::Alias::Private, slot.gpa) {
            parts.push((false, slot.gpa, host));
        }
        let bit = state.shared_bit();
        if bit != 0 {
            parts.push((true, slot.gpa | bit, slot.shared.at));
        }
        let size = slot.size;
        for (shared, gpa, host) in parts {
            if state.numbers.contains_key(&(number, shared)) {
                continue;
            }
            let taken = state.numbers.values().copied().max();
            let below = taken.map_or(0, |most| most + 1);
            set_slot(self.fd.0, below, gpa, size, host)?;
            state.numbers.insert((number, shared), below);
        }
        Ok(())
    }

    /// Takes slot `number` out of the VM underneath.
    pub(crate) fn unmap(&self, state: &mut State, number: u32) -> Option<Slot> {
        for shared in [false, true] {
            if let Some(below) = state.numbers.remove(&(number, shared)) {
                // A slot that is there can be deleted.
                let _ = set_slot(self.fd.0, below, 0, 0, 0);
            }
        }
        state.memory.slots.remove(&number)
    }
}

impl Drop for Td {
    fn drop(&mut self) {
        if self.thread == 0 {
            return;
        }
        let _ = raw::write(self.stop.0, &1u64.to_le_bytes());
        // SAFETY: a thread that was started and neither joined nor detached yet.
        unsafe {
            if libc::pthread_equal(self.thread, libc::pthread_self()) == 0 {
                libc::pthread_join(self.thread, std::ptr::null_mut());
            } else {
                libc::pthread_detach(self.thread);
            }
        }
    }
}

fn set_slot(vm: i32, slot: u32, gpa: u64, size: u64, host: u64) -> Sys<()> {
    let mut region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: host,
    };
    raw::ioctl_with(vm, ioctl::SET_USER_MEMORY_REGION, &mut region).map(drop)
}

/// MSRs that a TD reads and writes without #VE, of those that this library's guests can be expected to
/// touch (TDX module base specification, "MSR virtualization"): first, count, may be written.
const NATIVE_MSRS: [(u32, u32, bool); 8] = [
    (0x10, 1, false),        // TSC
    (0x48, 2, true),         // SPEC_CTRL, PRED_CMD
    (0x174, 3, true),        // SYSENTER_CS, ESP, EIP
    (0x277, 1, true),        // PAT
    (0xc000_0080, 1, false), // EFER: writes are looked at
    (0xc000_0081, 4, true),  // STAR, LSTAR, CSTAR, FMASK
    (0xc000_0100, 4, true),  // FS, GS and kernel GS bases, TSC_AUX
    (0xda0, 1, true),        // XSS
];

/// Makes a VM do what a TD needs: exits for MSRs that are not the guest's own, and no asynchronous page
/// faults, which would hide the vCPU that touched a page.
fn prepare(vm: i32) -> Sys<()> {
    enable(vm, KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_FILTER))?;
    let mut all = [0xffu8; 8];
    let mut filter =
        kvm_msr_filter { flags: KVM_MSR_FILTER_DEFAULT_DENY, ..kvm_msr_filter::default() };
    for (range, (base, nmsrs, write)) in filter.ranges.iter_mut().zip(NATIVE_MSRS) {
        let flags = KVM_MSR_FILTER_READ | if write { KVM_MSR_FILTER_WRITE } else { 0 };
        *range = kvm_msr_filter_range { flags, nmsrs, base, bitmap: all.as_mut_ptr() };
    }
    raw::ioctl_with(vm, ioctl::X86_SET_MSR_FILTER, &mut filter)?;
    enable(vm, KVM_CAP_X86_DISABLE_EXITS, u64::from(KVM_X86_DISABLE_EXITS_HLT))
}

fn enable(vm: i32, cap: u32, arg: u64) -> Sys<()> {
    let mut enable = kvm_enable_cap { cap, args: [arg, 0, 0, 0], ..kvm_enable_cap::default() };
    raw::ioctl_with(vm, ioctl::ENABLE_CAP, &mut enable).map(drop)
}
