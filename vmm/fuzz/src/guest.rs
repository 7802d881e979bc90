//! Any registers and any sequence of exits: TDCALLs, channel words, accepts, touches, port I/O, on
//! the platform of a guest test and on that of a kernel, under any of the suite's policies, with the
//! judge and the recorder listening.

use arbitrary::{Arbitrary, Result, Unstructured};
use mapgpa::engine::{Engine, EventSink, Flow, FrontEnd, Settings};
use mapgpa::judge::{Judge, Rules};
use mapgpa::linux::machine::{Machine, Until};
use mapgpa::memory::{Contents, Memory, MemoryError};
use mapgpa::pagemap::{PageMap, Pages};
use mapgpa::patch::Patched;
use mapgpa::platform::{Bare, Cpu, Platform};
use mapgpa::policy::Policy;
use mapgpa::report::Recorder;
use mapgpa::suite::POLICIES;
use mapgpa::tdcall::tdcall;
use mapgpa_abi::tdcall::{Regs, leaf, level, module, sub};
use mapgpa_abi::{Alias, Direction, PAGE_SIZE, channel, shared_bit};
use mapgpa_kvm_model::Kernel;

/// Bytes of guest memory; the rest is nowhere.
const MEMORY: u64 = 1 << 30;
const FRONT_ENDS: [FrontEnd; 4] =
    [FrontEnd::Direct, FrontEnd::Direct, FrontEnd::Kvm(Kernel::V6_16), FrontEnd::Kvm(Kernel::V7_2)];

/// Memory that has no contents: reads give zeroes.
struct NoMemory;

impl Memory for NoMemory {
    fn convert(
        &mut self,
        run: Pages,
        _: Direction,
        _: bool,
        _: &PageMap,
    ) -> std::result::Result<(), MemoryError> {
        assert_ne!(run.count, 0);
        Ok(())
    }

    fn accept(&mut self, run: Pages, _: &PageMap) -> std::result::Result<(), MemoryError> {
        assert_ne!(run.count, 0);
        Ok(())
    }
}

fn inside(gpa: u64, bytes: &[u8]) -> bool {
    gpa.checked_add(bytes.len() as u64).is_some_and(|end| end <= MEMORY)
}

impl Contents for NoMemory {
    fn read(
        &mut self,
        gpa: u64,
        _: Alias,
        bytes: &mut [u8],
    ) -> std::result::Result<bool, MemoryError> {
        bytes.fill(0);
        Ok(inside(gpa, bytes))
    }

    fn write(
        &mut self,
        gpa: u64,
        _: Alias,
        bytes: &[u8],
    ) -> std::result::Result<bool, MemoryError> {
        Ok(inside(gpa, bytes))
    }

    fn patch(&mut self, _: Pages) -> std::result::Result<Patched, MemoryError> {
        Ok(Patched::default())
    }

    fn find_tdcall(&mut self, _: Pages) -> std::result::Result<Option<u64>, MemoryError> {
        Ok(None)
    }
}

/// A CPU that knows even leaves and registers.
struct HalfCpu;

impl Cpu for HalfCpu {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        leaf.is_multiple_of(2).then_some([leaf, subleaf, u32::MAX, 0])
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        index.is_multiple_of(2).then_some(u64::MAX)
    }

    fn write_msr(&self, index: u32, _: u64) -> bool {
        index.is_multiple_of(2)
    }
}

/// A value for a register: mostly near what is special.
fn value(input: &mut Unstructured<'_>, bit: u64) -> Result<u64> {
    const GPA: u64 = 16 << 20;
    let near = match input.int_in_range(0..=9)? {
        0 => return u64::arbitrary(input),
        1 => 0,
        2 => GPA,
        3 => bit | GPA,
        4 => bit,
        5 => bit << 1,
        6 => MEMORY,
        7 => 2 << 20,
        8 => return Ok(bit * u64::from(bool::arbitrary(input)?) + GPA + page(input)?),
        _ => return Ok((1 + page(input)? / PAGE_SIZE % 600) * PAGE_SIZE),
    };
    let off = i64::from(i8::arbitrary(input)?);
    Ok(near.wrapping_add_signed(if bool::arbitrary(input)? { off } else { off << 12 }))
}

