//! First touches of guest memory: a thread a TD that serves userfaultfd, and asks the TD's memory
//! whether the touch is as it should be.
//!
//! One that is not stays unresolved: the vCPU is interrupted by a signal, leaves KVM_RUN with EINTR and
//! finds what it did in [`Runner`]. That wants a KVM that lets itself be interrupted while it waits for
//! a page of the guest's: Linux 6.2 and later.
//!
//! Sources: Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use mapgpa_abi::{Alias, PAGE_SIZE};

use crate::memory::Touch;
use crate::raw::{self, OwnFd, Sys};
use crate::td::{Td, lock};

/// UFFD_API.
const API: u64 = 0xaa;
/// UFFD_FEATURE_MISSING_SHMEM, THREAD_ID and MINOR_SHMEM.
const FEATURES: u64 = 1 << 5 | 1 << 8 | 1 << 10;
/// UFFDIO_REGISTER_MODE_MISSING.
const MISSING: u64 = 1;
/// UFFDIO_REGISTER_MODE_MINOR.
const MINOR: u64 = 1 << 2;
/// UFFD_EVENT_PAGEFAULT.
const PAGEFAULT: u8 = 0x12;
/// How long a touch that should not be may hold its thread up, in milliseconds. One that the signal
/// does not reach is resolved then, so that the vCPU comes out, and the page is taken away again.
const PATIENCE: i32 = 200;

const fn io(direction: u64, number: u64, size: u64) -> u64 {
    direction << 30 | size << 16 | 0xaa << 8 | number
}

/// A userfaultfd.
#[derive(Debug)]
pub(crate) struct Userfaultfd(OwnFd);

impl Userfaultfd {
    /// Opens one; this wants the privilege for faults in the kernel.
    pub(crate) fn new() -> Sys<Self> {
        let fd = raw::userfaultfd()?;
        let mut api = [API, FEATURES, 0];
        raw::ioctl_with(fd.0, io(3, 0x3f, 24), &mut api)?;
        Ok(Self(fd))
    }

    /// Takes over the faults of a mapping, of memory or of a file in memory.
    pub(crate) fn register(&self, at: u64, size: u64, file: bool) -> Sys<()> {
        let mode = if file { MISSING | MINOR } else { MISSING };
        let mut register = [at, size, mode, 0];
        raw::ioctl_with(self.0.0, io(3, 0x00, 32), &mut register).map(drop)
    }

    /// Puts a page with these bytes at `at`; EEXIST if one is there.
    pub(crate) fn copy(&self, at: u64, bytes: &[u8]) -> Sys<()> {
        let from = bytes.as_ptr().expose_provenance() as u64;
        let mut copy = [at, from, bytes.len() as u64, 0, 0];
        raw::ioctl_with(self.0.0, io(3, 0x03, 40), &mut copy).map(drop)
    }

    /// Puts what belongs there at the page `at`, and wakes who waits for it.
    fn resolve(&self, at: u64) {
        let page = at & !(PAGE_SIZE - 1);
        let mut zero = [page, PAGE_SIZE, 0, 0];
        let zeroed = raw::ioctl_with(self.0.0, io(3, 0x04, 32), &mut zero);
        // The file may have the page already; the mapping too.
        if zeroed == Err(libc::EEXIST) {
            let mut go_on = [page, PAGE_SIZE, 0, 0];
            let mapped = raw::ioctl_with(self.0.0, io(3, 0x07, 32), &mut go_on);
            if mapped.is_err() {
                let mut wake = [page, PAGE_SIZE];
                let _ = raw::ioctl_with(self.0.0, io(2, 0x02, 16), &mut wake);
            }
        }
    }

    /// The next fault: address and thread.
    fn next(&self) -> Option<(u64, i32)> {
        let mut message = [0u8; 32];
        let size = raw::read(self.0.0, &mut message).ok()?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| message[at + i]));
        let thread = i32::from_le_bytes(std::array::from_fn(|i| message[24 + i]));
        (size == message.len() && message[0] == PAGEFAULT).then(|| (word(16), thread))
    }
}

