//! memcpy and its kin, which compiled code calls and a C library would provide.
//!
//! In assembly where a loop would be compiled into a call of the function itself.

use core::arch::asm;

/// Copies `size` bytes; the two ranges do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear (System V ABI).
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") size => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// Copies `size` bytes; the two ranges may overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= size {
        // SAFETY: a copy upwards does not overwrite what it has yet to read.
        return unsafe { memcpy(to, from, size) };
    }
    // SAFETY: the caller vouches for both ranges; `size` is not 0, as the ranges overlap. The
    // direction flag is clear again afterwards.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") size => _,
            inout("rdi") to.add(size - 1) => _,
            inout("rsi") from.add(size - 1) => _,
            options(nostack),
        );
    }
    to
}

/// Sets `size` bytes to the low byte of `value`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, size: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear (System V ABI).
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") size => _,
            inout("rdi") to => _,
            in("eax") value,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// Compares `size` bytes; negative, 0 or positive as the first difference says.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, size: usize) -> i32 {
    for at in 0..size {
        // SAFETY: the caller vouches for both ranges.
        let (l, r) = unsafe { (*left.add(at), *right.add(at)) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

/// Compares `size` bytes; 0 if they are the same.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, size: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, size) }
}
