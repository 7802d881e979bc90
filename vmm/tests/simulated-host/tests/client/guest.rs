//! The guest of these tests: one page at the top of the first 4 GiB. From the initial state of a TD it
//! goes to 64-bit mode by page tables that the test has prepared, then executes a script: entries of 16
//! words, at 0xffff6000, that say what to do. What it finds it reports by TDVMCALL\<Instruction.IO\>.

use std::arch::global_asm;

/// Page tables: PML4, PDPT, PD of the first and the fourth GiB, PDPT and PD of the shared alias.
pub const TABLES: u64 = 0xffff_0000;
/// Virtual address of the shared alias of GPA 0.
pub const SHARED_VA: u64 = 1 << 39;
/// The port of the reports.
pub const PORT: u16 = 0x1d70;
/// Reported for #VE, with the exit reason.
pub const VE: u32 = 0xee00_0000;
/// Reported for interrupt vector 0x40 and for an NMI.
pub const EVENT: u32 = 0xe000_0040;
pub const NMI: u32 = 0xe000_0002;
/// Reported at the end of the script.
pub const END: u32 = 0xed00_0000;

global_asm!(
    ".pushsection .rodata",
    ".balign 4096",
    ".globl client_guest",
    "client_guest:",
    ".code32",
    "3: movl $0xffff0000, %eax",
    "movl %eax, %cr3",
    "movl %cr4, %eax",
    "orl $0x620, %eax",
    "movl %eax, %cr4",
    "lgdtl (0xfffff000 + 90f - client_guest)",
    "movl %cr0, %eax",
    "orl $0x80000000, %eax",
    "movl %eax, %cr0",
    "ljmpl $8, $(0xfffff000 + 64f - client_guest)",
    ".code64",
    "64: movl $16, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movl $0xffff9000, %esp",
    "lidt 91f(%rip)",
    "movl $0xffff6000, %ebp",
    "10: movq (%rbp), %rax",
    "cmpq $1, %rax",
    "je 11f",
    "cmpq $2, %rax",
    "je 12f",
    "cmpq $3, %rax",
    "je 13f",
    "cmpq $4, %rax",
    "je 14f",
    "cmpq $5, %rax",
    "je 15f",
    "cmpq $6, %rax",
    "je 16f",
    // The end: report it, then wait for ever.
    "movl $0xed000000, %eax",
    "call 80f",
    "20: xorl %eax, %eax",
    "movl $0xfc00, %ecx",
    "xorl %r10d, %r10d",
    "movl $12, %r11d",
    "movl $1, %r12d",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "jmp 20b",
    // 1: a TDCALL with RAX, RCX, R8, R10 to R15; reports RAX, R10, R11, two words each.
    "11: movq 8(%rbp), %rax",
    "movq 16(%rbp), %rcx",
    "movq 24(%rbp), %r8",
    "movq 32(%rbp), %r10",
    "movq 40(%rbp), %r11",
    "movq 48(%rbp), %r12",
    "movq 56(%rbp), %r13",
    "movq 64(%rbp), %r14",
    "movq 72(%rbp), %r15",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "movq %rax, %rbx",
    "movq %r10, %rsi",
    "movq %r11, %rdi",
    "movq %rbx, %rax",
    "call 81f",
    "movq %rsi, %rax",
    "call 81f",
    "movq %rdi, %rax",
    "call 81f",
    "jmp 19f",
    // 2: reads a byte and reports it.
    "12: movq 8(%rbp), %rax",
    "movzbl (%rax), %eax",
    "call 80f",
    "jmp 19f",
    // 3: writes a byte.
    "13: movq 8(%rbp), %rax",
    "movq 16(%rbp), %rcx",
    "movb %cl, (%rax)",
    "jmp 19f",
    // 4: a plain port write.
    "14: movl $0x80, %edx",
    "outb %al, %dx",
    "jmp 19f",
    // 5: WRMSR.
    "15: movq 8(%rbp), %rcx",
    "movq 16(%rbp), %rax",
    "movq 24(%rbp), %rdx",
    "wrmsr",
    "jmp 19f",
    // 6: lets interrupts in for a moment.
    "16: sti",
    "movl $100000, %ecx",
    "17: pause",
    "loop 17b",
    "cli",
    "19: addq $128, %rbp",
    "jmp 10b",
    // Reports EAX.
    "80: movl %eax, %r15d",
    "xorl %eax, %eax",
    "movl $0xfc00, %ecx",
    "xorl %r10d, %r10d",
    "movl $30, %r11d",
    "movl $4, %r12d",
    "movl $1, %r13d",
    "movl $0x1d70, %r14d",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "ret",
    // Reports RAX, low word first.
    "81: pushq %rax",
    "call 80b",
    "popq %rax",
    "shrq $32, %rax",
    "jmp 80b",
    // #VE: reports the exit reason and goes on behind the instruction.
    "50: movl $3, %eax",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "addq %r10, (%rsp)",
    "leal -0x12000000(%rcx), %eax",
    "call 80b",
    "iretq",
    // The registers of the instruction that an event comes after are kept.
    "60: pushq %rax",
    "pushq %rcx",
    "pushq %rdx",
    "pushq %r10",
    "pushq %r11",
    "pushq %r12",
    "pushq %r13",
    "pushq %r14",
    "pushq %r15",
    "jmpq *%rbx",
    "61: popq %r15",
    "popq %r14",
    "popq %r13",
    "popq %r12",
    "popq %r11",
    "popq %r10",
    "popq %rdx",
    "popq %rcx",
    "popq %rax",
    "popq %rbx",
    "iretq",
    // Vector 0x40: reports it, and the end of the interrupt to the x2APIC.
    "51: pushq %rbx",
    "leaq 53f(%rip), %rbx",
    "jmp 60b",
    "53: movl $0xe0000040, %eax",
    "call 80b",
    "movl $0x80b, %ecx",
    "xorl %eax, %eax",
    "xorl %edx, %edx",
    "wrmsr",
    "jmp 61b",
    "52: pushq %rbx",
    "leaq 54f(%rip), %rbx",
    "jmp 60b",
    "54: movl $0xe0000002, %eax",
    "call 80b",
    "jmp 61b",
    ".balign 16",
    "92: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "90: .short 23",
    ".long 0xfffff000 + 92b - client_guest",
    ".balign 16",
    "93: .fill 2 * 16, 1, 0",
    ".short 0xf000 + 52b - client_guest, 8, 0x8e00, 0xffff",
    ".quad 0",
    ".fill 17 * 16, 1, 0",
    ".short 0xf000 + 50b - client_guest, 8, 0x8e00, 0xffff",
    ".quad 0",
    ".fill 43 * 16, 1, 0",
    ".short 0xf000 + 51b - client_guest, 8, 0x8e00, 0xffff",
    ".quad 0",
    "91: .short 65 * 16 - 1",
    ".quad 0xfffff000 + 93b - client_guest",
    // The reset vector: a jump with a 32-bit distance to the first byte.
    ".fill 4080 - (. - client_guest), 1, 0x90",
    ".byte 0xe9",
    ".long client_guest - (client_guest + 4085)",
    ".fill 11, 1, 0x90",
    ".popsection",
    options(att_syntax)
);

