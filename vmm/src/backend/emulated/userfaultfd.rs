//! userfaultfd in missing mode: the host tells us when a page that is not there is touched, and
//! waits until we put one there (Linux, Documentation/admin-guide/mm/userfaultfd.rst).
#![allow(unsafe_code, reason = "system calls that no crate wraps")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::memory::HOST_PAGE;

/// `UFFD_API` (linux/userfaultfd.h).
const API: u64 = 0xaa;
/// `USERFAULTFD_IOC_NEW`, on /dev/userfaultfd (Linux 6.1).
const IOC_NEW: libc::Ioctl = 0xaa00;
/// `UFFDIO_API`.
const IOC_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// `UFFDIO_REGISTER`.
const IOC_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
/// `UFFDIO_UNREGISTER`.
const IOC_UNREGISTER: libc::Ioctl = 0x8010_aa01_u32 as libc::Ioctl;
/// `UFFDIO_WAKE`.
const IOC_WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
/// `UFFDIO_COPY`.
const IOC_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
/// `UFFDIO_ZEROPAGE`.
const IOC_ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`, and `struct uffdio_zeropage`, which has the same layout.
#[repr(C)]
struct RangeModeArg {
    range: RangeArg,
    mode: u64,
    out: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct CopyArg {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// An open userfaultfd. Ranges are host addresses and sizes in bytes, both multiples of a page.
#[derive(Debug)]
pub(super) struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Opens one that also catches what the kernel touches, as KVM does for a guest: by the system
    /// call, else by /dev/userfaultfd.
    ///
    /// # Errors
    /// Neither exists here, or the privilege for it is missing.
    pub(super) fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes a number and returns a new descriptor or -1.
        let mut fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            let device = std::fs::File::open("/dev/userfaultfd")?;
            // SAFETY: as above.
            fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) }.into();
        }
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made, and is nobody else's.
        let this = Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } };
        this.ioctl(IOC_API, &mut ApiArg { api: API, features: 0, ioctls: 0 })?;
        Ok(this)
    }

    /// From now on a touch of a missing page in the range waits for [`Userfaultfd::fill`].
    pub(super) fn register(&self, start: usize, len: usize) -> io::Result<()> {
        let range = RangeArg { start: start as u64, len: len as u64 };
        self.ioctl(IOC_REGISTER, &mut RangeModeArg { range, mode: MODE_MISSING, out: 0 })
    }

    /// Ends [`Userfaultfd::register`]; whoever waits in the range goes on.
    pub(super) fn unregister(&self, start: usize, len: usize) -> io::Result<()> {
        self.ioctl(IOC_UNREGISTER, &mut RangeArg { start: start as u64, len: len as u64 })
    }

    /// Puts a zero page at `page`, unless there is one or the range is no longer registered, and
    /// wakes who waits for it.
    pub(super) fn fill(&self, page: usize) -> io::Result<()> {
        loop {
            let range = RangeArg { start: page as u64, len: HOST_PAGE as u64 };
            let mut arg = RangeModeArg { range, mode: 0, out: 0 };
            let Err(error) = self.ioctl(IOC_ZEROPAGE, &mut arg) else { return Ok(()) };
            match error.raw_os_error() {
                // The mappings are being changed by somebody else.
                Some(libc::EAGAIN) => {}
                Some(libc::EEXIST | libc::ENOENT) => {
                    return self.ioctl(IOC_WAKE, &mut arg.range);
                }
                _ => return Err(error),
            }
        }
    }

    /// Puts a page with these contents at `page`, where none is, and wakes who waits for it.
    pub(super) fn copy(&self, page: usize, bytes: &[u8; HOST_PAGE]) -> io::Result<()> {
        let (to, from) = (page as u64, bytes.as_ptr().addr() as u64);
        loop {
            let mut arg = CopyArg { to, from, len: HOST_PAGE as u64, mode: 0, copied: 0 };
            match self.ioctl(IOC_COPY, &mut arg) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                done => return done,
            }
        }
    }

    /// The page of a touch that waits, if there is one.
    pub(super) fn read_fault(&self) -> io::Result<Option<usize>> {
        let mut message = Message::default();
        let size = size_of::<Message>();
        // SAFETY: the kernel writes at most `size` bytes of plain integers.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut message).cast(), size) };
        if read < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        }
        if message.event != EVENT_PAGEFAULT {
            return Err(io::Error::other(format!("userfaultfd event {:#x}", message.event)));
        }
        let address = usize::try_from(message.address).map_err(io::Error::other)?;
        Ok(Some(address & !(HOST_PAGE - 1)))
    }

    fn ioctl<T>(&self, request: libc::Ioctl, arg: &mut T) -> io::Result<()> {
        // SAFETY: each caller passes the structure that its request takes. What a request does to
        // memory concerns missing pages, which no Rust object lives in.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, arg) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
impl Userfaultfd {
    /// One for a test, which says that it is skipped where there is none, and fails if it must run.
    pub(super) fn of_test() -> Option<Self> {
        let required = std::env::var_os("MAPGPA_REQUIRE_KVM").is_some_and(|value| value == "1");
        match Self::open() {
            Ok(this) => Some(this),
            Err(error) if required => panic!("required, but no userfaultfd: {error}"),
            Err(error) => {
                eprintln!("skipped: no userfaultfd: {error}");
                None
            }
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
