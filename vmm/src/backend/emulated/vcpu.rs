//! A vCPU at work: from KVM_RUN's exits to the engine and back, until the run ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{SyncReg, VcpuExit};
use mapgpa_abi::channel;
use mapgpa_abi::tdcall::TRAP_PORT;

use super::EmulatedError;
use super::memory::Ram;
use super::registers::{Registers, from_abi, show, to_abi};
use super::tick::Tick;
use super::vm::{VmVcpu, failed};
use crate::backend::{Rendezvous, Wake};
use crate::engine::{Engine, Event, EventSink, Flow};
use crate::interrupt;
use crate::memory::Memory;
use crate::platform::{Hook, Platform};
use crate::tdcall;

/// Exits between two looks at the clock and at Ctrl-C, for a vCPU that exits all the time.
pub(in crate::backend) const LOOK_EVERY: u64 = 256;
/// How long a vCPU with nothing to do sleeps.
pub(in crate::backend) const IDLE: Duration = Duration::from_micros(200);

/// EFER.LMA: long mode is active, and so is paging (Intel SDM 3A, 2.2.1).
const EFER_LMA: u64 = 1 << 10;

/// What the threads of a run share.
#[derive(Debug)]
pub(in crate::backend) struct Run<'a, M, S, P, E = EmulatedError> {
    engine: Mutex<Engine<M, S>>,
    platform: &'a P,
    /// The guest's memory.
    pub(in crate::backend) ram: &'a Ram,
    /// Where vCPUs wait for each other, and learn that the run is over.
    pub(in crate::backend) meeting: Rendezvous,
    deadline: Instant,
    interrupted: AtomicBool,
    error: Mutex<Option<E>>,
}

impl<'a, M: Memory, S: EventSink, P, E> Run<'a, M, S, P, E> {
    /// A run of `vcpus` vCPUs on `platform` that lasts until `deadline` at most.
    pub(in crate::backend) fn new(
        engine: Engine<M, S>,
        ram: &'a Ram,
        platform: &'a P,
        vcpus: usize,
        deadline: Instant,
    ) -> Self {
        Self {
            engine: Mutex::new(engine),
            ram,
            platform,
            meeting: Rendezvous::new(vcpus),
            deadline,
            interrupted: AtomicBool::new(false),
            error: Mutex::new(None),
        }
    }

