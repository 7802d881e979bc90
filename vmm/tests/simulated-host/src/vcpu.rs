//! A vCPU of a TD: its ioctls but KVM_RUN. The program sees a `struct kvm_run` of this library's, so that
//! no register of the guest's shows in it.
//!
//! Sources: Linux, arch/x86/kvm/x86.c (`kvm_arch_vcpu_ioctl` and what it calls, where
//! `has_protected_state` is looked at), arch/x86/kvm/vmx/tdx.c (`tdx_vcpu_init`, `tdx_has_emulated_msr`);
//! the initial state: TDX module base specification, "Initial state of guest GPRs" and the following, and
//! `intel/tdx-module`, src/common/data_structures/td_vmcs_init.c.

use std::sync::{Arc, Mutex};

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run,
    kvm_segment, kvm_sregs, kvm_vcpu_events,
};

use crate::faults::Runner;
use crate::log::refuse;
use crate::raw::{self, Mapping, OwnFd, Sys};
use crate::run::Pending;
use crate::td::{State, Td, lock};
use crate::uapi::{Cpuid2, TdxCmd, ioctl};
use crate::{cpuid, profile, tdx};

/// Address bits of a vCPU whose CPUID does not say (`cpuid_query_maxphyaddr`).
const ADDRESS_BITS: u32 = 36;
/// The local APIC at its place, enabled, in x2APIC mode; bit 8 is the boot processor's.
const APIC_BASE: u64 = 0xfee0_0000 | 1 << 11 | 1 << 10;

/// What caused a #VE: TDG.VP.VEINFO.GET.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct VeInfo {
    pub(crate) reason: u32,
    pub(crate) qualification: u64,
    pub(crate) gpa: u64,
    pub(crate) length: u32,
}

/// What is behind a vCPU's lock, which is held while it runs.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) initialized: bool,
    /// The how manieth of the TD it is, from 0.
    pub(crate) index: u32,
    /// CPUID as KVM_SET_CPUID2 has it.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// What KVM_RUN has to finish first.
    pub(crate) pending: Pending,
    /// The last #VE, until the guest asks for it.
    pub(crate) ve: Option<VeInfo>,
    /// KVM_RUNs in a row that a signal ended.
    pub(crate) interrupted: u32,
}

impl Inner {
    /// MAXPHYADDR as KVM takes it from the CPUID.
    pub(crate) fn address_bits(&self) -> u32 {
        cpuid::find(&self.cpuid, cpuid::ADDRESS_LEAF, 0)
            .map_or(ADDRESS_BITS, |leaf| leaf.eax & 0xff)
    }
}

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) td: Arc<Td>,
    pub(crate) fd: OwnFd,
    /// The kernel's `struct kvm_run`.
    real: Mapping,
    /// What the program maps.
    pub(crate) file: OwnFd,
    shown: Mapping,
    pub(crate) runner: Arc<Runner>,
    pub(crate) inner: Mutex<Inner>,
}

impl Vcpu {
    /// The vCPU `fd`, a descriptor that the program keeps.
    pub(crate) fn new(td: &Arc<Td>, fd: i32) -> Sys<Self> {
        // SAFETY: KVM_GET_VCPU_MMAP_SIZE has no argument.
        let size = unsafe { raw::ioctl(td.kvm.0, ioctl::GET_VCPU_MMAP_SIZE, 0) }?;
        let size = u64::try_from(size).map_err(|_| libc::EINVAL)?;
        let fd = raw::dup(fd)?;
        let real = Mapping::new(size, Some(&fd))?;
        let file = raw::memfd(c"kvm_run", size)?;
        let shown = Mapping::new(size, Some(&file))?;
        let inner = Inner {
            initialized: false,
            index: 0,
            cpuid: Vec::new(),
            pending: Pending::Nothing,
            ve: None,
            interrupted: 0,
        };
        let runner = Arc::default();
        Ok(Self { td: Arc::clone(td), fd, real, file, shown, runner, inner: Mutex::new(inner) })
    }

    /// The kernel's `struct kvm_run`; only the holder of the lock uses it.
    pub(crate) fn real(&self) -> *mut kvm_run {
        std::ptr::with_exposed_provenance_mut(self.real.at as usize)
    }

    /// The program's.
    pub(crate) fn shown(&self) -> *mut kvm_run {
        std::ptr::with_exposed_provenance_mut(self.shown.at as usize)
    }

    /// Whether KVM_TDX_INIT_VCPU is done.
    pub(crate) fn is_initialized(&self) -> bool {
        lock(&self.inner).initialized
    }

