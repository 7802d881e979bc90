//! The MapGPA call as the models issue it: each with the register mask of its original.

use mapgpa_kit::Td;
use mapgpa_kit::abi::tdcall::{Regs, sub};
use mapgpa_kit::calls::VmcallResult;

/// RCX of guests that pass R10 to R13 only: OpenVMM, SVSM, Oak, mushroom, gramine-tdx.
pub(crate) const R10_R13: u64 = 0x3c00;
/// RCX of guests that pass R10 to R15: Linux before v6.3, crates tdx-tdcall and tdx-guest.
pub(crate) const R10_R15: u64 = mapgpa_kit::abi::tdcall::MASK_R10_R15;
/// RCX of guests that pass RDX, RBX, RSI, RDI and R8 to R15, all but R10 to R13 zero: Linux since
/// v6.3 (TDVMCALL_EXPOSE_REGS_MASK in arch/x86/include/asm/shared/tdx.h), EDK2 (TdVmcall.nasm; its
/// first versions passed RBP too).
pub(crate) const ALL_BUT_RBP: u64 = 0xffcc;

/// TDG.VP.VMCALL\<MapGPA\>, once, with RCX = `mask`: `gpa` with or without the shared bit, `size`
/// as the guest puts it in R13.
///
/// RAX is not looked at: it is the TDX module's and says that the call itself was made, which no
/// policy changes.
#[inline]
pub(crate) fn map_gpa(td: &mut impl Td, mask: u64, gpa: u64, size: u64) -> VmcallResult {
    let mut regs = Regs { rcx: mask, ..Regs::vmcall(sub::MAP_GPA, gpa, size) };
    td.tdcall(&mut regs);
    VmcallResult { r10: regs.r10, r11: regs.r11 }
}
