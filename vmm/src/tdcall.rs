//! TDCALL as the emulated TDX module answers it: registers in, the call that they mean, registers
//! out.

use mapgpa_abi::channel;
use mapgpa_abi::tdcall::{ATTR_SEPT_VE_DISABLE, Regs, leaf, module, status, sub};

use crate::engine::{Engine, EventSink, Flow};
use crate::memory::{Memory, MemoryError};

/// Bits of a TDVMCALL's RCX that must be clear: RAX, RCX, RSP, and what is no register (TDX module
/// ABI, TDG.VP.VMCALL).
const MASK_RESERVED: u64 = !0xffff_ffff | 1 << 0 | 1 << 1 | 1 << 4;

/// Answers a TDCALL that `vcpu` made with `regs`, in place.
///
/// # Errors
/// A host call failed.
pub fn tdcall<M: Memory, S: EventSink>(
    engine: &mut Engine<M, S>,
    vcpu: u32,
    regs: &mut Regs,
) -> Result<Flow, MemoryError> {
    match regs.rax {
        leaf::VP_VMCALL => vmcall(engine, vcpu, regs),
        leaf::MEM_PAGE_ACCEPT => {
            let (answer, flow) = engine.accept(vcpu, regs.rcx)?;
            regs.rax = answer.unwrap_or(regs.rax);
            Ok(flow)
        }
        leaf::VP_INFO => {
            let vcpus = engine.settings().vcpus as u64;
            regs.rax = module::SUCCESS;
            regs.rcx = u64::from(engine.settings().gpaw);
            regs.rdx = ATTR_SEPT_VE_DISABLE;
            regs.r8 = vcpus << 32 | vcpus;
            regs.r9 = vcpu.into();
            (regs.r10, regs.r11) = (0, 0);
            Ok(Flow::Continue)
        }
        unknown => {
            let flow =
                engine.odd(&format!("unknown TDCALL leaf {unknown:#x} on vCPU {vcpu}: {regs:x?}"));
            regs.rax = module::OPERAND_INVALID | module::OPERAND_RAX;
            Ok(flow)
        }
    }
}

/// Answers a TDVMCALL. Registers that RCX does not pass on read as 0, and are not written.
fn vmcall<M: Memory, S: EventSink>(
    engine: &mut Engine<M, S>,
    vcpu: u32,
    regs: &mut Regs,
) -> Result<Flow, MemoryError> {
    let mask = regs.rcx;
    if mask & MASK_RESERVED != 0 {
        regs.rax = module::OPERAND_INVALID | module::OPERAND_RCX;
        return Ok(
            engine.odd(&format!("TDVMCALL with a reserved bit in RCX on vCPU {vcpu}: {regs:x?}"))
        );
    }
    let passed = |register: u32, value: u64| if mask >> register & 1 == 0 { 0 } else { value };
    regs.rax = module::SUCCESS;
    let (r12, r13) = (passed(12, regs.r12), passed(13, regs.r13));
    let (code, value, flow) = match (passed(10, regs.r10), passed(11, regs.r11)) {
        (0, sub::MAP_GPA) => {
            let reply = engine.map_gpa(vcpu, r12, r13)?;
            (reply.status, reply.r11, reply.flow)
        }
        (0, sub::IO) => {
            let port = passed(14, regs.r14);
            // 4 bytes, written, to the channel: anything else is a device that is not there.
            if (r12, r13, port) == (4, 1, u64::from(channel::PORT)) {
                #[expect(clippy::cast_possible_truncation, reason = "4 bytes were written")]
                let word = passed(15, regs.r15) as u32;
                (status::SUCCESS, 0, engine.channel_word(vcpu, word))
            } else {
                let flow = engine.odd(&format!(
                    "I/O of {r12} bytes at port {port:#x}, where no device is, on vCPU {vcpu}"
                ));
                (status::SUCCESS, u64::MAX, flow)
            }
        }
        (0, sub::HLT) => (status::SUCCESS, 0, Flow::Idle),
        (standard, unknown) => {
            let code =
                if standard == 0 { status::SUBFUNC_UNSUPPORTED } else { status::INVALID_OPERAND };
            let flow = engine.odd(&format!(
                "unknown TDVMCALL {unknown:#x} (R10 {standard:#x}) on vCPU {vcpu}: {regs:x?}"
            ));
            (code, 0, flow)
        }
    };
    for (register, slot, value) in [(10, &mut regs.r10, code), (11, &mut regs.r11, value)] {
        if mask >> register & 1 != 0 {
            *slot = value;
        }
    }
    Ok(flow)
}
