//! TDCALL: the instruction, its leaves, the TDVMCALL sub-functions and the status codes.

/// The TDCALL instruction (Intel SDM, TDCALL).
pub const INSTRUCTION: [u8; 4] = [0x66, 0x0f, 0x01, 0xcc];
/// The port of the `out` that stands for TDCALL in an emulated TD. 0xe5 is no PC device's.
pub const TRAP_PORT: u16 = 0xe5;
/// What the loader writes over [`INSTRUCTION`]: `out TRAP_PORT, al` and a two-byte nop.
pub const TRAP: [u8; 4] = [0xe6, 0xe5, 0x66, 0x90];

/// TDCALL leaves, in RAX (TDX module ABI, "TDCALL instruction leaf numbers").
pub mod leaf {
    /// TDG.VP.VMCALL: call the VMM.
    pub const VP_VMCALL: u64 = 0;
    /// TDG.VP.INFO: GPAW, attributes and vCPU numbers.
    pub const VP_INFO: u64 = 1;
    /// TDG.MR.RTMR.EXTEND: extend a measurement register.
    pub const MR_RTMR_EXTEND: u64 = 2;
    /// TDG.VP.VEINFO.GET: what caused the last #VE.
    pub const VP_VEINFO_GET: u64 = 3;
    /// TDG.MR.REPORT: create a TDREPORT.
    pub const MR_REPORT: u64 = 4;
    /// TDG.MEM.PAGE.ACCEPT: accept a pending private page.
    pub const MEM_PAGE_ACCEPT: u64 = 6;
    /// TDG.VM.RD: read a TD-scope metadata field.
    pub const VM_RD: u64 = 7;
    /// TDG.VM.WR: write a TD-scope metadata field.
    pub const VM_WR: u64 = 8;
}

/// TDVMCALL sub-functions, in R11 when R10 is 0 (GHCI 3, "TDG.VP.VMCALL sub-functions").
pub mod sub {
    /// Instruction.CPUID.
    pub const CPUID: u64 = 10;
    /// Instruction.HLT.
    pub const HLT: u64 = 12;
    /// Instruction.IO: R12 size in bytes, R13 direction (1 writes), R14 port, R15 data.
    pub const IO: u64 = 30;
    /// Instruction.RDMSR.
    pub const RDMSR: u64 = 31;
    /// Instruction.WRMSR.
    pub const WRMSR: u64 = 32;
    /// #VE.RequestMMIO.
    pub const REQUEST_MMIO: u64 = 48;
    /// GetTdVmCallInfo.
    pub const GET_TDVMCALL_INFO: u64 = 0x10000;
    /// MapGPA: R12 start GPA with or without the shared bit, R13 size in bytes.
    pub const MAP_GPA: u64 = 0x10001;
    /// GetQuote.
    pub const GET_QUOTE: u64 = 0x10002;
    /// ReportFatalError.
    pub const REPORT_FATAL_ERROR: u64 = 0x10003;
    /// SetupEventNotifyInterrupt.
    pub const SETUP_EVENT_NOTIFY: u64 = 0x10004;
}

/// Completion statuses of a TDVMCALL, in R10 (GHCI, table "TDCALL completion-status codes").
pub mod status {
    /// Done.
    pub const SUCCESS: u64 = 0;
    /// A part is done; R11 is the GPA to restart from.
    pub const RETRY: u64 = 1;
    /// An operand is invalid.
    pub const INVALID_OPERAND: u64 = 0x8000_0000_0000_0000;
    /// The GPA in R11 is in use.
    pub const GPA_INUSE: u64 = 0x8000_0000_0000_0001;
    /// Start or size is not 4 KiB aligned.
    pub const ALIGN_ERROR: u64 = 0x8000_0000_0000_0002;
    /// The sub-function is not implemented (newer GHCI).
    pub const SUBFUNC_UNSUPPORTED: u64 = 0x8000_0000_0000_0003;
}

/// TDX module completion statuses, in RAX; the low 32 bits carry details such as the operand or
/// level (TDX module ABI, "Function completion status codes").
pub mod module {
    /// TDX_SUCCESS.
    pub const SUCCESS: u64 = 0;
    /// TDX_OPERAND_INVALID; the low bits name the operand.
    pub const OPERAND_INVALID: u64 = 0xc000_0100_0000_0000;
    /// TDX_PAGE_ALREADY_ACCEPTED; the low bits carry the level.
    pub const PAGE_ALREADY_ACCEPTED: u64 = 0x0000_0b0a_0000_0000;
    /// TDX_PAGE_SIZE_MISMATCH; the low bits carry the level.
    pub const PAGE_SIZE_MISMATCH: u64 = 0xc000_0b0b_0000_0000;
    /// TDX_OPERAND_BUSY: another vCPU or the host has hold of what the call needs, such as the page's
    /// secure EPT entry; the same call may succeed later.
    pub const OPERAND_BUSY: u64 = 0x8000_0200_0000_0000;
    /// The bits that tell one status from another, without the details.
    pub const STATUS_MASK: u64 = 0xffff_ffff_0000_0000;
    /// Bit 63: the function failed.
    pub const ERROR_BIT: u64 = 1 << 63;
    /// Operand number of RAX in the details of [`OPERAND_INVALID`].
    pub const OPERAND_RAX: u64 = 0;
    /// Operand number of RCX in the details of [`OPERAND_INVALID`].
    pub const OPERAND_RCX: u64 = 1;
}

/// ATTRIBUTES.SEPT_VE_DISABLE in TDG.VP.INFO's RDX: no #VE on a page that is not there. Linux
/// refuses to run without it (arch/x86/coco/tdx/tdx.c).
pub const ATTR_SEPT_VE_DISABLE: u64 = 1 << 28;

/// RCX of a TDVMCALL that passes R10 to R15, as MapGPA and Instruction.IO do.
pub const MASK_R10_R15: u64 = 0xfc00;

/// The general registers that TDCALL reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
#[expect(missing_docs, reason = "the names are the registers")]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

impl Regs {
    /// The registers of TDVMCALL `sub` with R12 and R13, all of R10 to R15 passed.
    #[must_use]
    pub fn vmcall(sub: u64, r12: u64, r13: u64) -> Self {
        Self { rax: leaf::VP_VMCALL, rcx: MASK_R10_R15, r11: sub, r12, r13, ..Self::default() }
    }
}

/// Page sizes of TDG.MEM.PAGE.ACCEPT, in RCX\[2:0\].
pub mod level {
    /// 4 KiB.
    pub const L4K: u64 = 0;
    /// 2 MiB.
    pub const L2M: u64 = 1;
    /// 1 GiB: the operand exists, but accept takes 4 KiB and 2 MiB only.
    pub const L1G: u64 = 2;
}
