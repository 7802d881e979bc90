//! A TDX host for tests, on a machine without TDX: a library to preload (LD_PRELOAD) into a dynamically
//! linked VMM. It stands in for the C library's `open`, `ioctl`, `mmap` and the like, and answers for
//! /dev/kvm as a KVM with TDX does, on top of an ordinary KVM VM.
//!
//! What it checks and answers is written from the sources of Linux and of the TDX module, not from those
//! of the VMM that it tests. The model of MapGPA alone is the VMM's own (`mapgpa-kvm-model`), as that is
//! what `--front-end kvm-*` promises.
//!
//! How it works: a VM of type 5 is a VM of type 0 with the state of a TD beside it ([`td`]). The TDCALL
//! instructions in the memory that KVM_TDX_INIT_MEM_REGION adds become port writes, which exit with the
//! guest's registers; [`tdcall`] answers them inside of the program's KVM_RUN ([`run`]). The program
//! sees a `struct kvm_run` of this library's ([`vcpu`]). Memory is private or shared, pending or
//! accepted, as [`memory`] says, and userfaultfd catches touches that a TD would not survive
//! ([`faults`]).
//!
//! Not modelled: CR0 and CR4 bits that a TD cannot change, CPUID leaves that raise #VE, TDCALL at other
//! privilege levels than 0, attestation, large pages.
#![allow(unsafe_code, reason = "stands in for the C library and for KVM")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the kernel's interface: registers and fields hold what fits by its rules"
)]

mod cpuid;
mod faults;
mod host;
mod log;
mod map_gpa;
mod memory;
mod profile;
mod raw;
mod registry;
mod run;
mod slots;
mod td;
mod tdcall;
mod tdx;
mod uapi;
mod vcpu;

use std::ffi::{CStr, c_char, c_int, c_long, c_ulong, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use registry::Handle;

/// Set when /dev/kvm was opened; before, nothing is looked at.
static ACTIVE: AtomicBool = AtomicBool::new(false);

/// A system call's result as the C library gives it.
fn result<T: From<i8>>(value: raw::Sys<T>) -> T {
    value.unwrap_or_else(|errno| {
        raw::set_errno(errno);
        T::from(-1)
    })
}

fn open_at(dir: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    // SAFETY: the caller passes a path, which the kernel would read too.
    let kvm = !path.is_null() && unsafe { CStr::from_ptr(path) } == c"/dev/kvm";
    if kvm && profile::get().host_is("no-access") {
        return result(log::refuse(libc::EACCES, "open of /dev/kvm"));
    }
    let opened = raw::openat(dir, path, flags, mode);
    if let (true, Ok(fd)) = (kvm, opened) {
        ACTIVE.store(true, Ordering::Release);
        registry::add(fd, Handle::Kvm);
        log::at_exit();
    }
    result(opened)
}

/// open(3).
#[unsafe(no_mangle)]
pub extern "C" fn open(path: *const c_char, flags: c_int, mode: u32) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn open64(path: *const c_char, flags: c_int, mode: u32) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

/// openat(3).
#[unsafe(no_mangle)]
pub extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    open_at(dir, path, flags, mode)
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    open_at(dir, path, flags, mode)
}

fn handle(fd: c_int) -> Option<Handle> {
    if ACTIVE.load(Ordering::Acquire) { registry::get(fd) } else { None }
}

/// ioctl(3).
///
/// # Safety
///
/// `arg` must be what `request` wants, as for the kernel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    let arg = arg.expose_provenance() as u64;
    // Some programs pass the number sign-extended.
    let number = request & 0xffff_ffff;
    let answer = match handle(fd) {
        Some(Handle::Kvm) => host::of_kvm(fd, number, arg),
        Some(Handle::Vm(td)) => Some(host::of_td(&td, number, arg)),
        Some(Handle::Vcpu(vcpu)) if number == uapi::ioctl::RUN => Some(vcpu.run()),
        Some(Handle::Vcpu(vcpu)) => Some(vcpu.ioctl(number, arg)),
        Some(Handle::Memfd(_)) => Some(Err(libc::ENOTTY)),
        None => None,
    };
    // SAFETY: the caller's own argument.
    result(answer.unwrap_or_else(|| unsafe { raw::ioctl(fd, request, arg) }))
}

