//! The machine of a firmware: that of a kernel, with fw_cfg, PCI configuration space, and the hooks at
//! which code that was unpacked has its TDCALLs replaced. The hooks tell the phases apart.

use std::sync::{Mutex, MutexGuard, PoisonError};

use mapgpa_abi::tdcall::Regs;
use mapgpa_abi::{Alias, PAGE_SIZE};

use super::acpi;
use super::fw_cfg::{Asked, FwCfg};
use super::image::CR3_PORT;
use super::kernel::{Inner as Kernel, JUMP_PORT};
use super::pci::Pci;
use super::program;
use crate::engine::{Engine, EventSink, Flow, Phase};
use crate::linux::machine::Machine as Pc;
use crate::linux::module;
use crate::memory::{Contents, MemoryError};
use crate::pagemap::PageState;
use crate::patch::Patched;
use crate::platform::{Cpu, Hook, Platform};

/// What the firmware is to be, beside its image.
#[derive(Debug)]
pub struct Wanted {
    /// What it finds by fw_cfg.
    pub fw_cfg: FwCfg,
    /// TDCALLs in its compressed volume.
    pub packed_sites: u64,
    /// The kernel that it boots, if it boots one.
    pub kernel: Option<Kernel>,
    /// The run ends when boot services have been exited.
    pub until_exit: bool,
    /// The bit that makes a GPA shared.
    pub shared_bit: u64,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    pc: Pc,
    wanted: Wanted,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    fw_cfg: FwCfg,
    pci: Pci,
    unpacked: Patched,
    unfit: Option<String>,
}

impl Machine {
    /// The machine `pc` with the devices of `wanted`.
    #[must_use]
    pub fn new(pc: Pc, mut wanted: Wanted) -> Self {
        let inner = Inner {
            fw_cfg: std::mem::take(&mut wanted.fw_cfg),
            pci: Pci::default(),
            unpacked: Patched::default(),
            unfit: None,
        };
        Self { pc, wanted, inner: Mutex::new(inner) }
    }

    /// The part of it that a kernel's machine has, too.
    pub const fn pc(&self) -> &Pc {
        &self.pc
    }

    /// TDCALLs replaced in what the firmware unpacked, and in the kernel.
    pub fn unpacked(&self) -> Patched {
        self.inner().unpacked
    }

    /// What ended the run, as the image is not as it was taken to be.
    pub fn unfit(&self) -> Option<String> {
        self.inner().unfit.take()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SEC has loaded CR3: what it has unpacked is there, and none of it has run.
    fn unpacked_volume<M: Contents, S: EventSink>(
        &self,
        engine: &mut Engine<M, S>,
    ) -> Result<Flow, MemoryError> {
        let mut inner = self.inner();
        let patched = engine.memory().patch(self.pc.ram())?;
        inner.unpacked = inner.unpacked.and(patched);
        if patched.sites == 0 {
            return Ok(Flow::Continue);
        }
        let (found, there) = (inner.unpacked.sites, self.wanted.packed_sites);
        if found < there {
            inner.unfit = Some(format!(
                "{found} TDCALLs were found in what it unpacked, {there} are in its compressed volume"
            ));
            return Ok(Flow::Stop);
        }
        Ok(engine.phase(Phase::Dxe, self.pc.ram()))
    }

    /// Boot code has jumped to `target`: perhaps to the kernel.
    fn jumped<M: Contents, S: EventSink>(
        &self,
        engine: &mut Engine<M, S>,
        target: u64,
    ) -> Result<Flow, MemoryError> {
        let mut inner = self.inner();
        let Some(kernel) = &self.wanted.kernel else { return Ok(Flow::Continue) };
        if engine.reached() == Some(Phase::BootServicesExited)
            || engine.map().state(target / PAGE_SIZE) != PageState::PrivateAccepted
        {
            return Ok(Flow::Continue);
        }
        let mut first = kernel.first;
        let there = engine.memory().read(target, Alias::Private, &mut first)?;
        if !there || first != kernel.first {
            return Ok(Flow::Continue);
        }
        let mut patched = Patched::default();
        for pages in kernel.code(target) {
            patched = patched.and(engine.memory().patch(pages)?);
        }
        inner.unpacked = inner.unpacked.and(patched);
        if patched.sites < kernel.sites {
            inner.unfit = Some(format!(
                "{} TDCALLs were found in the kernel, {} are in its image",
                patched.sites, kernel.sites
            ));
            return Ok(Flow::Stop);
        }
        Ok(engine.phase(Phase::BootServicesExited, self.pc.ram()))
    }
}

impl<M: Contents, S: EventSink> Platform<M, S> for Machine {
    fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        let mut inner = self.inner();
        if !inner.fw_cfg.read_port(port, data) && !inner.pci.read_port(port, data) {
            self.pc.read(port, data);
        }
        true
    }

