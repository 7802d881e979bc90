//! A VM for a kernel: KVM's interrupt controllers and PIT, vCPUs with a TDX guest's CPUID, the first
//! of them at the kernel's 64-bit entry point at CPL 0, the others waiting to be woken.

use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_dtable, kvm_msr_entry, kvm_pit_config, kvm_regs,
    kvm_segment,
};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};
use mapgpa_abi::PAGE_SIZE;
use vmm_sys_util::eventfd::EventFd;

use super::alias::AliasMemory;
use super::memory::Ram;
use super::userfaultfd::Userfaultfd;
use super::vcpu::Run;
use super::vm::{Host, VmError, VmVcpu, add_memory, failed, set_flat_segments};
use super::{EmulatedError, drive};
use crate::backend::End;
use crate::engine::{Engine, EventSink, Settings};
use crate::linux::boot::{self, Boot};
use crate::linux::cpuid;
use crate::linux::image::Kernel;
use crate::linux::machine::Machine;
use crate::pagemap::Pages;

/// Where KVM on Intel processors keeps pages of its own: below 4 GiB, in the hole.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// IA32_APIC_BASE: APIC and x2APIC on.
const APIC_X2APIC: u64 = 1 << 11 | 1 << 10;
/// IA32_MISC_ENABLE, and its bit that says that string moves are fast.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);

/// A kernel and the machine that it gets.
#[derive(Debug)]
pub struct KernelSetup<'a> {
    /// The kernel, its TDCALLs replaced.
    pub kernel: &'a Kernel,
    /// What it finds in memory, and where it starts.
    pub boot: &'a Boot<'a>,
    /// Size of its memory in bytes.
    pub memory: u64,
    /// Interrupt lines and the eventfds that raise them.
    pub interrupts: &'a [(u32, &'a EventFd)],
    /// Guests can use XSAVE here.
    pub xsave: bool,
    /// When it is ended at the latest, from its first instruction on.
    pub timeout: Duration,
}

/// Runs a kernel on `machine` until it ends or the time-out.
///
/// # Errors
/// The run could not begin; what fails later is in [`End::error`].
pub fn run_kernel<S: EventSink + Send>(
    setup: &KernelSetup<'_>,
    machine: &Machine,
    settings: Settings,
    sink: S,
) -> Result<End<S, EmulatedError>, EmulatedError> {
    let host = Host::get()?;
    host.check_gpaw(settings.gpaw)?;
    let ram = Ram::with_huge_pages(setup.memory)?;
    load(setup, &ram)?;
    let vm = KernelVm::new(host, setup, &ram, settings.gpaw)?;
    let vcpus = u8::try_from(settings.vcpus).unwrap_or(u8::MAX);
    let vcpu_fds = (0..vcpus)
        .map(|index| Ok(VmVcpu::new(vm.vcpu(setup, vcpus, index)?, &vm)))
        .collect::<Result<Vec<_>, VmError>>()?;
    let userfaultfd = Userfaultfd::open().ok();
    let memory = AliasMemory::new(&ram, userfaultfd.as_ref())?;
    let engine = Engine::new(settings, memory, sink);
    let run = Run::new(engine, &ram, machine, vcpus.into(), Instant::now() + setup.timeout);
    drive(run, userfaultfd.as_ref(), vcpu_fds)
}

/// Puts the kernel and its boot data into memory.
fn load(setup: &KernelSetup<'_>, ram: &Ram) -> Result<(), EmulatedError> {
    for segment in setup.boot.segments {
        let first = segment.address / PAGE_SIZE;
        let end = (segment.address + segment.size).div_ceil(PAGE_SIZE);
        ram.populate(Pages { first, count: end - first });
        let bytes = setup.kernel.elf.get(segment.file.clone()).unwrap_or(&[]);
        ram.write(segment.address, bytes)?;
    }
    for (gpa, bytes) in &setup.boot.writes {
        ram.write(*gpa, bytes)?;
    }
    Ok(())
}

/// The VM. RAM is the caller's, and must outlive it.
struct KernelVm<'a> {
    fd: VmFd,
    host: &'static Host,
    _ram: &'a Ram,
}

impl<'a> KernelVm<'a> {
    fn new(
        host: &'static Host,
        setup: &KernelSetup<'_>,
        ram: &'a Ram,
        gpaw: u32,
    ) -> Result<Self, VmError> {
        let fd = host.create_vm()?;
        fd.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        fd.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
        for (line, event) in setup.interrupts {
            fd.register_irqfd(event, *line).map_err(failed("KVM_IRQFD"))?;
        }
        add_memory(&fd, ram, mapgpa_abi::shared_bit(gpaw), &[], &[])?;
        Ok(Self { fd, host, _ram: ram })
    }

    /// Creates a vCPU: the first at the kernel's entry point, the others wait for INIT and SIPI.
    fn vcpu(&self, setup: &KernelSetup<'_>, vcpus: u8, index: u8) -> Result<VcpuFd, VmError> {
        let mut vcpu = self.fd.create_vcpu(index.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        let wanted = cpuid::Wanted { tsc_khz, vcpus, index, xsave: setup.xsave };
        let leaves = cpuid::leaves(self.host.cpuid().as_slice(), wanted);
        let cpuid =
            CpuId::from_entries(&leaves).map_err(|_| VmError::Lacks("room for CPUID leaves"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        sregs.apic_base |= APIC_X2APIC;
        if index == 0 {
            set_flat_segments(&mut sregs, boot::CODE, boot::DATA, 0);
            // A busy TSS, as long mode demands; nothing uses it.
            sregs.tr =
                kvm_segment { limit: 0x67, type_: 0b1011, present: 1, ..kvm_segment::default() };
            let (base, limit) = setup.boot.gdt;
            sregs.gdt = kvm_dtable { base, limit, ..kvm_dtable::default() };
            sregs.idt.limit = 0;
            // PE, MP, ET, NE, WP, PG; PAE; LME, LMA (Intel SDM 3A, 2.5 and 2.2.1).
            sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
            sregs.cr3 = setup.boot.page_tables;
            sregs.cr4 = 1 << 5;
            sregs.efer = 1 << 8 | 1 << 10;
        }
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        if index == 0 {
            let regs = kvm_regs {
                rip: setup.boot.entry,
                rsi: setup.boot.zero_page,
                rsp: setup.boot.stack,
                rflags: 1 << 1,
                ..kvm_regs::default()
            };
            vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
        }
        let (register, value) = MISC_ENABLE;
        let entry = kvm_msr_entry { index: register, data: value, ..kvm_msr_entry::default() };
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        }
        vcpu.set_sync_valid_reg(SyncReg::Register);
        Ok(vcpu)
    }
}
