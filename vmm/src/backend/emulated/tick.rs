//! A signal to the calling thread every 50 ms, which makes KVM_RUN return: so a vCPU that never
//! exits sees the deadline and Ctrl-C, without a thread that watches it.
#![allow(unsafe_code, reason = "POSIX timers")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::OnceLock;

/// Nanoseconds between two signals.
const PERIOD_NS: i64 = 50_000_000;

/// The signals' timer, of the thread that made it. They end when it is dropped.
#[derive(Debug)]
pub(in crate::backend) struct Tick {
    timer: libc::timer_t,
}

/// Does nothing: that the signal is handled is what ends KVM_RUN with EINTR.
extern "C" fn ignore(_: libc::c_int) {}

impl Tick {
    /// Begins the signals to this thread.
    ///
    /// # Errors
    /// The host is out of timers (RLIMIT_SIGPENDING) or refuses the handler.
    pub(in crate::backend) fn start() -> io::Result<Self> {
        let signal = install()?;
        // SAFETY: plain integers and pointers, for which zero is a value.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: takes nothing, cannot fail.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = null_mut();
        // SAFETY: both pointers are to live values of the right type.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } < 0
        {
            return Err(io::Error::last_os_error());
        }
        let this = Self { timer };
        let period = libc::timespec { tv_sec: 0, tv_nsec: PERIOD_NS };
        let spec = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: the timer was just created, and `spec` lives.
        if unsafe { libc::timer_settime(this.timer, 0, &raw const spec, null_mut()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(this)
    }
}

impl Drop for Tick {
    fn drop(&mut self) {
        // SAFETY: created by `start`, deleted once. A signal still on its way is handled.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// Installs the handler, once a process; returns the signal.
fn install() -> io::Result<libc::c_int> {
    static SIGNAL: OnceLock<libc::c_int> = OnceLock::new();
    if let Some(signal) = SIGNAL.get() {
        return Ok(*signal);
    }
    let signal = libc::SIGRTMIN();
    // SAFETY: as in `start`; an empty mask is a value too.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
    // KVM_RUN returns EINTR all the same; other calls of this thread go on undisturbed.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler does nothing, so it is safe at any time; `action` lives.
    if unsafe { libc::sigaction(signal, &raw const action, null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(*SIGNAL.get_or_init(|| signal))
}