fn page(input: &mut Unstructured<'_>) -> Result<u64> {
    Ok(u64::from(u16::arbitrary(input)? % 2048) * PAGE_SIZE)
}

fn registers(input: &mut Unstructured<'_>, bit: u64) -> Result<Regs> {
    Ok(Regs {
        rax: value(input, bit)?,
        rbx: value(input, bit)?,
        rcx: u64::arbitrary(input)?,
        rdx: value(input, bit)?,
        rsi: value(input, bit)?,
        rdi: value(input, bit)?,
        r8: value(input, bit)?,
        r9: value(input, bit)?,
        r10: u64::from(u8::arbitrary(input)? % 2),
        r11: value(input, bit)?,
        r12: value(input, bit)?,
        r13: value(input, bit)?,
        r14: value(input, bit)?,
        r15: value(input, bit)?,
    })
}

/// The registers of a TDCALL.
fn call(input: &mut Unstructured<'_>, bit: u64) -> Result<Regs> {
    Ok(match input.int_in_range(0..=7)? {
        0..=2 => Regs::vmcall(sub::MAP_GPA, value(input, bit)?, value(input, bit)?),
        3 => {
            let rcx = value(input, bit)? & !0xfff | input.int_in_range(0..=level::L1G)?;
            Regs { rax: leaf::MEM_PAGE_ACCEPT, rcx, ..Regs::default() }
        }
        4 => {
            let word = u32::arbitrary(input)?;
            Regs { r14: channel::PORT.into(), r15: word.into(), ..Regs::vmcall(sub::IO, 4, 1) }
        }
        5 => {
            let subs = [
                sub::CPUID,
                sub::HLT,
                sub::IO,
                sub::RDMSR,
                sub::WRMSR,
                sub::REQUEST_MMIO,
                sub::GET_TDVMCALL_INFO,
                sub::GET_QUOTE,
                sub::REPORT_FATAL_ERROR,
                sub::SETUP_EVENT_NOTIFY,
            ];
            let r11 = *input.choose(&subs)?;
            Regs { rax: 0, rcx: 0xffec, r10: 0, r11, ..registers(input, bit)? }
        }
        6 => Regs { rax: input.int_in_range(0..=9)?, ..registers(input, bit)? },
        _ => registers(input, bit)?,
    })
}

/// The registers that a TDVMCALL does not pass are as they were.
fn held(before: &Regs, after: &Regs) {
    if before.rax != leaf::VP_VMCALL {
        return;
    }
    assert!(after.rax == module::SUCCESS || after.rax & module::ERROR_BIT != 0);
    assert_eq!(before.rcx, after.rcx);
    for (passed, before, after) in [
        (2, before.rdx, after.rdx),
        (3, before.rbx, after.rbx),
        (6, before.rsi, after.rsi),
        (7, before.rdi, after.rdi),
        (8, before.r8, after.r8),
        (9, before.r9, after.r9),
        (10, before.r10, after.r10),
        (11, before.r11, after.r11),
        (12, before.r12, after.r12),
        (13, before.r13, after.r13),
        (14, before.r14, after.r14),
        (15, before.r15, after.r15),
    ]
    .map(|(bit, old, new)| (before.rcx >> bit & 1 != 0, old, new))
    {
        assert!(passed || before == after, "a register that was not passed has changed");
    }
}

/// Runs a guest that `data` describes.
pub fn run(data: &[u8]) {
    // A description that ends early is a guest that ends early.
    let _ = guest(&mut Unstructured::new(data));
}

