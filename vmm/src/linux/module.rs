//! The TDCALLs of a kernel beside MapGPA and accept: what of the TDX module and of a host's VMM it
//! takes for Linux, and no more. GHCI and the TDX module ABI name the registers.

use mapgpa_abi::tdcall::{Regs, leaf, module, status, sub};
use mapgpa_abi::{Alias, PAGE_SIZE, shared_bit};

use super::machine::Machine;
use crate::engine::{Engine, Event, EventSink, Flow};
use crate::memory::{Contents, MemoryError};
use crate::platform::{Cpu, Platform};

/// TDX_NO_VALID_VE_INFO: no #VE has happened, as none ever does here.
const NO_VE_INFO: u64 = 0xc000_0704_0000_0000;
/// Operand number of RDX in the details of OPERAND_INVALID.
const OPERAND_RDX: u64 = 2;
/// Metadata fields that Linux reads or writes (arch/x86/include/asm/shared/tdx.h): CONFIG_FLAGS,
/// TD_CTLS, NOTIFY_ENABLES, TOPOLOGY_ENUM_CONFIGURED.
const FIELDS: [u64; 4] =
    [0x1110_0003_0000_0016, 0x1110_0003_0000_0017, 0x9100_0000_0000_0010, 0x9100_0000_0000_0019];
/// Bytes of a TDREPORT.
const REPORT_SIZE: usize = 1024;
/// Where REPORTDATA is in it, and its size.
const REPORT_DATA: (usize, usize) = (128, 64);
/// REPORTTYPE of a TD, in the first byte.
const REPORT_TYPE_TDX: u8 = 0x81;
/// GET_QUOTE_SERVICE_UNAVAILABLE, in a quote buffer's status (GHCI, GetQuote).
const NO_QUOTES: u64 = 0x8000_0000_0000_0001;
/// A quote buffer's header: version, status, length in, length out.
const QUOTE_HEADER: usize = 24;
/// Vectors that an event may be notified by.
const VECTORS: std::ops::RangeInclusive<u64> = 32..=255;

/// Answers a TDCALL leaf.
///
/// # Errors
/// Guest memory could not be reached.
pub(crate) fn leaf<M: Contents, S: EventSink>(
    machine: &Machine,
    engine: &mut Engine<M, S>,
    regs: &mut Regs,
) -> Result<Option<Flow>, MemoryError> {
    let mut flow = Flow::Continue;
    regs.rax = match regs.rax {
        leaf::MR_REPORT => {
            let (report, data) = (regs.rcx, regs.rdx);
            let mut bytes = [0; REPORT_SIZE];
            bytes[0] = REPORT_TYPE_TDX;
            let slot = &mut bytes[REPORT_DATA.0..REPORT_DATA.0 + REPORT_DATA.1];
            match (private(engine, data), private(engine, report)) {
                (Err(stop), _) | (_, Err(stop)) => flow = stop,
                (Ok(()), Ok(())) => {}
            }
            let memory = engine.memory();
            if !memory.read(data, Alias::Private, slot)? {
                module::OPERAND_INVALID | OPERAND_RDX
            } else if !memory.write(report, Alias::Private, &bytes)? {
                module::OPERAND_INVALID | module::OPERAND_RCX
            } else {
                module::SUCCESS
            }
        }
        leaf::MR_RTMR_EXTEND => {
            if let Err(stop) = private(engine, regs.rcx) {
                flow = stop;
            }
            module::SUCCESS
        }
        leaf::VP_VEINFO_GET => NO_VE_INFO,
        leaf::VM_RD | leaf::VM_WR if !FIELDS.contains(&regs.rdx) => {
            flow = engine.odd(&format!("unknown metadata field of the TD: {regs:x?}"));
            module::OPERAND_INVALID | OPERAND_RDX
        }
        leaf::VM_RD => {
            regs.r8 = machine.field(regs.rdx, 0, 0);
            module::SUCCESS
        }
        leaf::VM_WR => {
            regs.r8 = machine.field(regs.rdx, regs.r8, regs.r9);
            module::SUCCESS
        }
        _ => return Ok(None),
    };
    Ok(Some(flow))
}

