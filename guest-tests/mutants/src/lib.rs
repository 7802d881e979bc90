//! The retry loop of guest `reference`, and its mutants: the same loop with one of its guards taken out
//! or turned round. Whoever judges guests has to notice (vmm/tests/mutants.rs).
//!
//! `build.rs` makes them of the source text of `reference`.

use mapgpa_guests::{Conversion, Converted};
use mapgpa_kit::Td;
use mapgpa_kit::abi::Alias;
use mapgpa_kit::abi::tdcall::Regs;

/// What the modules of the mutants use.
mod prelude {
    pub(super) use core::fmt;

    pub(super) use mapgpa_guests::{Conversion, Converted, GaveUp};
    pub(super) use mapgpa_kit::Td;
    pub(super) use mapgpa_kit::abi::tdcall::{Regs, leaf, level, module, status, sub};
    pub(super) use mapgpa_kit::abi::{Direction, PAGE_SIZE, PAGE_SIZE_2M};

    pub(super) use super::AnyTd;
}

/// A mutant.
#[derive(Debug, Clone, Copy)]
pub struct Mutant {
    /// The line of the source on which what was replaced begins.
    pub line: &'static str,
    /// What was replaced.
    pub was: &'static str,
    /// By what.
    pub is: &'static str,
    /// Its conversion.
    pub convert: Convert,
}

/// A conversion function of a guest.
pub type Convert = fn(&mut AnyTd<'_>, &Conversion) -> Converted;

/// The loop as it is.
pub const ORIGINAL: Convert = original::convert;

/// A vCPU of any kind.
pub struct AnyTd<'a>(pub &'a mut dyn Td);

impl Td for AnyTd<'_> {
    fn tdcall(&mut self, regs: &mut Regs) {
        self.0.tdcall(regs);
    }

    fn read(&mut self, alias: Alias, gpa: u64) -> u64 {
        self.0.read(alias, gpa)
    }

    fn write(&mut self, alias: Alias, gpa: u64, value: u64) {
        self.0.write(alias, gpa, value);
    }

    fn stop(&mut self) -> ! {
        self.0.stop()
    }
}

impl std::fmt::Debug for AnyTd<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AnyTd")
    }
}

include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
