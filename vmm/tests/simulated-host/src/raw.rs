//! System calls without the C library's wrappers, which this library stands in for.

use std::ffi::c_void;

/// A system call's result: its value, or the positive errno.
pub(crate) type Sys<T = i64> = Result<T, i32>;

fn call(number: i64, args: [u64; 6]) -> Sys {
    // SAFETY: each caller below passes what the kernel's interface of that call wants; memory named by
    // pointers is the caller's to vouch for.
    let value =
        unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]) };
    if value == -1 { Err(errno()) } else { Ok(value) }
}

/// The calling thread's errno.
pub(crate) fn errno() -> i32 {
    // SAFETY: the address is that of a thread-local variable.
    unsafe { *libc::__errno_location() }
}

/// Sets the calling thread's errno.
pub(crate) fn set_errno(value: i32) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = value }
}

#[expect(clippy::cast_sign_loss, reason = "descriptors are passed on as they are")]
const fn fd(fd: i32) -> u64 {
    fd as i64 as u64
}

/// ioctl(2).
///
/// # Safety
///
/// `arg` must be what `request` wants.
pub(crate) unsafe fn ioctl(of: i32, request: u64, arg: u64) -> Sys<i32> {
    call(libc::SYS_ioctl, [fd(of), request, arg, 0, 0, 0]).map(narrow)
}

/// ioctl(2) with a pointer to a value that the kernel reads, or writes, or both.
pub(crate) fn ioctl_with<T>(of: i32, request: u64, arg: &mut T) -> Sys<i32> {
    // SAFETY: `arg` is exclusive and alive; callers pair the request with its type.
    unsafe { ioctl(of, request, std::ptr::from_mut(arg).expose_provenance() as u64) }
}

/// openat(2).
pub(crate) fn openat(dir: i32, path: *const libc::c_char, flags: i32, mode: u32) -> Sys<i32> {
    let args = [fd(dir), path.expose_provenance() as u64, fd(flags), u64::from(mode), 0, 0];
    call(libc::SYS_openat, args).map(narrow)
}

/// close(2).
pub(crate) fn close(of: i32) -> Sys {
    call(libc::SYS_close, [fd(of), 0, 0, 0, 0, 0])
}

/// mmap(2).
pub(crate) fn mmap(addr: u64, len: u64, prot: i32, flags: i32, of: i32, at: i64) -> Sys<u64> {
    #[expect(clippy::cast_sign_loss, reason = "an address, an offset")]
    call(libc::SYS_mmap, [addr, len, fd(prot), fd(flags), fd(of), at as u64]).map(|at| at as u64)
}

/// munmap(2).
pub(crate) fn munmap(addr: u64, len: u64) -> Sys {
    call(libc::SYS_munmap, [addr, len, 0, 0, 0, 0])
}

/// madvise(2).
pub(crate) fn madvise(addr: u64, len: u64, advice: i32) -> Sys {
    call(libc::SYS_madvise, [addr, len, fd(advice), 0, 0, 0])
}

/// fallocate(2).
#[expect(clippy::cast_sign_loss, reason = "offsets")]
pub(crate) fn fallocate(of: i32, mode: i32, at: i64, len: i64) -> Sys {
    call(libc::SYS_fallocate, [fd(of), fd(mode), at as u64, len as u64, 0, 0])
}

/// A new file of `size` bytes in memory; `name` is for /proc.
pub(crate) fn memfd(name: &std::ffi::CStr, size: u64) -> Sys<OwnFd> {
    let args = [name.as_ptr().expose_provenance() as u64, u64::from(libc::MFD_CLOEXEC), 0, 0, 0, 0];
    let file = OwnFd(call(libc::SYS_memfd_create, args).map(narrow)?);
    call(libc::SYS_ftruncate, [fd(file.0), size, 0, 0, 0, 0])?;
    Ok(file)
}

/// A second descriptor of the same file.
pub(crate) fn dup(of: i32) -> Sys<OwnFd> {
    let args = [fd(of), fd(libc::F_DUPFD_CLOEXEC), 64, 0, 0, 0];
    call(libc::SYS_fcntl, args).map(|new| OwnFd(narrow(new)))
}

/// userfaultfd(2), with faults in the kernel.
pub(crate) fn userfaultfd() -> Sys<OwnFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    call(libc::SYS_userfaultfd, [fd(flags), 0, 0, 0, 0, 0]).map(|new| OwnFd(narrow(new)))
}

/// eventfd2(2).
pub(crate) fn eventfd() -> Sys<OwnFd> {
    call(libc::SYS_eventfd2, [0, fd(libc::EFD_CLOEXEC), 0, 0, 0, 0]).map(|new| OwnFd(narrow(new)))
}

/// write(2).
pub(crate) fn write(of: i32, bytes: &[u8]) -> Sys {
    let args = [fd(of), bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64, 0, 0, 0];
    call(libc::SYS_write, args)
}

