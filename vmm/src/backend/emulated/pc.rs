//! A VM for a kernel or a firmware: KVM's interrupt controllers and PIT, and vCPUs with a TDX guest's
//! CPUID, the first of them where the guest starts, the others waiting to be woken.

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use super::memory::Ram;
use super::vm::{Host, VmError, VmVcpu, add_memory, failed};
use crate::linux::cpuid;

/// Where KVM on Intel processors keeps pages of its own: in the hole below 4 GiB, below any firmware,
/// as in QEMU.
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;
const TSS_ADDRESS: usize = 0xfeff_d000;
/// IA32_APIC_BASE: APIC and x2APIC on.
const APIC_X2APIC: u64 = 1 << 11 | 1 << 10;
/// IA32_MISC_ENABLE, and its bit that says that string moves are fast.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);

/// The machine around a kernel or a firmware.
#[derive(Debug, Clone, Copy)]
pub struct MachineSetup<'a> {
    /// Size of its memory in bytes.
    pub memory: u64,
    /// Interrupt lines and the eventfds that raise them.
    pub interrupts: &'a [(u32, &'a EventFd)],
    /// Guests can use XSAVE here.
    pub xsave: bool,
    /// When it is ended at the latest, from its first instruction on.
    pub timeout: Duration,
}

/// The VM. Its memory is the caller's, and must outlive it.
pub(super) struct Pc<'a> {
    fd: VmFd,
    host: &'static Host,
    setup: MachineSetup<'a>,
    vcpus: u8,
    _ram: &'a Ram,
}

impl<'a> Pc<'a> {
    /// A VM with `ram` behind both aliases, and mappings of the VMM's own at their GPAs.
    pub(super) fn new(
        setup: MachineSetup<'a>,
        vcpus: u8,
        gpaw: u32,
        ram: &'a Ram,
        own: &[(u64, &'a MmapRegion)],
    ) -> Result<Self, VmError> {
        let host = Host::get()?;
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
        add_memory(&fd, ram, mapgpa_abi::shared_bit(gpaw), own, &[])?;
        Ok(Self { fd, host, setup, vcpus, _ram: ram })
    }

    /// Its vCPUs, of which `start` sets up the first.
    pub(super) fn vcpus(
        &self,
        start: impl FnOnce(&mut kvm_sregs) -> kvm_regs,
    ) -> Result<Vec<VmVcpu<'_>>, VmError> {
        let mut start = Some(start);
        (0..self.vcpus)
            .map(|index| {
                let mut vcpu = self.vcpu(index)?;
                if let Some(start) = start.take() {
                    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
                    let regs = start(&mut sregs);
                    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
                    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
                }
                vcpu.set_sync_valid_reg(SyncReg::Register);
                Ok(VmVcpu::new(vcpu, self))
            })
            .collect()
    }

    /// A vCPU as it is after a reset, which waits for INIT and SIPI unless it is the first.
    fn vcpu(&self, index: u8) -> Result<VcpuFd, VmError> {
        let vcpu = self.fd.create_vcpu(index.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        let wanted = cpuid::Wanted { tsc_khz, vcpus: self.vcpus, index, xsave: self.setup.xsave };
        let leaves = cpuid::leaves(self.host.cpuid().as_slice(), wanted);
        let cpuid =
            CpuId::from_entries(&leaves).map_err(|_| VmError::Lacks("room for CPUID leaves"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        sregs.apic_base |= APIC_X2APIC;
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        let (register, value) = MISC_ENABLE;
        let entry = kvm_msr_entry { index: register, data: value, ..kvm_msr_entry::default() };
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        }
        Ok(vcpu)
    }
}
