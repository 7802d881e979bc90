//! The machine of a kernel: its devices, what its console tells of the run, and how the run ends.
//! TDCALLs beside MapGPA and accept are in [`super::module`]. The machine of a firmware is this one
//! with more devices ([`crate::firmware::machine`]).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::Regs;
use vmm_sys_util::eventfd::EventFd;

use super::console::{self, Said};
use super::devices::{Devices, Effect};
use super::module;
use crate::engine::{Alarm, Engine, Event, EventSink, Flow, Phase};
use crate::firmware;
use crate::memory::{Contents, MemoryError};
use crate::pagemap::{PageState, Pages};
use crate::platform::{Cpu, Platform};

/// When a run with a kernel ends by itself, if the kernel does not end it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The firmware looks for something to boot.
    Bds,
    /// User space is reached.
    Userspace,
    /// The kernel's first conversion has ended; the recorder sees to that.
    Conversions,
    /// Power-off, reset or panic.
    Exit,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    inner: Mutex<Inner>,
    until: Until,
    /// Bytes of its memory.
    memory: u64,
}

#[derive(Debug)]
struct Inner {
    devices: Devices,
    /// Metadata fields of the TD that the guest has written, by field id.
    fields: BTreeMap<u64, u64>,
    userspace: bool,
    panicked: bool,
    step_failed: bool,
    kexec: bool,
    dead: bool,
    nowhere_told: bool,
    unfit: Option<String>,
}

