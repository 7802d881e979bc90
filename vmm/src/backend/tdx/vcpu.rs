//! A vCPU of a TD at work: from KVM_RUN's exits to the engine and back, until the run ends.
//!
//! Registers are out of reach: an exit's own fields are all there is, and the engine works out what
//! KVM tells the guest.

use kvm_ioctls::VcpuExit;
use mapgpa_abi::channel;
use mapgpa_abi::tdcall::status;
use mapgpa_kvm_model::{Exit as Chunk, Kernel};

use super::memory::TdMemory;
use super::uapi;
use super::{TdxError, printed};
use crate::backend::emulated::tick::Tick;
use crate::backend::emulated::vcpu::{IDLE, LOOK_EVERY, Run};
use crate::backend::emulated::vm::{VmVcpu, failed};
use crate::engine::{Engine, EventSink, Flow};
use crate::platform::Bare;

/// Exits in a row for memory that is there: after so many KVM does not get on.
const STORM: u32 = 1000;

/// The run of a TD.
pub(super) type TdRun<'a, S> = Run<'a, TdMemory<'a>, S, Bare, TdxError>;

/// What an exit asks for, without what it borrows.
enum Exit {
    /// A chunk of a MapGPA.
    Chunk(Chunk),
    /// A word for the guest channel.
    Channel(u32),
    /// I/O at a port where no device is.
    Port(u16),
    /// An access to a shared GPA where no memory is, by TDVMCALL.
    Mmio(String),
    /// A touch that the memory attributes do not allow: GPA without shared bit, private.
    Fault(u64, bool),
    /// A TDVMCALL that KVM leaves to us.
    Vmcall,
    /// The guest reported a fatal error, or is beyond help.
    Crash(String),
    /// KVM has ended the TD.
    Dead(std::io::Error),
    /// HLT.
    Idle,
    /// A signal.
    Signal,
    /// KVM cannot run this TD.
    Failed(String),
}

/// Runs vCPU `index` on this thread until it ends or the run does; returns how many exits it made.
pub(super) fn run<S: EventSink>(
    run: &TdRun<'_, S>,
    kernel: Kernel,
    shared_bit: u64,
    index: u32,
    fd: VmVcpu<'_>,
) -> u64 {
    let mut this = Vcpu { run, kernel, shared_bit, index, fd, exits: 0, faults: 0, told: false };
    if let Err(error) = this.run() {
        run.fail(error);
    }
    run.meeting.leave();
    this.exits
}

/// A vCPU.
struct Vcpu<'a, 'm, S> {
    run: &'a TdRun<'m, S>,
    kernel: Kernel,
    shared_bit: u64,
    index: u32,
    fd: VmVcpu<'a>,
    exits: u64,
    /// Exits in a row for memory that is there.
    faults: u32,
    /// I/O at an odd port was told.
    told: bool,
}

