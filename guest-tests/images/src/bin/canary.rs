//! The canary: what `mapgpa host` boots to see what this machine's KVM can do.
//!
//! Each step reports DATA \[step, value\]; a KVM that cannot do a step ends the run there. Steps:
//! 1 the counted loop begins (value: instructions it will execute), 2 the loop has ended (the
//! VMM's clock between 1 and 2 gives instructions per second), 3 SSE arithmetic (value: 3),
//! 4 POPCNT (value: 32).
#![no_std]
#![no_main]

use core::arch::asm;

use mapgpa_kit::abi::params::Params;
use mapgpa_kit::bare::BareTd;
use mapgpa_kit::report::{data, hello};

mapgpa_kit::entry!(main);

/// Iterations of two instructions: half a millisecond at full speed, under a second at 3 MIPS.
const ITERATIONS: u64 = 1 << 20;

fn main(td: &mut BareTd, _params: &Params) -> bool {
    hello(td);
    data(td, &[1, 2 * ITERATIONS]);
    // SAFETY: counts a register down.
    unsafe {
        asm!("2:", "sub {n}, 1", "jnz 2b", n = inout(reg) ITERATIONS => _, options(nomem, nostack));
    }
    data(td, &[2, 2 * ITERATIONS]);

    let sum: u64;
    // SAFETY: adds 1.0 and 2.0 in vector registers that are named as overwritten.
    unsafe {
        asm!(
            "cvtsi2sd xmm0, {one}",
            "cvtsi2sd xmm1, {two}",
            "addsd xmm0, xmm1",
            "cvttsd2si {sum}, xmm0",
            one = in(reg) 1u64,
            two = in(reg) 2u64,
            sum = out(reg) sum,
            out("xmm0") _,
            out("xmm1") _,
            options(nomem, nostack),
        );
    }
    data(td, &[3, sum]);

    let ones: u64;
    // SAFETY: an instruction on registers; where it does not exist, it raises #UD and is reported.
    unsafe {
        asm!(
            "popcnt {ones}, {value}",
            value = in(reg) 0x5555_5555_5555_5555u64,
            ones = out(reg) ones,
            options(nomem, nostack),
        );
    }
    data(td, &[4, ones]);
    true
}