impl Machine {
    /// A machine just switched on, and the eventfd of its serial port's interrupt.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(until: Until, memory: u64) -> io::Result<(Self, EventFd)> {
        let (devices, interrupt) = Devices::new(memory)?;
        let inner = Inner {
            devices,
            fields: BTreeMap::new(),
            userspace: false,
            panicked: false,
            step_failed: false,
            kexec: false,
            dead: false,
            nowhere_told: false,
            unfit: None,
        };
        Ok((Self { inner: Mutex::new(inner), until, memory }, interrupt))
    }

    /// What is left of the console when the run is over.
    pub fn last_line(&self) -> Option<String> {
        self.inner().devices.lines(true).pop()
    }

    /// The module that ended the run, as it is not one of this kernel's.
    pub fn unfit_module(&self) -> Option<String> {
        self.inner().unfit.take()
    }

    /// Whether the guest has said that it does nothing more.
    pub fn is_dead(&self) -> bool {
        self.inner().dead
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `data` with what `port` reads as.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        self.inner().devices.read(port, data);
    }

    /// Takes what `vcpu` wrote to `port`.
    pub(crate) fn write<M: Contents, S: EventSink>(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        port: u16,
        data: &[u8],
    ) -> Flow {
        let mut inner = self.inner();
        let effect = inner.devices.write(port, data);
        let mut flow = Flow::Continue;
        for line in inner.devices.lines(effect != Effect::None) {
            if self.line(&mut inner, engine, vcpu, &line) == Flow::Stop {
                flow = Flow::Stop;
            }
        }
        match effect {
            Effect::None => flow,
            Effect::PowerOff => self.end(&inner, engine, vcpu, "was switched off"),
            Effect::Reset => self.end(&inner, engine, vcpu, "was reset"),
        }
    }

    /// A line of the console, ended by `vcpu`.
    fn line<M: Contents, S: EventSink>(
        &self,
        inner: &mut Inner,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        line: &str,
    ) -> Flow {
        engine.moved_on(vcpu);
        let line = &*firmware::console::plain(line);
        let said = console::read(line);
        let alarm = if let Said::Alarm(alarm) = said { Some(alarm) } else { None };
        let mut flow = engine.emit(&Event::Console { vcpu, text: line, alarm });
        match said {
            Said::Panic(text) => {
                inner.panicked = true;
                flow = engine.emit(&Event::Panic { text });
            }
            Said::StepFailed(step) => {
                inner.step_failed = true;
                flow = engine.odd(&format!("its init says: {step}"));
            }
            Said::ModuleUnfit(step) => {
                inner.unfit = Some(step.to_owned());
                flow = Flow::Stop;
            }
            Said::Dead => {
                inner.dead = true;
                flow = Flow::Stop;
            }
            Said::Kexec => inner.kexec = true,
            Said::Bds => {
                flow = engine.phase(Phase::Bds, self.ram());
                if self.until == Until::Bds {
                    flow = self.finish(engine, vcpu);
                }
            }
            Said::Userspace => {
                inner.userspace = true;
                if self.until == Until::Userspace {
                    flow = self.finish(engine, vcpu);
                }
            }
            Said::Alarm(Alarm::GaveUp) if flow != Flow::Stop => flow = engine.gave_up(vcpu),
            Said::Alarm(_) | Said::Done | Said::Nothing => {}
        }
        flow
    }

    /// The guest has come as far as it was to.
    pub(crate) fn finish<M: Contents, S: EventSink>(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
    ) -> Flow {
        engine.check_accepts();
        engine.emit(&Event::Exit { vcpu, success: true });
        Flow::Stop
    }

    /// Its RAM, with the hole.
    pub(crate) const fn ram(&self) -> Pages {
        Pages::of_bytes(0, mapgpa_abi::layout::end_of_ram(self.memory))
    }

    /// The kernel has ended the run.
    fn end<M: Contents, S: EventSink>(
        &self,
        inner: &Inner,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        how: &str,
    ) -> Flow {
        engine.moved_on(vcpu);
        engine.check_accepts();
        if inner.kexec {
            let shared = engine.map().find(self.ram(), |state| state == PageState::Shared);
            if let Some(shared) = shared {
                let (count, gpa) = (shared.count, shared.first * PAGE_SIZE);
                engine.odd(&format!(
                    "after the kexec {count} pages are still shared, the first at {gpa:#x}: the next \
                     kernel does not know of them"
                ));
            }
        }
        if inner.panicked {
            return Flow::Stop;
        }
        if inner.userspace {
            engine.emit(&Event::Exit { vcpu, success: !inner.step_failed });
        } else {
            engine.crash(&format!("the machine {how} before user space was reached"));
        }
        Flow::Stop
    }

    /// Reads a metadata field of the TD, or writes the bits of `mask` of it; gives what it was.
    pub(super) fn field(&self, id: u64, value: u64, mask: u64) -> u64 {
        let mut inner = self.inner();
        let field = inner.fields.entry(id).or_insert(0);
        let old = *field;
        *field = old & !mask | value & mask;
        old
    }
}

impl<M: Contents, S: EventSink> Platform<M, S> for Machine {
    fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        self.read(port, data);
        true
    }

    fn write_port(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        port: u16,
        data: &[u8],
    ) -> Result<Option<Flow>, MemoryError> {
        Ok(Some(self.write(engine, vcpu, port, data)))
    }

    fn nowhere(&self, engine: &mut Engine<M, S>, vcpu: u32, raw_gpa: u64) -> Option<Flow> {
        let mut inner = self.inner();
        if inner.nowhere_told {
            return Some(Flow::Continue);
        }
        inner.nowhere_told = true;
        Some(engine.odd(&format!(
            "an access to GPA {raw_gpa:#x}, where nothing is, on vCPU {vcpu}: it reads as ones, and \
             further ones are not noted"
        )))
    }

    fn leaf(
        &self,
        engine: &mut Engine<M, S>,
        _vcpu: u32,
        regs: &mut Regs,
    ) -> Result<Option<Flow>, MemoryError> {
        module::leaf(self, engine, regs)
    }

    fn vmcall(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        regs: &mut Regs,
        cpu: &dyn Cpu,
    ) -> Result<Option<Flow>, MemoryError> {
        module::vmcall(self, engine, vcpu, regs, cpu)
    }

    fn idle(&self, engine: &mut Engine<M, S>, vcpu: u32) {
        engine.moved_on(vcpu);
    }
}