unsafe extern "C" {
    static client_guest: [u8; 4096];
}

/// The page of code.
pub fn code() -> &'static [u8; 4096] {
    // SAFETY: defined above, never written.
    unsafe { &client_guest }
}

/// An entry of the script.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// TDCALL: RAX, RCX, R10 to R15.
    Tdcall(u64, u64, [u64; 6]),
    Read(u64),
    Write(u64, u8),
    PortWrite,
    Wrmsr(u32, u64),
    Interrupts,
}

impl Op {
    /// TDVMCALL `sub` with R12 to R15.
    pub const fn vmcall(sub: u64, r: [u64; 4]) -> Self {
        Self::Tdcall(0, 0xfc00, [0, sub, r[0], r[1], r[2], r[3]])
    }

    /// MapGPA.
    pub const fn map_gpa(gpa: u64, size: u64) -> Self {
        Self::vmcall(0x10001, [gpa, size, 0, 0])
    }

    /// TDG.MEM.PAGE.ACCEPT of a 4K page, or with `level` 1 of a 2M page.
    pub const fn accept(gpa: u64, level: u64) -> Self {
        Self::Tdcall(6, gpa | level, [0; 6])
    }

    fn words(self) -> [u64; 16] {
        let mut words = [0; 16];
        match self {
            Self::Tdcall(rax, rcx, r) => {
                words[..3].copy_from_slice(&[1, rax, rcx]);
                words[4..10].copy_from_slice(&r);
            }
            Self::Read(at) => words[..2].copy_from_slice(&[2, at]),
            Self::Write(at, value) => words[..3].copy_from_slice(&[3, at, value.into()]),
            Self::PortWrite => words[0] = 4,
            Self::Wrmsr(msr, value) => {
                words[..4].copy_from_slice(&[5, msr.into(), value & 0xffff_ffff, value >> 32]);
            }
            Self::Interrupts => words[0] = 6,
        }
        words
    }
}

/// The page of the script.
pub fn script(ops: &[Op]) -> [u8; 4096] {
    assert!(ops.len() < 32, "a page has room for 31 entries");
    let mut page = [0; 4096];
    let words = ops.iter().flat_map(|op| op.words());
    for (slot, word) in page.chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    page
}

/// Six pages of page tables, in pages of 2 MiB.
pub fn tables(shared_bit: u64) -> Vec<u8> {
    let mut tables = vec![[0u64; 512]; 6];
    let at = |index: u64| (TABLES + index * 4096) | 3;
    (tables[0][0], tables[0][1]) = (at(1), at(4));
    (tables[1][0], tables[1][3]) = (at(2), at(3));
    tables[4][0] = at(5);
    for (page, gpa) in (0..512).zip((0u64..).step_by(2 << 20)) {
        let flags = 0x83;
        tables[2][page] = gpa | flags;
        tables[3][page] = (3 << 30 | gpa) | flags;
        tables[5][page] = gpa | shared_bit | flags;
    }
    tables.concat().into_iter().flat_map(u64::to_le_bytes).collect()
}