    fn write_port(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        port: u16,
        data: &[u8],
    ) -> Result<Option<Flow>, MemoryError> {
        let mut inner = self.inner();
        if port == program::PORT && self.wanted.until_exit {
            let flow = engine.phase(Phase::BootServicesExited, self.pc.ram());
            return Ok(Some(if flow == Flow::Stop { flow } else { self.pc.finish(engine, vcpu) }));
        }
        let mut flow = Flow::Continue;
        match inner.fw_cfg.write_port(port, data) {
            Some(Asked::Nothing) => {}
            Some(Asked::Dma(gpa)) => flow = inner.fw_cfg.dma(engine, gpa)?,
            None if inner.pci.write_port(port, data) => return Ok(Some(flow)),
            None => {
                drop(inner);
                let flow = self.pc.write(engine, vcpu, port, data);
                if flow == Flow::Stop && self.pc.is_dead() {
                    self.post_mortem(engine);
                }
                return Ok(Some(flow));
            }
        }
        // Boot device selection begins by looking for PCI devices, upon which ACPI tables are read.
        if inner.fw_cfg.is_selected(acpi::SCRIPT)
            && engine.phase(Phase::Bds, self.pc.ram()) == Flow::Stop
        {
            flow = Flow::Stop;
        }
        Ok(Some(flow))
    }

    fn read_mmio(&self, raw_gpa: u64, data: &mut [u8]) -> bool {
        self.inner().pci.read_mmio(raw_gpa & !self.wanted.shared_bit, data)
    }

    fn write_mmio(&self, raw_gpa: u64, data: &[u8]) -> bool {
        self.inner().pci.write_mmio(raw_gpa & !self.wanted.shared_bit, data)
    }

    fn hook(&self, port: u16) -> Option<Hook> {
        match port {
            CR3_PORT => Some(Hook::LoadCr3),
            JUMP_PORT => Some(Hook::JumpRax),
            _ => None,
        }
    }

    fn hooked(
        &self,
        engine: &mut Engine<M, S>,
        _vcpu: u32,
        hook: Hook,
        rax: u64,
        paged64: bool,
    ) -> Result<Flow, MemoryError> {
        match hook {
            Hook::LoadCr3 if paged64 => self.unpacked_volume(engine),
            Hook::LoadCr3 => Ok(Flow::Continue),
            Hook::JumpRax => self.jumped(engine, rax),
        }
    }

    fn nowhere(&self, engine: &mut Engine<M, S>, vcpu: u32, raw_gpa: u64) -> Option<Flow> {
        // A firmware looks at the registers of many devices that are not there.
        if engine.reached() < Some(Phase::BootServicesExited) {
            return Some(Flow::Continue);
        }
        self.pc.nowhere(engine, vcpu, raw_gpa)
    }

    fn leaf(
        &self,
        engine: &mut Engine<M, S>,
        _vcpu: u32,
        regs: &mut Regs,
    ) -> Result<Option<Flow>, MemoryError> {
        module::leaf(&self.pc, engine, regs)
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

    fn post_mortem(&self, engine: &mut Engine<M, S>) {
        if let Ok(Some(gpa)) = engine.memory().find_tdcall(self.pc.ram()) {
            engine.odd(&format!(
                "there is a TDCALL at {gpa:#x} that was not replaced, as its code was unpacked where \
                 no hook saw it: outside a TD it raises #UD, which may be what ended the guest"
            ));
        }
    }
}
