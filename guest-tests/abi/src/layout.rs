//! Where things lie in the address space of a guest test, and how a vCPU starts.
//!
//! A guest test runs with paging on and both aliases of all memory mapped: the private alias at
//! virtual address = GPA, the shared alias at [`SHARED_VA`] + GPA. Not mapped, so that a touch
//! crashes: the page at 0 (null pointers) and the lowest page of each stack (overflow).
//!
//! At the ELF's entry point RDI holds [`crate::params::GPA`], RSI the index of the vCPU, and RSP
//! the end of that vCPU's stack, [`stack_top`]. The rest of the general registers are 0.

/// Virtual address of the shared alias of GPA 0.
pub const SHARED_VA: u64 = 0x4000_0000_0000;
/// The most vCPUs a guest test can have.
pub const MAX_VCPUS: u64 = 16;
/// First byte after the parameter page: input of whoever drives the guest, up to [`STACKS`].
pub const INPUT: u64 = crate::params::GPA + crate::PAGE_SIZE;
/// GPA of the stack of vCPU 0, its unmapped page included.
pub const STACKS: u64 = 0x1_0000;
/// Bytes of a stack with its unmapped page.
pub const STACK_SIZE: u64 = 0x8000;
/// GPA of vCPU 0's stack for exceptions, one page a vCPU.
pub const FAULT_STACKS: u64 = STACKS + MAX_VCPUS * STACK_SIZE;
/// The lowest GPA at which an image may have segments.
pub const IMAGE_START: u64 = 0x10_0000;
/// The first GPA after the image; converted ranges lie above it.
pub const IMAGE_END: u64 = 0x100_0000;
/// Start of the hole in RAM below 4 GiB; the VMM's tables (GDT, IDT, TSS, page tables) lie in it.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Name of the ELF note ([`NOTE_VECTORS`]) of an image, as it is in the file.
pub const NOTE_NAME: &[u8] = b"mapgpa\0";
/// Type of the ELF note whose 8-byte descriptor is the address of the exception entry points:
/// that of vector n is [`VECTOR_SIZE`] * n bytes after it, for 0 to 31. An image without the note
/// is stopped by any exception, without registers in the report.
pub const NOTE_VECTORS: u32 = 1;
/// Bytes from one exception entry point to the next.
pub const VECTOR_SIZE: u64 = 16;
/// Number of exception entry points.
pub const VECTORS: u64 = 32;

/// The first GPA after RAM of `memory` bytes, which lies around the hole.
#[must_use]
pub const fn end_of_ram(memory: u64) -> u64 {
    if memory > HOLE_START { memory - HOLE_START + HOLE_END } else { memory }
}

/// RSP of `vcpu` at the entry point: a multiple of 16.
#[must_use]
pub const fn stack_top(vcpu: u64) -> u64 {
    STACKS + (vcpu + 1) * STACK_SIZE
}

/// RSP of `vcpu` when an exception is taken: a multiple of 16.
#[must_use]
pub const fn fault_stack_top(vcpu: u64) -> u64 {
    FAULT_STACKS + (vcpu + 1) * crate::PAGE_SIZE
}

// All of it lies below the image, and the image below the hole.
const _: () = assert!(FAULT_STACKS + MAX_VCPUS * crate::PAGE_SIZE <= IMAGE_START);
const _: () = assert!(IMAGE_END < HOLE_START);
