//! From a TD's initial state to the entry point of a guest test: the start-up code, and the page that
//! tells it what to do.
//!
//! A vCPU of a TD starts in 32-bit protected mode at the reset vector, paging off, flat segments, with
//! EFER.LME set and its index in RSI (TDX module base specification, "Initial State of Guest GPRs" and
//! "Initial State of CRs"). The code goes to long mode by the tables of [`super::super::emulated`];
//! vCPU 0 then accepts what memory was not added; and all of them enter the guest test as
//! `mapgpa_abi::layout` says, at CPL 0.
#![allow(unsafe_code, reason = "the code's bytes are between two symbols")]

use std::arch::global_asm;

use mapgpa_abi::layout::{STACK_SIZE, STACKS};
use mapgpa_abi::tdcall::sub;
use mapgpa_abi::{PAGE_SIZE, PAGE_SIZE_2M, params};

use crate::backend::emulated::memory::HOST_PAGE;
use crate::pagemap::Pages;

/// GPA of the page that tells the code what to do.
pub(super) const JOB: u64 = CODE - PAGE_SIZE;
/// GPA of the page with the code: the last below 4 GiB.
const CODE: u64 = (1 << 32) - PAGE_SIZE;
/// Offset of the reset vector in that page.
const RESET: usize = 0xff0;

/// Offsets in the job page.
const GDT: usize = 0;
const CR3: usize = 8;
const IDT: usize = 0x10;
const ENTRY: usize = 0x20;
const RELEASED: usize = 0x38;
const COUNT: usize = 0x40;
const RANGES: usize = 0x50;
/// The most ranges to accept.
const RANGES_MAX: usize = (HOST_PAGE - RANGES) / 16;

/// The pages that hold all of it, and 2 MiB around them.
pub(super) const PAGES: Pages = Pages::of_bytes(JOB, 2 * PAGE_SIZE);
/// Start of the 2 MiB in which they lie.
pub(super) const BLOCK: u64 = (1 << 32) - PAGE_SIZE_2M;

// EDI holds the job page throughout, from RCX, which is KVM_TDX_INIT_VCPU's to choose. Nothing uses the stack before it is set, which is memory that may
// not be accepted yet. TDCALL leaves RDI, RSI and R12 to R15 alone.
global_asm!(
    ".pushsection .rodata.mapgpa_td_startup, \"a\", @progbits",
    // Who uses them may be compiled into another object than this is.
    ".globl mapgpa_td_startup, mapgpa_td_nmi, mapgpa_td_startup_end",
    ".hidden mapgpa_td_startup, mapgpa_td_nmi, mapgpa_td_startup_end",
    ".balign 16",
    "mapgpa_td_startup:",
    ".code32",
    "movl %ecx, %edi",
    "lgdt {gdt}(%edi)",
    "movl %cr4, %eax",
    "orl $0x620, %eax", // PAE, OSFXSR, OSXMMEXCPT
    "movl %eax, %cr4",
    "movl {cr3}(%edi), %eax",
    "movl %eax, %cr3",
    "movl %cr0, %eax",
    "andl $0xfffffff3, %eax", // EM, TS
    "orl $0x80010002, %eax",  // PG, WP, MP
    "movl %eax, %cr0",
    ".byte 0xea", // a far jump, which the assembler writes in one form only
    ".long 2f - mapgpa_td_startup + {code}",
    ".word {selector_code}",
    ".code64",
    "2:",
    "movl ${selector_data}, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movl %eax, %fs",
    "movl %eax, %gs",
    "movl %edi, %edi", // upper halves are not defined before
    "movl %esi, %esi",
    "lidt {idt}(%rdi)",
    "movl %esi, %eax",
    "shll $4, %eax",
    "addl ${selector_tss}, %eax",
    "ltr %ax",
    "leal 1(%rsi), %eax",
    "imull ${stack_size}, %eax, %eax",
    "addl ${stacks}, %eax",
    "movq %rax, %rsp",
    "fninit",
    "testl %esi, %esi",
    "jnz 8f",
    // vCPU 0 accepts: R15 ranges to go, R14 the next, R12 to R13 the one at hand.
    "movq {count}(%rdi), %r15",
    "leaq {ranges}(%rdi), %r14",
    "3:",
    "testq %r15, %r15",
    "jz 7f",
    "decq %r15",
    "movq (%r14), %r12",
    "movq 8(%r14), %r13",
    "addq $16, %r14",
    "4:",
    "cmpq %r13, %r12",
    "jae 3b",
    "testq $0x1fffff, %r12",
    "jnz 5f",
    "leaq 0x200000(%r12), %rax",
    "cmpq %r13, %rax",
    "ja 5f",
    "leaq 1(%r12), %rcx", // 2 MiB; what the host mapped by 4 KiB answers PAGE_SIZE_MISMATCH
    "movl $6, %eax",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "shrq $32, %rax",
    "cmpl $0xc0000b0b, %eax",
    "je 5f",
    "movl $0x200000, %edx",
    "jmp 6f",
    "5:",
    "movq %r12, %rcx",
    "movl $6, %eax",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "shrq $32, %rax",
    "movl $0x1000, %edx",
    "6:",
    "addq %rdx, %r12",
    "testl %eax, %eax",
    "jz 4b",
    "cmpl $0xb0a, %eax", // PAGE_ALREADY_ACCEPTED
    "je 4b",
    // TDVMCALL<ReportFatalError>: R12 bit 63 for a GPA in R13, R14 a text.
    "subq %rdx, %r12",
    "movq %r12, %r13",
    "movabsq $0x747065636361, %r14", // "accept"
    "9:",
    "movl $1, %r12d",
    "shlq $63, %r12",
    "movl $0x7c00, %ecx",
    "xorl %r10d, %r10d",
    "movl ${fatal}, %r11d",
    "xorl %eax, %eax",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "jmp 9b",
    "7:",
    "movl $1, {released}(%rdi)",
    "8:",
    "pause",
    "cmpl $0, {released}(%rdi)",
    "je 8b",
    "pushq {entry}(%rdi)",
    "movl ${params}, %edi",
    "xorl %eax, %eax",
    "xorl %ebx, %ebx",
    "xorl %ecx, %ecx",
    "xorl %edx, %edx",
    "xorl %ebp, %ebp",
    "xorl %r8d, %r8d",
    "xorl %r9d, %r9d",
    "xorl %r10d, %r10d",
    "xorl %r11d, %r11d",
    "xorl %r12d, %r12d",
    "xorl %r13d, %r13d",
    "xorl %r14d, %r14d",
    "xorl %r15d, %r15d",
    "ret",
    "mapgpa_td_nmi:",
    "iretq",
    "mapgpa_td_startup_end:",
    ".popsection",
    code = const CODE,
    gdt = const GDT,
    cr3 = const CR3,
    idt = const IDT,
    entry = const ENTRY,
    released = const RELEASED,
    count = const COUNT,
    ranges = const RANGES,
    selector_code = const 2 << 3,
    selector_data = const 1 << 3,
    selector_tss = const 4 << 3,
    stack_size = const STACK_SIZE,
    stacks = const STACKS,
    fatal = const sub::REPORT_FATAL_ERROR,
    params = const params::GPA,
    options(att_syntax),
);

