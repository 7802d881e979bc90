//! A vCPU at work: from KVM_RUN's exits to the engine and back, until the run ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{SyncReg, VcpuExit};
use mapgpa_abi::channel;
use mapgpa_abi::tdcall::{Regs, TRAP_PORT};

use super::EmulatedError;
use super::alias::AliasMemory;
use super::memory::Ram;
use super::tick::Tick;
use super::vm::{VmVcpu, failed};
use crate::backend::{Rendezvous, Wake};
use crate::engine::{Engine, Event, EventSink, Flow};
use crate::interrupt;
use crate::tdcall;

/// Exits between two looks at the clock and at Ctrl-C, for a vCPU that exits all the time.
const LOOK_EVERY: u64 = 256;
/// How long a vCPU with nothing to do sleeps.
const IDLE: Duration = Duration::from_micros(200);

/// What the threads of a run share.
#[derive(Debug)]
pub(super) struct Run<'a, S> {
    engine: Mutex<Engine<AliasMemory<'a>, S>>,
    /// The guest's memory.
    pub(super) ram: &'a Ram,
    /// Where vCPUs wait for each other, and learn that the run is over.
    pub(super) meeting: Rendezvous,
    deadline: Instant,
    interrupted: AtomicBool,
    error: Mutex<Option<EmulatedError>>,
}

impl<'a, S: EventSink> Run<'a, S> {
    /// A run of `vcpus` vCPUs that lasts until `deadline` at most.
    pub(super) fn new(
        engine: Engine<AliasMemory<'a>, S>,
        ram: &'a Ram,
        vcpus: usize,
        deadline: Instant,
    ) -> Self {
        Self {
            engine: Mutex::new(engine),
            ram,
            meeting: Rendezvous::new(vcpus),
            deadline,
            interrupted: AtomicBool::new(false),
            error: Mutex::new(None),
        }
    }

    /// The engine; whoever has it serialises the calls of all vCPUs.
    pub(super) fn engine(&self) -> MutexGuard<'_, Engine<AliasMemory<'a>, S>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the run because of `error`, unless another was first.
    pub(super) fn fail(&self, error: EmulatedError) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.meeting.stop();
    }

    /// Ends the run because of `wake`, which is booked once.
    fn end(&self, wake: Wake) {
        let mut engine = self.engine();
        if self.meeting.is_over() {
            return;
        }
        match wake {
            Wake::Met | Wake::Over => return,
            Wake::Timeout => {
                engine.emit(&Event::Timeout);
            }
            Wake::Interrupted => self.interrupted.store(true, Ordering::Relaxed),
        }
        self.meeting.stop();
    }

    /// Ends the run if it has lasted too long, or the user wants it.
    fn look(&self) {
        if interrupt::requested() {
            self.end(Wake::Interrupted);
        } else if Instant::now() >= self.deadline {
            self.end(Wake::Timeout);
        }
    }

    /// The engine, whether the user interrupted the run, and what made it fail.
    pub(super) fn into_parts(self) -> (Engine<AliasMemory<'a>, S>, bool, Option<EmulatedError>) {
        (
            self.engine.into_inner().unwrap_or_else(PoisonError::into_inner),
            self.interrupted.into_inner(),
            self.error.into_inner().unwrap_or_else(PoisonError::into_inner),
        )
    }
}

/// What an exit asks for, without what it borrows.
enum Exit {
    /// A TDCALL.
    Tdcall,
    /// A word for the guest channel.
    Channel(u32),
    /// A port that no device is at.
    OtherPort(u16),
    /// HLT.
    Idle,
    /// The guest is beyond help.
    Crash(String),
    /// A signal.
    Signal,
    /// KVM cannot run this guest.
    Failed(String),
}

/// Runs vCPU `index` on this thread until it ends or the run does; returns how many exits it made.
pub(super) fn run<'a, S: EventSink>(run: &'a Run<'_, S>, index: u32, vcpu: VmVcpu<'a>) -> u64 {
    let mut this = Vcpu { run, index, fd: vcpu, exits: 0, port_told: false };
    if let Err(error) = this.run() {
        run.fail(error);
    }
    run.meeting.leave();
    this.exits
}

/// A vCPU.
struct Vcpu<'a, 'm, S> {
    run: &'a Run<'m, S>,
    index: u32,
    fd: VmVcpu<'a>,
    exits: u64,
    port_told: bool,
}