/// close(3).
#[unsafe(no_mangle)]
pub extern "C" fn close(fd: c_int) -> c_int {
    if ACTIVE.load(Ordering::Acquire) {
        match registry::remove(fd) {
            Some(Handle::Vm(_)) => log::VMS.give(),
            Some(Handle::Vcpu(_)) => log::VCPUS.give(),
            Some(Handle::Memfd(_)) => log::MEMFDS.give(),
            Some(Handle::Kvm) | None => {}
        }
    }
    result(raw::close(fd).map(|_| 0))
}

/// mmap(3).
#[unsafe(no_mangle)]
pub extern "C" fn mmap(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: c_long,
) -> *mut c_void {
    let (fd, held) = match handle(fd) {
        Some(Handle::Vcpu(vcpu)) => (vcpu.file.0, &log::RUNS),
        Some(Handle::Memfd(_)) => {
            raw::set_errno(libc::ENODEV);
            return libc::MAP_FAILED;
        }
        _ => (fd, &log::MAPPINGS),
    };
    let addr = addr.expose_provenance() as u64;
    match raw::mmap(addr, len as u64, prot, flags, fd, offset) {
        Ok(at) => {
            if ACTIVE.load(Ordering::Acquire) && flags & libc::MAP_FIXED == 0 {
                log::mapped(at, held);
            }
            std::ptr::with_exposed_provenance_mut(at as usize)
        }
        Err(errno) => {
            raw::set_errno(errno);
            libc::MAP_FAILED
        }
    }
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn mmap64(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: c_long,
) -> *mut c_void {
    mmap(addr, len, prot, flags, fd, offset)
}

/// munmap(3).
#[unsafe(no_mangle)]
pub extern "C" fn munmap(addr: *mut c_void, len: usize) -> c_int {
    let addr = addr.expose_provenance() as u64;
    if ACTIVE.load(Ordering::Acquire) {
        log::unmapped(addr);
    }
    result(raw::munmap(addr, len as u64).map(|_| 0))
}

/// madvise(3). Shared memory that this library put into a file loses its contents as memory would.
#[unsafe(no_mangle)]
pub extern "C" fn madvise(addr: *mut c_void, len: usize, advice: c_int) -> c_int {
    let (addr, len) = (addr.expose_provenance() as u64, len as u64);
    if advice == libc::MADV_DONTNEED && ACTIVE.load(Ordering::Acquire) {
        slots::discard_shared(addr, len);
    }
    result(raw::madvise(addr, len, advice).map(|_| 0))
}

/// fallocate(3).
#[unsafe(no_mangle)]
pub extern "C" fn fallocate(fd: c_int, mode: c_int, offset: c_long, len: c_long) -> c_int {
    match handle(fd) {
        Some(Handle::Memfd(memfd)) => {
            result(slots::fallocate(&memfd, mode, offset, len).map(|_| 0))
        }
        _ => result(raw::fallocate(fd, mode, offset, len).map(|_| 0)),
    }
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: c_long, len: c_long) -> c_int {
    fallocate(fd, mode, offset, len)
}

/// uname(3), with the release of the kernel that the host is.
///
/// # Safety
///
/// `name` must be a `struct utsname`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uname(name: *mut libc::utsname) -> c_int {
    // SAFETY: the caller's own argument.
    let done = unsafe { libc::syscall(libc::SYS_uname, name) };
    if done == 0 {
        let release: &[u8] = match profile::get().kernel {
            mapgpa_kvm_model::Kernel::V6_16 => b"6.16.0-simulated\0",
            mapgpa_kvm_model::Kernel::V7_2 => b"7.2.0-simulated\0",
        };
        // SAFETY: the kernel accepted it as a `struct utsname`.
        let field = unsafe { &mut (*name).release };
        for (slot, byte) in field.iter_mut().zip(release) {
            *slot = byte.cast_signed();
        }
    }
    done as c_int
}