impl<S: EventSink> Vcpu<'_, '_, S> {
    fn run(&mut self) -> Result<(), TdxError> {
        let _tick = Tick::start().map_err(TdxError::Timer)?;
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
                    let wake = self.run.meeting.wait(self.run.deadline());
                    self.run.end(wake);
                }
                Flow::Exit => return Ok(()),
                Flow::Stop => self.run.meeting.stop(),
            }
        }
        Ok(())
    }

    /// Runs the guest until it exits.
    fn enter(&mut self) -> Result<Exit, TdxError> {
        Ok(match self.fd.run() {
            Ok(VcpuExit::Hypercall(call)) if call.nr == uapi::HC_MAP_GPA_RANGE => {
                Exit::Chunk(Chunk {
                    gpa: call.args[0],
                    pages: call.args[1],
                    private: call.args[2] & uapi::MAP_GPA_RANGE_ENCRYPTED != 0,
                })
            }
            Ok(VcpuExit::Hypercall(call)) => {
                Exit::Failed(format!("hypercall {} with {:x?}", call.nr, call.args))
            }
            Ok(VcpuExit::IoOut(port, data)) => match (port, <[u8; 4]>::try_from(data)) {
                (channel::PORT, Ok(word)) => Exit::Channel(u32::from_le_bytes(word)),
                _ => Exit::Port(port),
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                // What an empty bus reads as.
                data.fill(0xff);
                Exit::Port(port)
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                data.fill(0xff);
                let size = data.len();
                Exit::Mmio(format!("read of {size} bytes at GPA {gpa:#x}, where nothing is"))
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                let size = data.len();
                Exit::Mmio(format!("write of {size} bytes at GPA {gpa:#x}, where nothing is"))
            }
            Ok(VcpuExit::MemoryFault { flags, gpa, .. }) => {
                Exit::Fault(gpa, flags & uapi::MEMORY_EXIT_FLAG_PRIVATE != 0)
            }
            Ok(VcpuExit::SystemEvent(uapi::SYSTEM_EVENT_TDX_FATAL, data)) => {
                Exit::Crash(format!("the guest reports a fatal error: {}", printed(data)))
            }
            Ok(VcpuExit::Unsupported(uapi::EXIT_TDX)) => Exit::Vmcall,
            Ok(VcpuExit::Shutdown) => Exit::Crash("triple fault".to_owned()),
            Ok(VcpuExit::Hlt) => Exit::Idle,
            Ok(VcpuExit::Intr) => Exit::Signal,
            Ok(other) => Exit::Failed(format!("{other:?}")),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => Exit::Signal,
                libc::EIO => Exit::Dead(error.into()),
                _ => return Err(failed("KVM_RUN")(error).into()),
            },
        })
    }

    /// Lets the engine answer; nothing more happens in a run that is over.
    fn answer(&mut self, exit: Exit) -> Result<Flow, TdxError> {
        if let Exit::Signal = exit {
            self.run.look();
            return Ok(Flow::Continue);
        }
        let run = self.run;
        let mut engine = run.engine();
        if run.meeting.is_over() {
            return Ok(Flow::Stop);
        }
        if !matches!(exit, Exit::Fault(..)) {
            self.faults = 0;
        }
        // The engine looks at words of the channel itself: they may say how the request ended.
        let tells = matches!(exit, Exit::Chunk(_) | Exit::Channel(_));
        if !tells && engine.request_over(self.index) == Flow::Stop {
            return Ok(Flow::Stop);
        }
        Ok(match exit {
            Exit::Chunk(chunk) => {
                let (answer, flow) = engine.kvm_chunk(self.kernel, self.index, chunk)?;
                drop(engine);
                uapi::set_hypercall_ret(self.fd.get_kvm_run(), answer.ret);
                if answer.event {
                    self.fd.nmi().map_err(failed("KVM_NMI"))?;
                }
                flow
            }
            Exit::Channel(word) => engine.channel_word(self.index, word),
            Exit::Port(port) => {
                if std::mem::replace(&mut self.told, true) {
                    return Ok(Flow::Continue);
                }
                let index = self.index;
                engine.odd(&format!("I/O at port {port:#x}, where no device is, on vCPU {index}"))
            }
            Exit::Fault(gpa, private) => return self.fault(&mut engine, gpa, private),
            Exit::Vmcall => {
                let exit = uapi::tdx_exit(self.fd.get_kvm_run());
                exit.ret = status::SUBFUNC_UNSUPPORTED;
                let (nr, index) = (exit.nr, self.index);
                engine.odd(&format!("unknown TDVMCALL {nr:#x} on vCPU {index}"))
            }
            Exit::Mmio(detail) | Exit::Crash(detail) => {
                engine.crash(&format!("vCPU {}: {detail}", self.index));
                Flow::Stop
            }
            Exit::Dead(_) if engine.memory().pending => {
                engine.crash(&format!(
                    "vCPU {}: KVM ended the TD, as it does when a private page is touched before its \
                     accept (KVM_RUN: EIO; the kernel's log has the address)",
                    self.index
                ));
                Flow::Stop
            }
            Exit::Dead(source) => return Err(TdxError::Dead(source)),
            Exit::Idle => Flow::Idle,
            Exit::Signal => Flow::Continue,
            Exit::Failed(exit) => return Err(TdxError::Exit { vcpu: self.index, exit }),
        })
    }

    /// KVM finds no page for a touch: the attributes say that it is of the other kind, or nothing is
    /// there.
    fn fault(
        &mut self,
        engine: &mut Engine<TdMemory<'_>, S>,
        gpa: u64,
        private: bool,
    ) -> Result<Flow, TdxError> {
        let page = gpa / mapgpa_abi::PAGE_SIZE;
        if !self.run.ram.has(gpa) {
            let alias = if private { "private" } else { "shared" };
            let index = self.index;
            engine.crash(&format!("vCPU {index}: touch of {alias} GPA {gpa:#x}, where nothing is"));
            return Ok(Flow::Stop);
        }
        if private && engine.memory().restore(page)? {
            return Ok(Flow::Continue);
        }
        match engine.touch(if private { gpa } else { gpa | self.shared_bit }) {
            // Another vCPU was faster.
            Ok(()) if self.faults < STORM => {
                self.faults += 1;
                Ok(Flow::Continue)
            }
            Ok(()) => Err(TdxError::Storm { gpa }),
            // The host cannot give the page back in its state: only an accept can.
            Err(_) if private => Ok(Flow::Stop),
            Err(flow) => {
                engine.memory().let_through(page)?;
                Ok(flow)
            }
        }
    }
}