unsafe extern "C" {
    static mapgpa_td_startup: u8;
    static mapgpa_td_nmi: u8;
    static mapgpa_td_startup_end: u8;
}

/// The code's bytes, and the offset of what takes an NMI.
fn code() -> (&'static [u8], usize) {
    let start = &raw const mapgpa_td_startup;
    let size = (&raw const mapgpa_td_startup_end).addr() - start.addr();
    let nmi = (&raw const mapgpa_td_nmi).addr() - start.addr();
    // SAFETY: the bytes between two symbols of one read-only section.
    (unsafe { std::slice::from_raw_parts(start, size) }, nmi)
}

/// GPA of the code that takes an NMI: it returns.
pub(super) fn nmi() -> u64 {
    CODE + code().1 as u64
}

/// What the code is to do.
#[derive(Debug)]
pub(super) struct Job<'a> {
    /// GDT: address and limit.
    pub(super) gdt: (u64, u16),
    /// IDT: address and limit.
    pub(super) idt: (u64, u16),
    /// GPA of the page tables.
    pub(super) cr3: u64,
    /// The guest test's entry point.
    pub(super) entry: u64,
    /// What is to be accepted.
    pub(super) accept: &'a [Pages],
}

impl Job<'_> {
    /// The contents of [`PAGES`]; nothing if there are too many ranges.
    pub(super) fn bytes(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 2 * HOST_PAGE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(GDT, &self.gdt.1.to_le_bytes());
        put(GDT + 2, &self.gdt.0.to_le_bytes()[..4]);
        put(CR3, &self.cr3.to_le_bytes());
        put(IDT, &self.idt.1.to_le_bytes());
        put(IDT + 2, &self.idt.0.to_le_bytes());
        put(ENTRY, &self.entry.to_le_bytes());
        put(COUNT, &(self.accept.len() as u64).to_le_bytes());
        if self.accept.len() > RANGES_MAX {
            return None;
        }
        for (at, range) in self.accept.iter().enumerate() {
            put(RANGES + 16 * at, &range.gpa().to_le_bytes());
            put(RANGES + 16 * at + 8, &(range.end() * PAGE_SIZE).to_le_bytes());
        }
        let page = HOST_PAGE;
        let (code, _) = code();
        put(page, code);
        // A jump to the code's start, relative to the byte after it.
        put(page + RESET, &[0xe9]);
        let back = -(i32::try_from(RESET).ok()? + 5);
        put(page + RESET + 1, &back.to_le_bytes());
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_below_the_reset_vector_which_jumps_to_it() {
        let (code, nmi) = code();
        assert!(code.len() < RESET, "{}", code.len());
        assert_eq!(&code[nmi..], &[0x48, 0xcf], "iretq");
        let accept = [Pages { first: 2, count: 3 }];
        let job = Job { gdt: (1, 2), idt: (3, 4), cr3: 5, entry: 6, accept: &accept };
        let bytes = job.bytes().expect("few ranges");
        assert_eq!(bytes.len(), 2 * HOST_PAGE);
        let vector = &bytes[HOST_PAGE + RESET..];
        let jump = i32::from_le_bytes(vector[1..5].try_into().unwrap());
        assert_eq!(RESET as i64 + 5 + i64::from(jump), 0);
        // The far jump goes to 64-bit code in the same page.
        let at = code.iter().position(|byte| *byte == 0xea).expect("a far jump");
        let target = u32::from_le_bytes(code[at + 1..at + 5].try_into().unwrap());
        assert_eq!(u64::from(target), CODE + at as u64 + 7);
        let many = [accept[0]; RANGES_MAX + 1];
        assert!(Job { accept: &many, ..job }.bytes().is_none());
    }
}