    /// An ioctl other than KVM_RUN.
    pub(crate) fn ioctl(&self, request: u64, arg: u64) -> Sys<i32> {
        let mut state = lock(&self.td.state);
        if state.dead {
            return refuse(libc::EIO, "the TD is dead");
        }
        let profile = profile::get();
        match request {
            ioctl::MEMORY_ENCRYPT_OP => tdx::vcpu_op(self, &mut state, arg),
            ioctl::SET_CPUID2 => {
                if profile.host_is("set-cpuid2") {
                    return refuse(libc::EINVAL, "KVM_SET_CPUID2");
                }
                if profile.makes("set-cpuid2", "skip") {
                    return Ok(0);
                }
                let header: Cpuid2 = raw::get(arg)?;
                let entries = tdx::entries_at(arg + size_of::<Cpuid2>() as u64, header.nent)?;
                self.below(request, arg)?;
                lock(&self.inner).cpuid = entries;
                Ok(0)
            }
            ioctl::GET_MSRS | ioctl::SET_MSRS => self.msrs(request, arg),
            ioctl::GET_CPUID2
            | ioctl::GET_MP_STATE
            | ioctl::SET_MP_STATE
            | ioctl::NMI
            | ioctl::GET_TSC_KHZ
            | ioctl::SET_SIGNAL_MASK => self.below(request, arg),
            ioctl::GET_REGS
            | ioctl::SET_REGS
            | ioctl::GET_SREGS
            | ioctl::SET_SREGS
            | ioctl::GET_SREGS2
            | ioctl::SET_SREGS2
            | ioctl::GET_FPU
            | ioctl::SET_FPU
            | ioctl::GET_LAPIC
            | ioctl::SET_LAPIC
            | ioctl::GET_DEBUGREGS
            | ioctl::SET_DEBUGREGS
            | ioctl::GET_XSAVE
            | ioctl::SET_XSAVE
            | ioctl::GET_XSAVE2
            | ioctl::GET_XCRS
            | ioctl::SET_XCRS
            | ioctl::SET_GUEST_DEBUG
            | ioctl::SET_TSC_KHZ => {
                refuse(libc::EINVAL, &format!("ioctl {request:#x}: the state of a TD is protected"))
            }
            _ => refuse(libc::ENOTTY, &format!("ioctl {request:#x} of a vCPU is not modelled")),
        }
    }

    /// The same request to the vCPU underneath.
    fn below(&self, request: u64, arg: u64) -> Sys<i32> {
        // SAFETY: the program's own argument for the same request.
        unsafe { raw::ioctl(self.fd.0, request, arg) }
    }

    /// KVM_GET_MSRS and KVM_SET_MSRS: up to the first that a TD's VMM has no business with.
    fn msrs(&self, request: u64, arg: u64) -> Sys<i32> {
        let count: u32 = raw::get(arg)?;
        for done in 0..count {
            let at = arg + 8 + u64::from(done) * size_of::<kvm_msr_entry>() as u64;
            let mut entry: kvm_msr_entry = raw::get(at)?;
            let result = if request == ioctl::SET_MSRS {
                self.write_msr(entry.index, entry.data)
            } else {
                self.read_msr(entry.index).map(|value| entry.data = value)
            };
            if result.is_none() {
                return Ok(done.cast_signed());
            }
            raw::put(at, &entry)?;
        }
        Ok(count.cast_signed())
    }

    /// An MSR that KVM emulates for TDs: `tdx_get_msr`.
    pub(crate) fn read_msr(&self, index: u32) -> Option<u64> {
        if !is_emulated(index) {
            return None;
        }
        let mut one = (1u32, 0u32, kvm_msr_entry { index, ..kvm_msr_entry::default() });
        let read = raw::ioctl_with(self.fd.0, ioctl::GET_MSRS, &mut one);
        (read == Ok(1)).then_some(one.2.data)
    }

    /// Writes one: `tdx_set_msr`.
    pub(crate) fn write_msr(&self, index: u32, data: u64) -> Option<()> {
        // IA32_APIC_BASE, EFER and IA32_FEAT_CTL are read-only.
        if !is_emulated(index) || matches!(index, 0x1b | 0xc000_0080 | 0x3a) {
            return None;
        }
        let mut one = (1u32, 0u32, kvm_msr_entry { index, data, ..kvm_msr_entry::default() });
        let written = raw::ioctl_with(self.fd.0, ioctl::SET_MSRS, &mut one);
        (written == Ok(1)).then_some(())
    }