/// read(2).
pub(crate) fn read(of: i32, bytes: &mut [u8]) -> Sys<usize> {
    let at = bytes.as_mut_ptr().expose_provenance() as u64;
    let args = [fd(of), at, bytes.len() as u64, 0, 0, 0];
    call(libc::SYS_read, args).map(|count| usize::try_from(count).unwrap_or(0))
}

/// The calling thread's number.
pub(crate) fn gettid() -> i32 {
    call(libc::SYS_gettid, [0; 6]).map_or(0, narrow)
}

/// Sends `signal` to thread `tid` of this process.
pub(crate) fn tgkill(tid: i32, signal: i32) {
    let pid = std::process::id();
    // The thread may have ended meanwhile.
    let _ = call(libc::SYS_tgkill, [u64::from(pid), fd(tid), fd(signal), 0, 0, 0]);
}

/// Copies between this process and itself, so that a bad address of the caller's is EFAULT.
fn copy(number: i64, own: *mut c_void, theirs: u64, len: usize) -> Sys<()> {
    let local = libc::iovec { iov_base: own, iov_len: len };
    let remote = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(theirs as usize),
        iov_len: len,
    };
    let local = std::ptr::from_ref(&local).expose_provenance() as u64;
    let remote = std::ptr::from_ref(&remote).expose_provenance() as u64;
    let copied = call(number, [u64::from(std::process::id()), local, 1, remote, 1, 0])?;
    if usize::try_from(copied) == Ok(len) { Ok(()) } else { Err(libc::EFAULT) }
}

/// Fills `bytes` from the caller's memory: copy_from_user.
pub(crate) fn copy_in(theirs: u64, bytes: &mut [u8]) -> Sys<()> {
    copy(libc::SYS_process_vm_readv, bytes.as_mut_ptr().cast(), theirs, bytes.len())
}

/// A `T` from the caller's memory.
pub(crate) fn get<T: Plain>(theirs: u64) -> Sys<T> {
    let mut value = T::default();
    let own = std::ptr::from_mut(&mut value).cast();
    copy(libc::SYS_process_vm_readv, own, theirs, size_of::<T>())?;
    Ok(value)
}

/// `value` into the caller's memory: copy_to_user.
pub(crate) fn put<T: Plain>(theirs: u64, value: &T) -> Sys<()> {
    let own = std::ptr::from_ref(value).cast_mut().cast();
    copy(libc::SYS_process_vm_writev, own, theirs, size_of::<T>())
}

/// `bytes` into the caller's memory.
pub(crate) fn put_bytes(theirs: u64, bytes: &[u8]) -> Sys<()> {
    copy(libc::SYS_process_vm_writev, bytes.as_ptr().cast_mut().cast(), theirs, bytes.len())
}

/// A structure of the kernel's interface: any bytes are a value of it.
///
/// # Safety
///
/// All bit patterns must be valid.
pub(crate) unsafe trait Plain: Default {}

// SAFETY: integers, and structures of integers of the kernel's interface.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_cpuid_entry2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_enable_cap {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_memory_attributes {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_create_guest_memfd {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_userspace_memory_region {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_userspace_memory_region2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_msr_entry {}
// SAFETY: as above.
unsafe impl Plain for crate::uapi::TdxCmd {}
// SAFETY: as above.
unsafe impl Plain for crate::uapi::TdxCapabilities {}
// SAFETY: as above.
unsafe impl Plain for crate::uapi::TdxInitVm {}
// SAFETY: as above.
unsafe impl Plain for crate::uapi::TdxInitMemRegion {}
// SAFETY: as above.
unsafe impl Plain for crate::uapi::Cpuid2 {}

#[expect(clippy::cast_possible_truncation, reason = "descriptors and small results fit")]
const fn narrow(value: i64) -> i32 {
    value as i32
}

/// A descriptor of this library's own, closed without passing by `close` below.
#[derive(Debug)]
pub(crate) struct OwnFd(pub(crate) i32);

impl Drop for OwnFd {
    fn drop(&mut self) {
        let _ = close(self.0);
    }
}

/// A mapping of this library's own.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Its first address.
    pub(crate) at: u64,
    /// Its size in bytes.
    pub(crate) size: u64,
}

impl Mapping {
    /// Memory of its own, or of a file.
    pub(crate) fn new(size: u64, file: Option<&OwnFd>) -> Sys<Self> {
        let kind = match file {
            Some(_) => libc::MAP_SHARED,
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        let flags = kind | libc::MAP_NORESERVE;
        let of = file.map_or(-1, |file| file.0);
        mmap(0, size, libc::PROT_READ | libc::PROT_WRITE, flags, of, 0).map(|at| Self { at, size })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let _ = munmap(self.at, self.size);
    }
}
