//! What happened, for tests: a line for each refusal, and at the end what the program has not given
//! back. It goes to the file that MAPGPA_SIM_LOG names, or nowhere.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{LazyLock, Mutex, OnceLock};

use crate::raw::{self, OwnFd};
use crate::td::lock;

/// The file to append to.
const LOG: &str = "MAPGPA_SIM_LOG";

/// What a program has of the host and is to give back.
#[derive(Debug)]
pub(crate) struct Held {
    name: &'static str,
    now: AtomicI64,
    ever: AtomicI64,
}

impl Held {
    const fn new(name: &'static str) -> Self {
        Self { name, now: AtomicI64::new(0), ever: AtomicI64::new(0) }
    }

    /// One more.
    pub(crate) fn take(&self) {
        self.now.fetch_add(1, Ordering::Relaxed);
        self.ever.fetch_add(1, Ordering::Relaxed);
    }

    /// One less.
    pub(crate) fn give(&self) {
        self.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Descriptors of TDs.
pub(crate) static VMS: Held = Held::new("VM");
/// Descriptors of their vCPUs.
pub(crate) static VCPUS: Held = Held::new("vCPU");
/// Descriptors of guest_memfd files.
pub(crate) static MEMFDS: Held = Held::new("guest_memfd");
/// Mappings of `struct kvm_run`.
pub(crate) static RUNS: Held = Held::new("kvm_run mapping");
/// Other mappings made through mmap(2) of the C library, since /dev/kvm was first opened.
pub(crate) static MAPPINGS: Held = Held::new("mapping");

/// Which mappings are held, by their first address.
static MAPPED: LazyLock<Mutex<HashMap<u64, &'static Held>>> = LazyLock::new(Mutex::default);

/// The program made a mapping.
pub(crate) fn mapped(at: u64, held: &'static Held) {
    held.take();
    lock(&MAPPED).insert(at, held);
}

/// The program gave one back.
pub(crate) fn unmapped(at: u64) {
    if let Some(held) = lock(&MAPPED).remove(&at) {
        held.give();
    }
}

fn file() -> Option<&'static OwnFd> {
    static FILE: OnceLock<Option<OwnFd>> = OnceLock::new();
    let open = || {
        let path = std::ffi::CString::new(std::env::var(LOG).ok()?).ok()?;
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
        raw::openat(libc::AT_FDCWD, path.as_ptr(), flags, 0o644).ok().map(OwnFd)
    };
    FILE.get_or_init(open).as_ref()
}

/// Writes a line.
pub(crate) fn line(text: &str) {
    if let Some(file) = file() {
        // Tests look for lines, and miss what could not be written.
        let _ = raw::write(file.0, format!("{text}\n").as_bytes());
    }
}

/// Says why a call is refused.
pub(crate) fn refuse<T>(errno: i32, why: &str) -> raw::Sys<T> {
    line(&format!("refused: {why}: {}", std::io::Error::from_raw_os_error(errno)));
    Err(errno)
}

/// Says what the program still holds, when it ends.
pub(crate) fn at_exit() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        // SAFETY: a function without arguments that does not unwind: it formats and writes.
        let _ = unsafe { libc::atexit(held) };
    });
}

extern "C" fn held() {
    let mut text = String::from("held at exit:");
    for held in [&VMS, &VCPUS, &MEMFDS, &RUNS, &MAPPINGS] {
        let (now, ever) = (held.now.load(Ordering::Relaxed), held.ever.load(Ordering::Relaxed));
        text.push_str(&format!(" {} {now} of {ever},", held.name));
    }
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    text.push_str(&format!(" thread {}", threads.saturating_sub(1)));
    line(&text);
}