    /// KVM_TDX_INIT_VCPU: `tdx_vcpu_init`.
    pub(crate) fn init(&self, state: &mut State, command: &TdxCmd) -> Sys<()> {
        let what = "KVM_TDX_INIT_VCPU";
        let mut inner = lock(&self.inner);
        if command.flags != 0 {
            return refuse(libc::EINVAL, &format!("{what}: flags"));
        }
        if inner.initialized {
            return refuse(libc::EINVAL, &format!("{what}: done already"));
        }
        let features = cpuid::find(&inner.cpuid, 1, 0);
        if features.is_none_or(|leaf| leaf.ecx & cpuid::X2APIC == 0) {
            return refuse(libc::EINVAL, &format!("{what}: no x2APIC in the CPUID of the vCPU"));
        }
        if profile::get().host_is("init-vcpu") {
            return refuse(libc::EIO, &format!("{what}: TDH.VP.CREATE failed"));
        }
        inner.index = state.initialized;
        self.reset(inner.index, state.gpaw, command.data)?;
        inner.initialized = true;
        state.initialized += 1;
        Ok(())
    }

    /// The initial state of a TD's vCPU.
    fn reset(&self, index: u32, gpaw: u32, rcx: u64) -> Sys<()> {
        let mut sregs = kvm_sregs::default();
        raw::ioctl_with(self.fd.0, ioctl::GET_SREGS, &mut sregs)?;
        let code = kvm_segment {
            limit: 0xffff_ffff,
            type_: 0xb,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let data = kvm_segment { type_: 0x3, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        let system = kvm_segment { limit: 0xffff, present: 1, ..kvm_segment::default() };
        sregs.tr = kvm_segment { type_: 0xb, ..system };
        sregs.ldt = kvm_segment { type_: 0x2, unusable: 1, ..system };
        sregs.gdt = kvm_dtable { limit: 0xffff, ..kvm_dtable::default() };
        sregs.idt = kvm_dtable::default();
        // PE and NE; MCE (VMXE is hidden); SCE, LME and NXE.
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x21, 0, 0x40, 0x901);
        if on_tcg() {
            sregs.cr4 |= 0x20;
        }
        sregs.apic_base = APIC_BASE | sregs.apic_base & 1 << 8;
        raw::ioctl_with(self.fd.0, ioctl::SET_SREGS, &mut sregs)?;
        let mut regs = kvm_regs {
            rip: 0xffff_fff0,
            rflags: 2,
            rbx: u64::from(gpaw),
            rcx,
            r8: rcx,
            rdx: u64::from(std::arch::x86_64::__cpuid(1).eax),
            rsi: u64::from(index),
            ..kvm_regs::default()
        };
        raw::ioctl_with(self.fd.0, ioctl::SET_REGS, &mut regs)?;
        self.set_mp_state(0)
    }

    /// KVM_SET_MP_STATE: 0 runs, 3 is halted.
    pub(crate) fn set_mp_state(&self, mp_state: u32) -> Sys<()> {
        raw::ioctl_with(self.fd.0, ioctl::SET_MP_STATE, &mut kvm_mp_state { mp_state }).map(drop)
    }

    /// What waits for this vCPU: its interrupt request register, and whether an NMI is pending.
    pub(crate) fn events(&self) -> Sys<([u8; 32], bool)> {
        let mut lapic = kvm_lapic_state::default();
        raw::ioctl_with(self.fd.0, ioctl::GET_LAPIC, &mut lapic)?;
        // Eight words at 0x200, 16 bytes apart.
        let irr = std::array::from_fn(|i| lapic.regs[0x200 + i / 4 * 16 + i % 4].cast_unsigned());
        let mut events = kvm_vcpu_events::default();
        raw::ioctl_with(self.fd.0, ioctl::GET_VCPU_EVENTS, &mut events)?;
        Ok((irr, events.nmi.pending != 0 || events.nmi.injected != 0))
    }
}

/// Whether this machine is QEMU's TCG. Its SVM does not come back from a guest with LME and without PAE
/// and paging: `cpu_x86_update_cr0` (target/i386/helper.c) looks at the guest's CR4 when it is to turn the
/// host's paging on again.
fn on_tcg() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
}

/// `tdx_has_emulated_msr`.
const fn is_emulated(index: u32) -> bool {
    match index {
        0x8b | 0x10a | 0x1fc | 0x277 | 0xfe | 0x2ff | 0x6e0 | 0x1a0 | 0xce | 0x140 | 0x1b
        | 0xc000_0080 | 0x3a | 0x179 | 0x17a | 0x17b | 0x4d0 | 0x4b56_4d05 => true,
        // MTRRs; banks of machine checks.
        0x200..=0x26f | 0x400..=0x47f | 0x280..=0x29f => true,
        // The x2APIC, without what the processor virtualizes: TPR, PPR, EOI, ISR, TMR, IRR.
        0x800..=0x8ff => !matches!(index, 0x808 | 0x80a | 0x80b | 0x810..=0x827),
        _ => false,
    }
}
