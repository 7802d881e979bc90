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

/// A platform. Every method may say that it knows nothing of what is asked; that is then odd, or a
/// crash, as for a guest test.
pub trait Platform<M, S>: Sync {
    /// Fills `data` with what a read of `port` gives; false if there is no device.
    fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        let _ = (port, data);
        false
    }

    /// Takes what `vcpu` wrote to `port`; nothing if there is no device.
    fn write_port(
        &self,
        engine: &mut Engine<M, S>,
        vcpu: u32,
        port: u16,
        data: &[u8],
    ) -> Option<Flow> {
        let _ = (engine, vcpu, port, data);
        None
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