    /// When it ends at the latest.
    pub(in crate::backend) const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The engine; whoever has it serialises the calls of all vCPUs.
    pub(in crate::backend) fn engine(&self) -> MutexGuard<'_, Engine<M, S>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the run because of `error`, unless another was first.
    pub(in crate::backend) fn fail(&self, error: E) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.meeting.stop();
    }

    /// Ends the run because of `wake`, which is booked once.
    pub(in crate::backend) fn end(&self, wake: Wake) {
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
    pub(in crate::backend) fn look(&self) {
        self.engine().tick();
        if interrupt::requested() {
            self.end(Wake::Interrupted);
        } else if self.is_late() {
            self.end(Wake::Timeout);
        }
    }

    /// Whether the run has lasted too long.
    fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// The engine, whether the user interrupted the run, and what made it fail.
    pub(in crate::backend) fn into_parts(self) -> (Engine<M, S>, bool, Option<E>) {
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
    /// What needed no more than the platform.
    Done,
    /// A word for the guest channel.
    Channel(u32),
    /// What was written to a port: 1, 2 or 4 bytes.
    Write(u16, [u8; 4], usize),
    /// A read of a port that no device is at.
    OtherPort(u16),
    /// An access to a GPA where no memory is; what it was.
    Nowhere(u64, String),
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
pub(super) fn run<'a, M: Memory, S: EventSink, P: Platform<M, S>>(
    run: &'a Run<'_, M, S, P>,
    index: u32,
    vcpu: VmVcpu<'a>,
) -> u64 {
    let mut this = Vcpu { run, index, fd: vcpu, exits: 0, port_told: false };
    if let Err(error) = this.run() {
        run.fail(error);
    }
    run.meeting.leave();
    this.exits
}

/// A vCPU.
struct Vcpu<'a, 'm, M, S, P> {
    run: &'a Run<'m, M, S, P>,
    index: u32,
    fd: VmVcpu<'a>,
    exits: u64,
    port_told: bool,
}

impl<M: Memory, S: EventSink, P: Platform<M, S>> Vcpu<'_, '_, M, S, P> {
    fn run(&mut self) -> Result<(), EmulatedError> {
        let _tick = Tick::start().map_err(EmulatedError::Timer)?;
        while !self.run.meeting.is_over() {
            let exit = self.enter()?;
            self.exits += 1;
            if self.exits.is_multiple_of(LOOK_EVERY) {
                self.look();
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

    /// Ends the run if it has lasted too long, or the user wants it.
    fn look(&self) {
        if self.run.is_late() && !self.run.meeting.is_over() {
            self.run.platform.post_mortem(&mut self.run.engine());
        }
        self.run.look();
    }

    /// Runs the guest until it exits.
    fn enter(&mut self) -> Result<Exit, EmulatedError> {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoOut(TRAP_PORT, _)) => return Ok(Exit::Tdcall),
            Ok(VcpuExit::IoOut(port, data)) => {
                return Ok(match (port, <[u8; 4]>::try_from(data)) {
                    (channel::PORT, Ok(word)) => Exit::Channel(u32::from_le_bytes(word)),
                    // String output; nothing that runs here does it.
                    _ if data.len() > 4 => Exit::OtherPort(port),
                    _ => {
                        let mut bytes = [0; 4];
                        bytes[..data.len()].copy_from_slice(data);
                        Exit::Write(port, bytes, data.len())
                    }
                });
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                return Ok(if self.run.platform.read_port(port, data) {
                    Exit::Done
                } else {
                    // What an empty bus reads as.
                    data.fill(0xff);
                    Exit::OtherPort(port)
                });
            }
            Ok(VcpuExit::Hlt) => return Ok(Exit::Idle),
            Ok(VcpuExit::Intr) => return Ok(Exit::Signal),
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                if self.run.platform.read_mmio(gpa, data) {
                    return Ok(Exit::Done);
                }
                data.fill(0xff);
                let size = data.len();
                Exit::Nowhere(
                    gpa,
                    format!("read of {size} bytes at GPA {gpa:#x}, where nothing is"),
                )
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                if self.run.platform.write_mmio(gpa, data) {
                    return Ok(Exit::Done);
                }
                let size = data.len();
                Exit::Nowhere(
                    gpa,
                    format!("write of {size} bytes at GPA {gpa:#x}, where nothing is"),
                )
            }
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
            Exit::Nowhere(gpa, what) => Exit::Nowhere(gpa, format!("{what}, at {registers}")),
            Exit::Failed(what) => Exit::Failed(format!("{what}, at {registers}")),
            other => other,
        })
    }

    /// Lets the engine answer; nothing more happens in a run that is over.
    fn answer(&mut self, exit: Exit) -> Result<Flow, EmulatedError> {
        match exit {
            Exit::Signal => {
                self.look();
                return Ok(Flow::Continue);
            }
            Exit::Done => return Ok(Flow::Continue),
            _ => {}
        }
        let mut engine = self.run.engine();
        if self.run.meeting.is_over() {
            return Ok(Flow::Stop);
        }
        Ok(match exit {
            Exit::Tdcall => {
                let mut regs = to_abi(&self.fd.sync_regs_mut().regs);
                let (platform, cpu) = (self.run.platform, Registers(&self.fd));
                let flow = tdcall::tdcall(&mut *engine, self.index, &mut regs, platform, &cpu)?;
                drop(engine);
                from_abi(&regs, &mut self.fd.sync_regs_mut().regs);
                self.fd.set_sync_dirty_reg(SyncReg::Register);
                flow
            }
            Exit::Channel(word) => engine.channel_word(self.index, word),
            Exit::Write(port, bytes, size) => {
                let platform = self.run.platform;
                if let Some(hook) = platform.hook(port) {
                    let (rax, paged64) = self.perform(hook)?;
                    return Ok(platform.hooked(&mut engine, self.index, hook, rax, paged64)?);
                }
                let flow = platform.write_port(&mut engine, self.index, port, &bytes[..size])?;
                flow.unwrap_or_else(|| self.other_port(&mut engine, port))
            }
            Exit::OtherPort(port) => self.other_port(&mut engine, port),
            Exit::Nowhere(gpa, detail) => {
                let flow = self.run.platform.nowhere(&mut engine, self.index, gpa);
                flow.unwrap_or_else(|| {
                    engine.crash(&format!("vCPU {}: {detail}", self.index));
                    Flow::Stop
                })
            }
            Exit::Done | Exit::Signal => Flow::Continue,
            Exit::Idle => Flow::Idle,
            Exit::Crash(detail) => {
                self.run.platform.post_mortem(&mut engine);
                engine.crash(&format!("vCPU {}: {detail}", self.index));
                Flow::Stop
            }
            Exit::Failed(exit) => return Err(EmulatedError::Exit { vcpu: self.index, exit }),
        })
    }

    /// Does what the code at `hook` did; gives RAX, and whether this is long mode with paging on.
    fn perform(&mut self, hook: Hook) -> Result<(u64, bool), EmulatedError> {
        let rax = self.fd.sync_regs_mut().regs.rax;
        let mut sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        match hook {
            Hook::LoadCr3 => {
                sregs.cr3 = rax;
                self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
            }
            Hook::JumpRax => {
                self.fd.sync_regs_mut().regs.rip = rax;
                self.fd.set_sync_dirty_reg(SyncReg::Register);
            }
        }
        Ok((rax, sregs.efer & EFER_LMA != 0))
    }

    /// Books I/O at a port where no device is, once.
    fn other_port(&mut self, engine: &mut Engine<M, S>, port: u16) -> Flow {
        if self.port_told {
            return Flow::Continue;
        }
        self.port_told = true;
        let index = self.index;
        engine.odd(&format!("I/O at port {port:#x}, where no device is, on vCPU {index}"))
    }
}