impl<S: EventSink> Vcpu<'_, '_, S> {
    fn run(&mut self) -> Result<(), EmulatedError> {
        let _tick = Tick::start().map_err(EmulatedError::Timer)?;
        while !self.run.meeting.is_over() {
            let exit = self.enter()?;
            self.exits += 1;
            if self.exits.is_multiple_of(LOOK_EVERY) {
                self.run.look();
            }
            match self.answer(exit)? {
                Flow::Continue => {}
                Flow::Idle => std::thread::sleep(IDLE),
                Flow::Barrier => {
                    let wake = self.run.meeting.wait(self.run.deadline);
                    self.run.end(wake);
                }
                Flow::Exit => return Ok(()),
                Flow::Stop => self.run.meeting.stop(),
            }
        }
        Ok(())
    }

    /// Runs the guest until it exits.
    fn enter(&mut self) -> Result<Exit, EmulatedError> {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoOut(TRAP_PORT, _)) => return Ok(Exit::Tdcall),
            Ok(VcpuExit::IoOut(port, data)) => {
                return Ok(match (port, <[u8; 4]>::try_from(data)) {
                    (channel::PORT, Ok(word)) => Exit::Channel(u32::from_le_bytes(word)),
                    _ => Exit::OtherPort(port),
                });
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                // What an empty bus reads as.
                data.fill(0xff);
                return Ok(Exit::OtherPort(port));
            }
            Ok(VcpuExit::Hlt) => return Ok(Exit::Idle),
            Ok(VcpuExit::Intr) => return Ok(Exit::Signal),
            Ok(VcpuExit::MmioRead(gpa, data)) => Exit::Crash(format!(
                "read of {} bytes at GPA {gpa:#x}, where nothing is",
                data.len()
            )),
            Ok(VcpuExit::MmioWrite(gpa, data)) => Exit::Crash(format!(
                "write of {} bytes at GPA {gpa:#x}, where nothing is",
                data.len()
            )),
            Ok(VcpuExit::Shutdown) => Exit::Crash("triple fault".to_owned()),
            Ok(other) => Exit::Failed(format!("{other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Exit::Signal);
            }
            Err(error) => return Err(failed("KVM_RUN")(error).into()),
        };
        let regs = &self.fd.sync_regs_mut().regs;
        let registers = show(regs);
        Ok(match exit {
            // Code is fetched from RIP = GPA; where nothing is, no KVM can go on.
            Exit::Failed(_) if !self.run.ram.has(regs.rip) => {
                Exit::Crash(format!("jump to where nothing is, at {registers}"))
            }
            Exit::Crash(what) => Exit::Crash(format!("{what}, at {registers}")),
            Exit::Failed(what) => Exit::Failed(format!("{what}, at {registers}")),
            other => other,
        })
    }

    /// Lets the engine answer; nothing more happens in a run that is over.
    fn answer(&mut self, exit: Exit) -> Result<Flow, EmulatedError> {
        if matches!(exit, Exit::Signal) {
            self.run.look();
            return Ok(Flow::Continue);
        }
        let mut engine = self.run.engine();
        if self.run.meeting.is_over() {
            return Ok(Flow::Stop);
        }
        Ok(match exit {
            Exit::Tdcall => {
                let mut regs = to_abi(&self.fd.sync_regs_mut().regs);
                let flow = tdcall::tdcall(&mut *engine, self.index, &mut regs)?;
                drop(engine);
                from_abi(&regs, &mut self.fd.sync_regs_mut().regs);
                self.fd.set_sync_dirty_reg(SyncReg::Register);
                flow
            }
            Exit::Channel(word) => engine.channel_word(self.index, word),
            Exit::OtherPort(port) if !self.port_told => {
                self.port_told = true;
                let index = self.index;
                engine.odd(&format!("I/O at port {port:#x}, where no device is, on vCPU {index}"))
            }
            Exit::OtherPort(_) | Exit::Signal => Flow::Continue,
            Exit::Idle => Flow::Idle,
            Exit::Crash(detail) => {
                engine.crash(&format!("vCPU {}: {detail}", self.index));
                Flow::Stop
            }
            Exit::Failed(exit) => return Err(EmulatedError::Exit { vcpu: self.index, exit }),
        })
    }
}

/// The registers that TDCALL passes.
const fn to_abi(regs: &kvm_regs) -> Regs {
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
const fn from_abi(from: &Regs, to: &mut kvm_regs) {
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

fn show(regs: &kvm_regs) -> String {
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
