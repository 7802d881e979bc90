//! What a guest finds around its CPUs and its memory: devices, and the TDCALLs beside MapGPA and
//! accept. A guest test finds nothing ([`Bare`]); a kernel finds a small PC.

use mapgpa_abi::tdcall::Regs;

use crate::engine::{Engine, Flow};
use crate::memory::MemoryError;

/// The calling vCPU's own registers beside the general ones, as TDVMCALLs ask for them.
pub trait Cpu {
    /// EAX, EBX, ECX and EDX of a CPUID leaf; nothing if there is no such leaf.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]>;
    /// The value of a model-specific register; nothing if it cannot be read.
    fn read_msr(&self, index: u32) -> Option<u64>;
    /// Writes a model-specific register; false if it cannot be written so.
    fn write_msr(&self, index: u32, value: u64) -> bool;
}

/// A place in the guest's code that was rewritten so that the VMM does there what the code did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// `mov cr3, rax`.
    LoadCr3,
    /// `jmp *rax`.
    JumpRax,
}

/// A platform. Every method may say that it knows nothing of what is asked; that is then odd, or a
/// crash, as for a guest test.
pub trait Platform<M, S>: Sync {
    /// Fills `data` with what a read of `port` gives; false if there is no device.
    fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        let _ = (port, data);
        false
    }

    /// Takes what `vcpu` wrote to `port`; nothing if there is no device.
    ///
    /// # Errors
    /// Guest memory, which a device reads or writes, could not be reached.
    fn write_port(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        port: u16,
        data: &[u8],
    ) -> Result<Option<Flow>, MemoryError> {
        let _ = (engine, vcpu, port, data);
        Ok(None)
    }

    /// Fills `data` with what a read of the device registers at `raw_gpa` gives; false if there are none.
    fn read_mmio(&self, raw_gpa: u64, data: &mut [u8]) -> bool {
        let _ = (raw_gpa, data);
        false
    }

    /// Takes what was written to device registers at `raw_gpa`; false if there are none.
    fn write_mmio(&self, raw_gpa: u64, data: &[u8]) -> bool {
        let _ = (raw_gpa, data);
        false
    }

    /// The hook that a write to `port` stands for, if one does.
    fn hook(&self, port: u16) -> Option<Hook> {
        let _ = port;
        None
    }

    /// `vcpu` came to `hook`, RAX being `rax`, and has done what it stands for. `paged64` says that
    /// it is in long mode with paging on.
    ///
    /// # Errors
    /// Guest memory could not be reached.
    fn hooked(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        hook: Hook,
        rax: u64,
        paged64: bool,
    ) -> Result<Flow, MemoryError> {
        let _ = (engine, vcpu, hook, rax, paged64);
        Ok(Flow::Continue)
    }

    /// An access to `raw_gpa`, where no memory is; a read gives all ones. Nothing if that is fatal.
    fn nowhere(&self, engine: &mut Engine<M, S>, vcpu: u32, raw_gpa: u64) -> Option<Flow> {
        let _ = (engine, vcpu, raw_gpa);
        None
    }

    /// Answers a TDCALL leaf that is the TDX module's to answer, in place; nothing if unknown.
    ///
    /// # Errors
    /// Guest memory could not be reached.
    fn leaf(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        regs: &mut Regs,
    ) -> Result<Option<Flow>, MemoryError> {
        let _ = (engine, vcpu, regs);
        Ok(None)
    }

    /// Answers a TDVMCALL with R10 0 and its sub-function in R11, in place; registers that were not
    /// passed read as 0. Nothing if unknown.
    ///
    /// # Errors
    /// Guest memory could not be reached.
    fn vmcall(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        regs: &mut Regs,
        cpu: &dyn Cpu,
    ) -> Result<Option<Flow>, MemoryError> {
        let _ = (engine, vcpu, regs, cpu);
        Ok(None)
    }

    /// The guest has crashed, or run out of time: what is known of why.
    fn post_mortem(&self, engine: &mut Engine<M, S>) {
        let _ = engine;
    }

    /// `vcpu` has nothing to do for a moment.
    fn idle(&self, engine: &mut Engine<M, S>, vcpu: u32) {
        let _ = (engine, vcpu);
    }
}

/// The platform of a guest test: nothing but its channel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bare;

impl<M, S> Platform<M, S> for Bare {}

/// A CPU of which nothing beside the general registers is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCpu;

impl Cpu for NoCpu {
    fn cpuid(&self, _leaf: u32, _subleaf: u32) -> Option<[u32; 4]> {
        None
    }

    fn read_msr(&self, _index: u32) -> Option<u64> {
        None
    }

    fn write_msr(&self, _index: u32, _value: u64) -> bool {
        false
    }
}
