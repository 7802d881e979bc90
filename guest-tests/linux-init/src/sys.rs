//! Linux system calls of x86-64, and the entry point (Documentation/arch/x86 and the x86-64 psABI).

use core::arch::{asm, global_asm};
use core::ffi::CStr;

/// An error number.
#[derive(Clone, Copy)]
pub struct Errno(pub i32);

const READ: usize = 0;
const WRITE: usize = 1;
const OPEN: usize = 2;
const CLOSE: usize = 3;
const IOCTL: usize = 16;
const GETPID: usize = 39;
const UNAME: usize = 63;
const MOUNT: usize = 165;
const REBOOT: usize = 169;
const DELETE_MODULE: usize = 176;
const KEXEC_LOAD: usize = 246;
const EXIT_GROUP: usize = 231;
const FINIT_MODULE: usize = 313;

/// TCSBRK: with an argument other than 0, waits until all output has gone out.
const TCSBRK: usize = 0x5409;
const O_CLOEXEC: usize = 0o2_000_000;
const O_NONBLOCK: usize = 0o4000;
const REBOOT_MAGIC: [usize; 2] = [0xfee1_dead, 672_274_793];
const REBOOT_RESTART: usize = 0x0123_4567;
const REBOOT_KEXEC: usize = 0x4558_4543;

global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    start = sym start,
);

extern "C" fn start() -> ! {
    crate::main()
}

/// A system call, with what its result means.
///
/// # Safety
/// The arguments are what the call takes; memory that it reads or writes through them is valid.
unsafe fn call(number: usize, args: [usize; 5]) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the caller's promise; the kernel overwrites RCX and R11 beside the result.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    usize::try_from(result).map_err(|_| Errno(-(result as i32)))
}

/// Writes all of `bytes`, or as much as goes.
pub fn write_all(fd: usize, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: a live slice.
        match unsafe { call(WRITE, [fd, bytes.as_ptr() as usize, bytes.len(), 0, 0]) } {
            Ok(written) if written > 0 => bytes = &bytes[written..],
            _ => return,
        }
    }
}

/// Waits until a terminal's output has gone out.
pub fn drain(fd: usize) {
    // SAFETY: takes numbers only.
    let _ = unsafe { call(IOCTL, [fd, TCSBRK, 1, 0, 0]) };
}

/// Whether this is the first process of the system.
pub fn is_first_process() -> bool {
    // SAFETY: takes nothing.
    matches!(unsafe { call(GETPID, [0; 5]) }, Ok(1))
}

/// Ends this process.
pub fn exit(code: usize) -> ! {
    loop {
        // SAFETY: takes a number.
        let _ = unsafe { call(EXIT_GROUP, [code, 0, 0, 0, 0]) };
    }
}

/// The kernel's release.
pub fn release(buffer: &mut [u8; 65]) -> &str {
    let mut names = [[0u8; 65]; 6];
    // SAFETY: `struct utsname` is six arrays of 65 bytes.
    if unsafe { call(UNAME, [names.as_mut_ptr() as usize, 0, 0, 0, 0]) }.is_ok() {
        *buffer = names[2];
    }
    text(buffer)
}

/// The text up to the first 0.
fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    core::str::from_utf8(&bytes[..end]).unwrap_or("")
}

/// Mounts a file system without a device.
pub fn mount(kind: &CStr, at: &CStr) -> Result<(), Errno> {
    let kind = kind.as_ptr() as usize;
    // SAFETY: C strings; no flags, no data.
    unsafe { call(MOUNT, [kind, at.as_ptr() as usize, kind, 0, 0]) }.map(|_| ())
}

fn open(path: &CStr) -> Result<usize, Errno> {
    // SAFETY: a C string; read-only.
    unsafe { call(OPEN, [path.as_ptr() as usize, O_CLOEXEC, 0, 0, 0]) }
}

fn close(fd: usize) {
    // SAFETY: a number; the descriptor is ours and not used again.
    let _ = unsafe { call(CLOSE, [fd, 0, 0, 0, 0]) };
}

/// The text of a file, as far as the buffer holds it; empty if there is none.
pub fn read_file<'a>(path: &CStr, buffer: &'a mut [u8]) -> &'a str {
    let Ok(fd) = open(path) else { return "" };
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        // SAFETY: a live slice.
        match unsafe { call(READ, [fd, rest.as_mut_ptr() as usize, rest.len(), 0, 0]) } {
            Ok(read) if read > 0 => filled += read,
            _ => break,
        }
    }
    close(fd);
    core::str::from_utf8(&buffer[..filled]).unwrap_or("")
}

/// A path or name as a C string in `buffer`; nothing if it does not fit.
fn c_string<'a>(parts: [&str; 2], buffer: &'a mut [u8; 256]) -> Option<&'a CStr> {
    let mut at = 0;
    for part in parts {
        buffer.get_mut(at..at + part.len())?.copy_from_slice(part.as_bytes());
        at += part.len();
    }
    *buffer.get_mut(at)? = 0;
    CStr::from_bytes_until_nul(buffer).ok()
}

/// ENAMETOOLONG
const TOO_LONG: Errno = Errno(36);

/// Loads the module /modules/`file`.
pub fn load_module(file: &str) -> Result<(), Errno> {
    let mut buffer = [0; 256];
    let fd = open(c_string(["/modules/", file], &mut buffer).ok_or(TOO_LONG)?)?;
    // SAFETY: no parameters (an empty C string), no flags.
    let result = unsafe { call(FINIT_MODULE, [fd, c"".as_ptr() as usize, 0, 0, 0]) };
    close(fd);
    result.map(|_| ())
}

/// Unloads a module.
pub fn unload_module(name: &str) -> Result<(), Errno> {
    let mut buffer = [0; 256];
    let name = c_string([name, ""], &mut buffer).ok_or(TOO_LONG)?;
    // SAFETY: a C string.
    unsafe { call(DELETE_MODULE, [name.as_ptr() as usize, O_NONBLOCK, 0, 0, 0]) }.map(|_| ())
}

/// `struct kexec_segment`.
#[repr(C)]
struct Segment {
    bytes: *const u8,
    size: usize,
    address: usize,
    room: usize,
}

/// Kexecs into a "kernel" that resets the machine: mov al, 0xfe; 1: out 0x64, al; jmp 1b.
pub fn kexec_reset() -> Result<(), Errno> {
    const CODE: [u8; 6] = [0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfc];
    /// Anywhere in memory that every guest has.
    const ADDRESS: usize = 128 << 20;
    let segment = Segment { bytes: CODE.as_ptr(), size: CODE.len(), address: ADDRESS, room: 4096 };
    // SAFETY: one live segment; the flags 0 say: for this architecture.
    unsafe { call(KEXEC_LOAD, [ADDRESS, 1, &raw const segment as usize, 0, 0]) }?;
    reboot(REBOOT_KEXEC)
}

/// Resets the machine.
pub fn reset() {
    let _ = reboot(REBOOT_RESTART);
}

fn reboot(how: usize) -> Result<(), Errno> {
    // SAFETY: numbers only.
    unsafe { call(REBOOT, [REBOOT_MAGIC[0], REBOOT_MAGIC[1], how, 0, 0]) }.map(|_| ())
}
