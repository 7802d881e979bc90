//! What guest code can do, whether it runs in a VM or inside the VMM's process.

use mapgpa_abi::Alias;
use mapgpa_abi::tdcall::Regs;

/// A vCPU of a TD, as seen by the code that runs on it.
pub trait Td {
    /// Executes TDCALL. `regs` holds the inputs and, on return, the outputs; RBX, RSI and RDI need
    /// not be passed on.
    fn tdcall(&mut self, regs: &mut Regs);

    /// Reads 8 bytes at `gpa` (no shared bit, 8-byte aligned) through `alias`.
    fn read(&mut self, alias: Alias, gpa: u64) -> u64;

    /// Writes 8 bytes at `gpa` (no shared bit, 8-byte aligned) through `alias`.
    fn write(&mut self, alias: Alias, gpa: u64, value: u64);

    /// Stops this vCPU for good; what it had to say has been sent.
    fn stop(&mut self) -> !;
}
