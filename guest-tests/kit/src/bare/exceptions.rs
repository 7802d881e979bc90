//! Unhandled exceptions: entry points for vectors 0 to 31, which report all registers and stop.
//!
//! The guest cannot load an IDT at CPL 3, so the VMM does: the ELF note here tells it where the
//! entry points are. Each runs on the vCPU's stack for exceptions, so that a stack overflow is
//! reported too.

use core::arch::global_asm;

use mapgpa_abi::channel::{CRASH_WORDS, header, tag};
use mapgpa_abi::layout::{NOTE_NAME, NOTE_VECTORS, VECTOR_SIZE, VECTORS};

use super::BareTd;
use crate::Td;
use crate::calls::channel_word;

/// What the entry code below leaves on the stack, lowest address first.
#[repr(C)]
struct Frame {
    /// RAX, RBX, RCX, RDX, RSI, RDI, RBP, R8 to R15.
    general: [u64; 15],
    vector: u64,
    /// 0 for vectors without one.
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

// Vectors with an error code: 8, 10 to 14, 17, 21, 29, 30 (Intel SDM 3, table 7-1; AMD APM 2, 8.2).
global_asm!(
    ".pushsection .text.mapgpa_vectors, \"ax\", @progbits",
    ".balign 16",
    "mapgpa_vectors:",
    ".set mapgpa_vector, 0",
    ".rept {vectors}",
    ".balign {size}",
    ".if !((1 << mapgpa_vector) & 0x60227d00)",
    "push 0",
    ".endif",
    "push mapgpa_vector",
    "jmp mapgpa_exception",
    ".set mapgpa_vector, mapgpa_vector + 1",
    ".endr",
    "mapgpa_exception:",
    "push r15",
    "push r14",
    "push r13",
    "push r12",
    "push r11",
    "push r10",
    "push r9",
    "push r8",
    "push rbp",
    "push rdi",
    "push rsi",
    "push rdx",
    "push rcx",
    "push rbx",
    "push rax",
    "cld",
    "mov rdi, rsp",
    "call {report}",
    "ud2",
    ".popsection",
    // The note: sizes of name and descriptor, type, name padded to 4 bytes, descriptor.
    ".pushsection .note.mapgpa, \"a\", @note",
    ".balign 4",
    ".long {name_size}, 8, {note_type}",
    ".asciz \"mapgpa\"",
    ".balign 4",
    ".quad mapgpa_vectors",
    ".popsection",
    vectors = const VECTORS,
    size = const VECTOR_SIZE,
    report = sym report,
    name_size = const NOTE_NAME.len(),
    note_type = const NOTE_VECTORS,
);

extern "sysv64" fn report(frame: &Frame) -> ! {
    // The index is used for nothing here; the VMM knows whose message it is.
    let mut td = BareTd::new(0);
    let mut words = [0; CRASH_WORDS];
    let values = [frame.error, frame.rip, frame.rflags, frame.rsp];
    for (pair, value) in words.chunks_exact_mut(2).zip(values.iter().chain(&frame.general)) {
        pair.copy_from_slice(&[low(*value), low(*value >> 32)]);
    }
    channel_word(&mut td, header(tag::CRASH, low(frame.vector)));
    for word in words {
        channel_word(&mut td, word);
    }
    td.stop()
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
const fn low(value: u64) -> u32 {
    value as u32
}
