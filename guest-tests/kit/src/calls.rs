//! The TDCALLs that guest tests make, one function each, without any retry logic.

use mapgpa_abi::channel;
use mapgpa_abi::tdcall::{Regs, leaf, module, sub};

use crate::Td;

/// What a TDVMCALL returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmcallResult {
    /// R10: the completion status.
    pub r10: u64,
    /// R11: its meaning depends on the status.
    pub r11: u64,
}

/// What TDG.VP.INFO returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VpInfo {
    /// Guest-physical address width in bits; the shared bit is bit `gpaw - 1`.
    pub gpaw: u32,
    /// The TD's ATTRIBUTES.
    pub attributes: u64,
    /// Index of this vCPU, from 0.
    pub vcpu: u32,
}

/// TDG.VP.VMCALL\<MapGPA\>, once: `gpa` with or without the shared bit, `size` in bytes.
pub fn map_gpa(td: &mut impl Td, gpa: u64, size: u64) -> VmcallResult {
    let mut regs = Regs::vmcall(sub::MAP_GPA, gpa, size);
    td.tdcall(&mut regs);
    VmcallResult { r10: regs.r10, r11: regs.r11 }
}

/// TDG.MEM.PAGE.ACCEPT of the page of `level` (`abi::tdcall::level`) at `gpa`; returns RAX.
pub fn accept(td: &mut impl Td, gpa: u64, level: u64) -> u64 {
    let mut regs = Regs { rax: leaf::MEM_PAGE_ACCEPT, rcx: gpa | level, ..Regs::default() };
    td.tdcall(&mut regs);
    regs.rax
}

/// Whether RAX says that the page had been accepted before, at whatever level.
#[must_use]
pub fn already_accepted(rax: u64) -> bool {
    rax & module::STATUS_MASK == module::PAGE_ALREADY_ACCEPTED
}

/// TDG.VP.INFO.
pub fn vp_info(td: &mut impl Td) -> VpInfo {
    let mut regs = Regs { rax: leaf::VP_INFO, ..Regs::default() };
    td.tdcall(&mut regs);
    VpInfo {
        gpaw: (regs.rcx & 0x3f) as u32,
        attributes: regs.rdx,
        vcpu: (regs.r9 & 0xffff_ffff) as u32,
    }
}

/// Writes one 32-bit word to the guest channel, by TDVMCALL\<Instruction.IO\>.
pub fn channel_word(td: &mut impl Td, word: u32) {
    let mut regs =
        Regs { r14: u64::from(channel::PORT), r15: u64::from(word), ..Regs::vmcall(sub::IO, 4, 1) };
    td.tdcall(&mut regs);
}