/// A touch that should not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Through which alias.
    pub(crate) alias: Alias,
    /// Which page: GPA without the shared bit.
    pub(crate) gpa: u64,
    /// What it comes to.
    pub(crate) touch: Touch,
}

/// A vCPU in the eyes of the thread that serves faults.
#[derive(Debug, Default)]
pub(crate) struct Runner {
    /// The thread that is in KVM_RUN, 0 for none.
    pub(crate) thread: AtomicI32,
    fault: Mutex<Option<Fault>>,
}

impl Runner {
    fn has_fault(&self) -> bool {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// What it did, once.
    pub(crate) fn take(&self) -> Option<Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The signal that takes a vCPU out of KVM_RUN.
pub(crate) fn signal() -> i32 {
    libc::SIGRTMAX() - 3
}

extern "C" fn nothing(_: i32) {}

/// Lets [`signal`] interrupt system calls of this thread.
pub(crate) fn allow_signal() {
    // SAFETY: zero is a valid set and a valid action; the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        libc::sigaction(signal(), &raw const action, std::ptr::null_mut());
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// What the thread is started with.
struct Start {
    td: Weak<Td>,
    uffd: Arc<Userfaultfd>,
    stop: Arc<OwnFd>,
}

/// Serves the faults of `td` on a thread of its own, until `stop` is written to or `td` is gone.
pub(crate) fn serve(
    td: Weak<Td>,
    uffd: Arc<Userfaultfd>,
    stop: Arc<OwnFd>,
) -> Sys<libc::pthread_t> {
    let start = Box::into_raw(Box::new(Start { td, uffd, stop }));
    let mut thread = 0;
    // SAFETY: the new thread takes over the box; attributes may be null. Not std's threads: those map
    // memory through the C library, which would be counted as the program's.
    let errno =
        unsafe { libc::pthread_create(&raw mut thread, std::ptr::null(), run, start.cast()) };
    if errno == 0 { Ok(thread) } else { Err(errno) }
}

extern "C" fn run(start: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: `serve` made it for this thread alone.
    let start = unsafe { Box::from_raw(start.cast::<Start>()) };
    let mut held: Vec<(u64, Arc<Runner>)> = Vec::new();
    loop {
        let mut polled = [start.uffd.0.0, start.stop.0].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        let patience = if held.is_empty() { -1 } else { PATIENCE };
        // SAFETY: an array of its length.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), 2, patience) };
        if ready == 0 {
            let stuck = held.drain(..).filter(|(_, runner)| runner.has_fault());
            stuck.for_each(|(address, _)| start.uffd.resolve(address));
        }
        if polled[1].revents != 0 {
            return std::ptr::null_mut();
        }
        while let Some((address, thread)) = start.uffd.next() {
            let Some(td) = start.td.upgrade() else { return std::ptr::null_mut() };
            if let Some(runner) = answer(&td, &start.uffd, address, thread) {
                held.push((address, runner));
            }
        }
    }
}

/// Answers a fault; gives the vCPU if it stays unresolved.
fn answer(td: &Td, uffd: &Userfaultfd, address: u64, thread: i32) -> Option<Arc<Runner>> {
    // Held until the page is there, so that no conversion comes between.
    let mut state = lock(&td.state);
    let runners = lock(&td.runners);
    let runner = runners.iter().find(|runner| runner.thread.load(Ordering::Acquire) == thread);
    if let (Some(runner), Some((alias, gpa))) = (runner, state.memory.find(address)) {
        let touch = state.memory.touch(alias, gpa);
        // A KVM that reads guest memory itself does not let itself be interrupted: it tries again.
        if touch != Touch::Fine && !runner.has_fault() {
            let fault = Fault { alias, gpa: gpa & !(PAGE_SIZE - 1), touch };
            *runner.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
            raw::tgkill(thread, signal());
            return Some(Arc::clone(runner));
        }
    }
    uffd.resolve(address);
    None
}
