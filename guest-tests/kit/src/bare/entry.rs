//! The entry point: from the registers of `abi::layout` to the guest test's function.
//!
//! Every vCPU starts here with paging on and a stack: the VMM sees to it on backend `emulated`, its
//! start-up code on `tdx`, where a vCPU begins in 32-bit mode at the reset vector.

use core::arch::naked_asm;

use mapgpa_abi::params::{Params, SIZE};

use super::BareTd;
use crate::report;

/// The guest test's function; [`entry!`](crate::entry!) names it.
pub type Main = fn(&mut BareTd, &Params) -> bool;

unsafe extern "Rust" {
    /// Defined by [`entry!`](crate::entry!).
    static MAPGPA_MAIN: Main;
}

/// Where each vCPU starts: RDI = GPA of the parameter page, RSI = vCPU index, RSP 16-byte aligned.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "sysv64" fn _start(params: *const [u8; SIZE], vcpu: u64) -> ! {
    naked_asm!("xor ebp, ebp", "call {start}", "ud2", start = sym start)
}

extern "sysv64" fn start(params: *const [u8; SIZE], vcpu: u64) -> ! {
    let mut td = BareTd::new(vcpu);
    // SAFETY: the VMM passes the address of a mapped private page that nothing else writes.
    let page = unsafe { &*params };
    let Some(params) = Params::from_bytes(page) else {
        report::panic(&mut td, "the parameter page is not one of this version")
    };
    td.marks = params.mark_replies;
    // SAFETY: a function pointer in constant memory, with the type that the macro demands.
    let main = unsafe { MAPGPA_MAIN };
    let success = main(&mut td, &params);
    report::exit(&mut td, success)
}