fn guest(input: &mut Unstructured<'_>) -> Result<()> {
    let Ok(policy) = Policy::parse(input.choose(POLICIES)?) else { return Ok(()) };
    // A budget in measured time is no two times the same.
    if !policy.is_reproducible() {
        return Ok(());
    }
    let rules = Rules {
        max_no_progress: input.int_in_range(0..=20)?,
        max_calls: 64,
        stop: bool::arbitrary(input)?,
    };
    let recorder = Recorder::new(Judge::new(rules, policy.is_special()), None);
    let settings = Settings {
        policy,
        seed: u64::from(u8::arbitrary(input)?),
        gpaw: input.int_in_range(36..=52)?,
        vcpus: input.int_in_range(1..=4)?,
        timing: false,
        front_end: *input.choose(&FRONT_ENDS)?,
    };
    let mut engine = Engine::new(settings, NoMemory, recorder);
    if bool::arbitrary(input)? {
        let pages = Pages { first: 4096, count: 1 + u64::from(u16::arbitrary(input)?) };
        engine.preset_shared(pages).map_err(|_| arbitrary::Error::IncorrectFormat)?;
    }
    let done = if bool::arbitrary(input)? {
        exits(input, &mut engine, &Bare)
    } else {
        let until = *input.choose(&[Until::Userspace, Until::Conversions, Until::Exit])?;
        let Ok((machine, _interrupt)) = Machine::new(until, MEMORY) else { return Ok(()) };
        exits(input, &mut engine, &machine)
    };
    let (_, recorder) = engine.end();
    // Nothing is written: no trace.
    let Ok(record) = recorder.finish() else { return done };
    assert!(record.judgement.violations.len() < 1000 && record.judgement.notes.len() < 100);
    done
}

/// Exits until the input ends, or the run does.
fn exits<S: EventSink>(
    input: &mut Unstructured<'_>,
    engine: &mut Engine<NoMemory, S>,
    platform: &impl Platform<NoMemory, S>,
) -> Result<()> {
    let bit = shared_bit(engine.settings().gpaw);
    let last = u32::try_from(engine.settings().vcpus).unwrap_or(1) - 1;
    while !input.is_empty() {
        let vcpu = input.int_in_range(0..=last)?;
        let flow = match input.int_in_range(0..=8)? {
            0..=2 => {
                let before = call(input, bit)?;
                // Takes a second behind KVM's chunks; vmm/tests/front_end.rs does it once.
                if engine.settings().front_end != FrontEnd::Direct && before.r13 > MEMORY {
                    continue;
                }
                let mut regs = before;
                let flow = tdcall(engine, vcpu, &mut regs, platform, &HalfCpu);
                held(&before, &regs);
                flow.unwrap_or(Flow::Stop)
            }
            3 => engine.touch(value(input, bit)?).err().unwrap_or(Flow::Continue),
            4 => {
                let mut flow = Flow::Continue;
                let [tag, field] = <[u8; 2]>::arbitrary(input)?;
                let header = channel::header(tag % 12, field.into());
                for word in std::iter::once(header).chain(input.arbitrary::<[u32; 3]>()?) {
                    flow = engine.channel_word(vcpu, word);
                }
                flow
            }
            5 => engine.channel_word(vcpu, u32::arbitrary(input)?),
            6 => {
                let mut data = [0; 4];
                let size = *input.choose(&[1, 2, 4])?;
                platform.read_port(u16::arbitrary(input)?, &mut data[..size]);
                Flow::Continue
            }
            7 => {
                let port = match input.int_in_range(0..=5)? {
                    0 => u16::arbitrary(input)?,
                    // The serial port, the PIC, the keyboard controller, reset.
                    port => [0x3f8, 0x3f9, 0x20, 0x64, 0xcf9][port - 1],
                };
                let size = usize::from(input.int_in_range(1..=40u8)?);
                let text = input.bytes(size)?.to_vec();
                let mut flow = Flow::Continue;
                for data in text.chunks(if port == 0x3f8 { 1 } else { 4 }) {
                    let next = platform.write_port(engine, vcpu, port, data);
                    // The memory behind it does not fail.
                    flow = next.ok().flatten().unwrap_or(Flow::Continue);
                }
                flow
            }
            _ => {
                let gpa = value(input, bit)?;
                platform.idle(engine, vcpu);
                platform.nowhere(engine, vcpu, gpa).unwrap_or(Flow::Stop)
            }
        };
        if flow == Flow::Stop {
            break;
        }
    }
    Ok(())
}
