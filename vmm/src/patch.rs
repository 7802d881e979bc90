//! TDCALL in machine code: where it is, and its replacement by a port write that exits to the VMM.
//!
//! The four bytes of TDCALL can occur inside other instructions, and rewriting those would break a
//! guest in ways that look like its own faults. So each place is checked: x86 code that is decoded
//! from a wrong start falls into step with the right one within a few instructions, so decodings
//! from 32 different starts before the place vote on whether an instruction begins there.

use iced_x86::{Decoder, DecoderOptions, Instruction};
use mapgpa_abi::tdcall::{INSTRUCTION, TRAP};

/// How far before a place the decodings start, in bytes: far enough to fall into step.
const BEFORE: usize = 64;
/// How many decodings there are, each a byte after the other.
const VOTES: usize = 32;

/// What was done to some code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Patched {
    /// TDCALL instructions replaced.
    pub sites: u64,
    /// Places with the same bytes that are no instruction of their own, and were left alone.
    pub lookalikes: u64,
}

impl Patched {
    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { sites: self.sites + other.sites, lookalikes: self.lookalikes + other.lookalikes }
    }
}

/// Replaces each TDCALL in `code`, the bytes of an executable segment from its first on.
pub fn patch(code: &mut [u8]) -> Patched {
    let (sites, lookalikes) = find(code);
    for at in &sites {
        code[*at..at + TRAP.len()].copy_from_slice(&TRAP);
    }
    Patched { sites: sites.len() as u64, lookalikes }
}

/// Where in `code` TDCALLs are, and how many places only look like one.
#[must_use]
pub fn find(code: &[u8]) -> (Vec<usize>, u64) {
    find_instruction(code, &INSTRUCTION, &[64])
}

/// Replaces each `old` in `code`, which is 64-bit code with some of 32 bits in it (a firmware's), by
/// `new` of the same size.
pub fn replace(code: &mut [u8], old: &[u8], new: &[u8]) -> Patched {
    let (sites, lookalikes) = find_instruction(code, old, &[64, 32]);
    for at in &sites {
        code[*at..at + new.len()].copy_from_slice(new);
    }
    Patched { sites: sites.len() as u64, lookalikes }
}

/// Where in `code` the instruction `bytes` is, in code of any of `bits`, and how many places only
/// look like it.
fn find_instruction(code: &[u8], bytes: &[u8], bits: &[u32]) -> (Vec<usize>, u64) {
    let (sites, others): (Vec<_>, Vec<_>) = memchr::memmem::find_iter(code, bytes)
        .partition(|at| bits.iter().any(|bits| is_instruction(code, *at, bytes.len(), *bits)));
    (sites, others.len() as u64)
}

/// Whether most decodings that start before `at` come upon an instruction that begins there.
fn is_instruction(code: &[u8], at: usize, size: usize, bits: u32) -> bool {
    let first = at.saturating_sub(BEFORE);
    let starts = first..=first.max(at.saturating_sub(BEFORE - VOTES + 1));
    let (mut votes, mut voters) = (0, 0);
    for start in starts {
        voters += 1;
        votes += usize::from(comes_upon(code, start, at, size, bits));
    }
    2 * votes > voters
}

/// Whether decoding from `start` comes upon an instruction that begins at `at`.
fn comes_upon(code: &[u8], start: usize, at: usize, size: usize, bits: u32) -> bool {
    let end = code.len().min(at + size);
    let mut decoder = Decoder::new(bits, &code[start..end], DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while start + decoder.position() < at && decoder.can_decode() {
        decoder.decode_out(&mut instruction);
    }
    start + decoder.position() == at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `mov rax, [rsp + 8]; add rax, rcx; ret` and padding, as compilers write it.
    fn filler() -> Vec<u8> {
        [0x48, 0x8b, 0x44, 0x24, 0x08, 0x48, 0x01, 0xc8, 0xc3, 0xcc, 0xcc, 0x90].repeat(12)
    }

    #[test]
    fn an_instruction_is_replaced_and_its_bytes_elsewhere_are_not() {
        let mut code = filler();
        let at = code.len();
        code.extend(INSTRUCTION);
        code.extend(filler());
        // mov rax, imm64, whose immediate has TDCALL's bytes in it.
        let inside = code.len() + 4;
        code.extend([0x48, 0xb8, 0x11, 0x22, 0x66, 0x0f, 0x01, 0xcc, 0x33, 0x44]);
        code.extend(filler());
        assert_eq!(patch(&mut code), Patched { sites: 1, lookalikes: 1 });
        assert_eq!(code[at..at + 4], TRAP);
        assert_eq!(code[inside..inside + 4], INSTRUCTION);
    }

    #[test]
    fn at_either_end_of_the_code() {
        let mut code = INSTRUCTION.to_vec();
        code.extend(filler());
        code.extend(INSTRUCTION);
        assert_eq!(patch(&mut code).sites, 2);
        assert_eq!(patch(&mut code).sites, 0);
        assert_eq!(patch(&mut []), Patched::default());
        assert_eq!(patch(&mut INSTRUCTION[..3].to_vec()), Patched::default());
    }
}
