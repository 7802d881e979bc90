//! TDCALL as the emulated TDX module answers it: registers in, the call that they mean, registers
//! out. What is not about pages is the platform's ([`crate::platform`]) to answer.

use mapgpa_abi::channel;
use mapgpa_abi::tdcall::{ATTR_SEPT_VE_DISABLE, Regs, leaf, module, status, sub};

use crate::engine::{Engine, EventSink, Flow};
use crate::memory::{Memory, MemoryError};
use crate::platform::{Cpu, Platform};

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
    platform: &impl Platform<M, S>,
    cpu: &dyn Cpu,
) -> Result<Flow, MemoryError> {
    match regs.rax {
        leaf::VP_VMCALL => vmcall(engine, vcpu, regs, platform, cpu),
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
            if let Some(flow) = platform.leaf(engine, vcpu, regs)? {
                return Ok(flow);
            }
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
    platform: &impl Platform<M, S>,
    cpu: &dyn Cpu,
) -> Result<Flow, MemoryError> {
    let mask = regs.rcx;
    if mask & MASK_RESERVED != 0 {
        regs.rax = module::OPERAND_INVALID | module::OPERAND_RCX;
        return Ok(
            engine.odd(&format!("TDVMCALL with a reserved bit in RCX on vCPU {vcpu}: {regs:x?}"))
        );
    }
    let mut call = Regs::default();
    pass(mask, regs, &mut call);
    let flow = match (call.r10, call.r11) {
        (0, sub::MAP_GPA) => {
            let reply = engine.map_gpa(vcpu, call.r12, call.r13)?;
            (call.r10, call.r11) = (reply.status, reply.r11);
            reply.flow
        }
        (0, sub::IO) if is_channel(&call) => {
            #[expect(clippy::cast_possible_truncation, reason = "4 bytes were written")]
            let word = call.r15 as u32;
            (call.r10, call.r11) = (status::SUCCESS, 0);
            engine.channel_word(vcpu, word)
        }
        (0, sub::HLT) => {
            platform.idle(engine, vcpu);
            (call.r10, call.r11) = (status::SUCCESS, 0);
            Flow::Idle
        }
        (0, _) => match platform.vmcall(engine, vcpu, &mut call, cpu)? {
            Some(flow) => flow,
            None => unknown(engine, vcpu, &mut call, regs),
        },
        _ => unknown(engine, vcpu, &mut call, regs),
    };
    regs.rax = module::SUCCESS;
    pass(mask, &call, regs);
    Ok(flow)
}

/// Answers a TDVMCALL that nobody knows; `regs` is for the note.
fn unknown<M: Memory, S: EventSink>(
    engine: &mut Engine<M, S>,
    vcpu: u32,
    call: &mut Regs,
    regs: &Regs,
) -> Flow {
    let (standard, number) = (call.r10, call.r11);
    if (standard, number) == (0, sub::IO) {
        let (size, port) = (call.r12, call.r14);
        (call.r10, call.r11) = (status::SUCCESS, u64::MAX);
        return engine.odd(&format!(
            "I/O of {size} bytes at port {port:#x}, where no device is, on vCPU {vcpu}"
        ));
    }
    call.r10 = if standard == 0 { status::SUBFUNC_UNSUPPORTED } else { status::INVALID_OPERAND };
    call.r11 = 0;
    engine
        .odd(&format!("unknown TDVMCALL {number:#x} (R10 {standard:#x}) on vCPU {vcpu}: {regs:x?}"))
}

/// Whether Instruction.IO writes a word to the guest channel.
fn is_channel(call: &Regs) -> bool {
    (call.r12, call.r13, call.r14) == (4, 1, u64::from(channel::PORT))
}

/// Copies the registers that `mask` passes, RCX's bits of a TDVMCALL.
fn pass(mask: u64, from: &Regs, to: &mut Regs) {
    for (register, from, to) in [
        (2, from.rdx, &mut to.rdx),
        (3, from.rbx, &mut to.rbx),
        (6, from.rsi, &mut to.rsi),
        (7, from.rdi, &mut to.rdi),
        (8, from.r8, &mut to.r8),
        (9, from.r9, &mut to.r9),
        (10, from.r10, &mut to.r10),
        (11, from.r11, &mut to.r11),
        (12, from.r12, &mut to.r12),
        (13, from.r13, &mut to.r13),
        (14, from.r14, &mut to.r14),
        (15, from.r15, &mut to.r15),
    ] {
        if mask >> register & 1 != 0 {
            *to = from;
        }
    }
}
