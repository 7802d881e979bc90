//! A vCPU's registers: those that TDCALL passes, and what TDVMCALLs ask of CPUID and MSRs.

use kvm_bindings::{
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry,
    kvm_regs,
};
use kvm_ioctls::VcpuFd;
use mapgpa_abi::tdcall::Regs;

use crate::platform::Cpu;

/// What TDVMCALLs ask of a vCPU.
pub(super) struct Registers<'a>(pub(super) &'a VcpuFd);

impl Cpu for Registers<'_> {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        let cpuid = self.0.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ok()?;
        let matches = |entry: &&kvm_cpuid_entry2| {
            let significant = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!significant || entry.index == subleaf)
        };
        let entry = cpuid.as_slice().iter().find(matches)?;
        Some([entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        (self.0.get_msrs(&mut msrs) == Ok(1)).then_some(())?;
        msrs.as_slice().first().map(|entry| entry.data)
    }

    fn write_msr(&self, index: u32, value: u64) -> bool {
        let entry = kvm_msr_entry { index, data: value, ..kvm_msr_entry::default() };
        Msrs::from_entries(&[entry]).is_ok_and(|msrs| self.0.set_msrs(&msrs) == Ok(1))
    }
}

/// The registers that TDCALL passes.
pub(super) const fn to_abi(regs: &kvm_regs) -> Regs {
    Regs {
        rax: regs.rax,
        rbx: regs.rbx,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
    }
}

/// The same, back; RIP, RSP, RBP and RFLAGS stay.
pub(super) const fn from_abi(from: &Regs, to: &mut kvm_regs) {
    to.rax = from.rax;
    to.rbx = from.rbx;
    to.rcx = from.rcx;
    to.rdx = from.rdx;
    to.rsi = from.rsi;
    to.rdi = from.rdi;
    to.r8 = from.r8;
    to.r9 = from.r9;
    to.r10 = from.r10;
    to.r11 = from.r11;
    to.r12 = from.r12;
    to.r13 = from.r13;
    to.r14 = from.r14;
    to.r15 = from.r15;
}

/// All of them, for a message.
pub(super) fn show(regs: &kvm_regs) -> String {
    format!(
        "rip={:#x} rflags={:#x} rsp={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} \
         rdi={:#x} rbp={:#x} r8={:#x} r9={:#x} r10={:#x} r11={:#x} r12={:#x} r13={:#x} r14={:#x} \
         r15={:#x}",
        regs.rip,
        regs.rflags,
        regs.rsp,
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
    )
}
