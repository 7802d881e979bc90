//! The probe: a guest that does what a script says, for tests of the VMM itself.
//!
//! The script is an array of 64-bit words at `abi::layout::INPUT`. Word n of the first 16 is the
//! index of the word where the script of vCPU n begins; 0 for none. An operation is its number
//! and its operands, as listed in [`main`].
#![no_std]
#![no_main]

use core::arch::asm;

use mapgpa_kit::abi::layout::INPUT;
use mapgpa_kit::abi::params::Params;
use mapgpa_kit::abi::tdcall::Regs;
use mapgpa_kit::abi::{Alias, Direction};
use mapgpa_kit::bare::BareTd;
use mapgpa_kit::{Td, calls, report};

mapgpa_kit::entry!(main);

/// The rest of a script.
struct Script {
    at: u64,
}

impl Script {
    fn next(&mut self, td: &mut BareTd) -> u64 {
        let word = td.read(Alias::Private, INPUT + 8 * self.at);
        self.at += 1;
        word
    }

    fn words<const N: usize>(&mut self, td: &mut BareTd) -> [u64; N] {
        core::array::from_fn(|_| self.next(td))
    }
}

fn main(td: &mut BareTd, _params: &Params) -> bool {
    report::hello(td);
    let vcpu = td.vcpu();
    let start = Script { at: vcpu }.next(td);
    if start == 0 {
        return true;
    }
    let mut script = Script { at: start };
    loop {
        match script.next(td) {
            // End: success.
            0 => return true,
            // A TDCALL with the 14 registers of `Regs`, in order; DATA: the same, afterwards.
            1 => {
                let regs = script.words(td);
                let regs = raw_tdcall(td, regs);
                report::data(td, &regs);
            }
            // Read 8 bytes: alias (1 shared), GPA; DATA: the value.
            2 => {
                let [side, gpa] = script.words(td);
                let value = td.read(alias(side), gpa);
                report::data(td, &[value]);
            }
            // Write 8 bytes: alias, GPA, value.
            3 => {
                let [side, gpa, value] = script.words(td);
                td.write(alias(side), gpa, value);
            }
            // An undefined instruction.
            // SAFETY: raises #UD, which is what the script wants.
            4 => unsafe { asm!("ud2", options(noreturn)) },
            // A loop without end and without exits.
            5 => loop {
                core::hint::spin_loop();
            },
            // `out` to a port, as many times as the count says; 0: without end.
            6 => {
                let [port, count] = script.words(td);
                let mut done = 0;
                while count == 0 || done < count {
                    // SAFETY: a port write is an exit; it changes no memory of this guest.
                    unsafe { asm!("out dx, eax", in("dx") port as u16, in("eax") done as u32) }
                    done += 1;
                }
            }
            // Wait for the other vCPUs.
            7 => report::barrier(td),
            // MapGPA of pieces: GPA, count, stride, size, 1 for to-shared, shared bit; DATA: how
            // many succeeded at once.
            8 => {
                let [gpa, count, stride, size, shared, bit] = script.words(td);
                let to = if shared == 1 { Direction::ToShared } else { Direction::ToPrivate };
                let bit = if to == Direction::ToShared { bit } else { 0 };
                let mut good = 0;
                for n in 0..count {
                    let result = calls::map_gpa(td, (gpa + n * stride) | bit, size);
                    good += u64::from(result.r10 == 0);
                }
                report::data(td, &[good]);
            }
            // Accept pages: GPA, count, stride, level; DATA: how many succeeded.
            9 => {
                let [gpa, count, stride, level] = script.words(td);
                let mut good = 0;
                for n in 0..count {
                    good += u64::from(calls::accept(td, gpa + n * stride, level) == 0);
                }
                report::data(td, &[good]);
            }
            // Write each GPA to itself: alias, GPA, count, stride.
            10 => {
                let [side, gpa, count, stride] = script.words(td);
                for n in 0..count {
                    td.write(alias(side), gpa + n * stride, gpa + n * stride);
                }
            }
            // Read as op 10 wrote: alias, GPA, count, stride; DATA: how many were zero, and how
            // many as written.
            11 => {
                let [side, gpa, count, stride] = script.words(td);
                let (mut zero, mut same) = (0, 0);
                for n in 0..count {
                    let value = td.read(alias(side), gpa + n * stride);
                    zero += u64::from(value == 0);
                    same += u64::from(value == gpa + n * stride);
                }
                report::data(td, &[zero, same]);
            }
            // Recurse until the stack is exhausted.
            12 => return overflow(0) == 0,
            op => panic!("no operation {op}"),
        }
    }
}

const fn alias(side: u64) -> Alias {
    if side == 1 { Alias::Shared } else { Alias::Private }
}

fn raw_tdcall(td: &mut BareTd, words: [u64; 14]) -> [u64; 14] {
    let [rax, rbx, rcx, rdx, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = words;
    let mut regs = Regs { rax, rbx, rcx, rdx, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 };
    td.tdcall(&mut regs);
    let Regs { rax, rbx, rcx, rdx, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 } = regs;
    [rax, rbx, rcx, rdx, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]
}

#[expect(unconditional_recursion, reason = "that is the point")]
#[inline(never)]
fn overflow(depth: u64) -> u64 {
    let local = core::hint::black_box([depth; 32]);
    overflow(depth + 1) + local[0]
}