/// Books a use of the private page at `gpa` by the TDX module on the guest's behalf.
fn private<M: Contents, S: EventSink>(engine: &mut Engine<M, S>, gpa: u64) -> Result<(), Flow> {
    match engine.touch(gpa & !(PAGE_SIZE - 1)) {
        Err(Flow::Stop) => Err(Flow::Stop),
        // Booked as a violation; the call goes on as if nothing had been.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Answers a TDVMCALL; ports and device registers are `platform`'s.
///
/// # Errors
/// Guest memory could not be reached.
#[expect(
    clippy::cast_possible_truncation,
    reason = "registers of 32 bits and less, as GHCI has it"
)]
pub(crate) fn vmcall<M: Contents, S: EventSink>(
    platform: &impl Platform<M, S>,
    engine: &mut Engine<M, S>,
    vcpu: u32,
    regs: &mut Regs,
    cpu: &dyn Cpu,
) -> Result<Option<Flow>, MemoryError> {
    let mut flow = Flow::Continue;
    let (mut code, mut value) = (status::SUCCESS, 0);
    match regs.r11 {
        sub::CPUID => {
            let [eax, ebx, ecx, edx] =
                cpu.cpuid(regs.r12 as u32, regs.r13 as u32).unwrap_or_default();
            (regs.r12, regs.r13) = (eax.into(), ebx.into());
            (regs.r14, regs.r15) = (ecx.into(), edx.into());
        }
        sub::IO => (value, flow) = io(platform, engine, vcpu, regs)?,
        sub::RDMSR => match cpu.read_msr(regs.r12 as u32) {
            Some(msr) => value = msr,
            None => code = status::INVALID_OPERAND,
        },
        sub::WRMSR => {
            if !cpu.write_msr(regs.r12 as u32, regs.r13) {
                code = status::INVALID_OPERAND;
            }
        }
        sub::REQUEST_MMIO => (value, flow) = mmio(platform, engine, vcpu, regs),
        sub::GET_TDVMCALL_INFO => (regs.r12, regs.r13, regs.r14) = (0, 0, 0),
        sub::GET_QUOTE => code = get_quote(engine, regs.r12, regs.r13)?,
        sub::SETUP_EVENT_NOTIFY if VECTORS.contains(&regs.r12) => {}
        sub::SETUP_EVENT_NOTIFY => code = status::INVALID_OPERAND,
        sub::REPORT_FATAL_ERROR => {
            let words =
                [regs.r14, regs.r15, regs.rbx, regs.rdi, regs.rsi, regs.r8, regs.r9, regs.rdx];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim_end_matches('\0');
            engine.moved_on(vcpu);
            engine.emit(&Event::Panic {
                text: &format!("it reports fatal error {:#x} to the VMM: {text:?}", regs.r12),
            });
            flow = Flow::Stop;
        }
        _ => return Ok(None),
    }
    (regs.r10, regs.r11) = (code, value);
    Ok(Some(flow))
}

/// Instruction.IO: what was read, or 0.
#[expect(clippy::cast_possible_truncation, reason = "ports have 16 bits")]
fn io<M: Contents, S: EventSink>(
    platform: &impl Platform<M, S>,
    engine: &mut Engine<M, S>,
    vcpu: u32,
    regs: &Regs,
) -> Result<(u64, Flow), MemoryError> {
    let port = regs.r14 as u16;
    let size = regs.r12.clamp(1, 4) as usize;
    if regs.r13 == 0 {
        let mut data = [0; 8];
        if !platform.read_port(port, &mut data[..size]) {
            return Ok((ones(regs.r12), Flow::Continue));
        }
        return Ok((u64::from_le_bytes(data), Flow::Continue));
    }
    let data = regs.r15.to_le_bytes();
    let flow = platform.write_port(engine, vcpu, port, &data[..size])?;
    Ok((0, flow.unwrap_or(Flow::Continue)))
}

/// #VE.RequestMMIO: what was read, or 0; all ones where no device is.
fn mmio<M: Contents, S: EventSink>(
    platform: &impl Platform<M, S>,
    engine: &mut Engine<M, S>,
    vcpu: u32,
    regs: &Regs,
) -> (u64, Flow) {
    let size = usize::try_from(regs.r12.clamp(1, 8)).unwrap_or(8);
    let (write, gpa) = (regs.r13 != 0, regs.r14);
    let mut data = if write { regs.r15.to_le_bytes() } else { [0; 8] };
    let there = if write {
        platform.write_mmio(gpa, &data[..size])
    } else {
        platform.read_mmio(gpa, &mut data[..size])
    };
    match (there, write) {
        (true, true) => (0, Flow::Continue),
        (true, false) => (u64::from_le_bytes(data), Flow::Continue),
        (false, _) => {
            let flow = platform.nowhere(engine, vcpu, gpa).unwrap_or(Flow::Continue);
            (if write { 0 } else { ones(regs.r12) }, flow)
        }
    }
}

/// All ones in `size` bytes.
const fn ones(size: u64) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// GetQuote: there is nobody to quote, which is said in the buffer's header. R10 of the reply.
fn get_quote<M: Contents, S: EventSink>(
    engine: &mut Engine<M, S>,
    raw_gpa: u64,
    size: u64,
) -> Result<u64, MemoryError> {
    let bit = shared_bit(engine.settings().gpaw);
    let gpa = raw_gpa & !bit;
    if !(gpa | size).is_multiple_of(PAGE_SIZE) || size == 0 {
        return Ok(status::INVALID_OPERAND);
    }
    // The host reads and writes the buffer, so it has to be shared, whatever bit the guest passed.
    if engine.touch(gpa | bit).is_err() {
        return Ok(status::INVALID_OPERAND);
    }
    let mut header = [0; QUOTE_HEADER];
    if !engine.memory().read(gpa, Alias::Shared, &mut header)? {
        return Ok(status::INVALID_OPERAND);
    }
    header[8..16].copy_from_slice(&NO_QUOTES.to_le_bytes());
    header[20..24].copy_from_slice(&0u32.to_le_bytes());
    engine.memory().write(gpa, Alias::Shared, &header)?;
    Ok(status::SUCCESS)
}
