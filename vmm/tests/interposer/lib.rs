//! Host calls that fail: a library that tests put before the C library (LD_PRELOAD). It counts the calls
//! of each function that it knows, fails one of them as the environment says, and reports at the end.
//!
//! - `MAPGPA_FAULT=NAME:NTH:ERRNO[:TIMES]`: the NTH call of NAME, from 1, fails with ERRNO, and so do the
//!   calls after it, TIMES in all.
//! - `MAPGPA_FAULT_REPORT=FILE`: at the end, a line `NAME CALLS` for each function, and lines `fds`,
//!   `threads`, `mappings` for what the process has then.
//!
//! Built by the test with rustc alone, so there is no crate to take declarations from.
#![allow(unsafe_code, reason = "an interposer is made of it")]

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering::Relaxed};

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn __errno_location() -> *mut c_int;
    fn atexit(hook: extern "C" fn()) -> c_int;
}

/// RTLD_NEXT: the library after this one.
const NEXT: *mut c_void = -1_isize as *mut c_void;

/// The process is at its end; what the report needs is not failed.
static REPORTING: AtomicBool = AtomicBool::new(false);

/// What is to fail.
struct Fault {
    name: String,
    first: u64,
    errno: c_int,
    times: u64,
}

fn fault() -> Option<&'static Fault> {
    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
    FAULT
        .get_or_init(|| {
            // SAFETY: the hook lives as long as the process.
            unsafe { atexit(report) };
            let text = std::env::var("MAPGPA_FAULT").ok()?;
            let mut parts = text.split(':');
            let name = parts.next()?.to_owned();
            let first = parts.next()?.parse().ok()?;
            let errno = parts.next()?.parse().ok()?;
            let times = parts.next().map_or(Some(1), |times| times.parse().ok())?;
            Some(Fault { name, first, errno, times })
        })
        .as_ref()
}

/// A function of the C library, as it is called, and how often.
struct Function {
    name: &'static CStr,
    calls: AtomicU64,
    next: AtomicPtr<c_void>,
}

impl Function {
    const fn new(name: &'static CStr) -> Self {
        let next = AtomicPtr::new(std::ptr::null_mut());
        Self { name, calls: AtomicU64::new(0), next }
    }

    /// Counts a call; the error that it is to fail with, if it is.
    fn fails(&self) -> Option<c_int> {
        let fault = fault().filter(|_| !REPORTING.load(Relaxed));
        let call = self.calls.fetch_add(1, Relaxed) + 1;
        let fault = fault?;
        let here = self.name.to_bytes() == fault.name.as_bytes()
            && (fault.first..fault.first.saturating_add(fault.times)).contains(&call);
        here.then_some(fault.errno)
    }

    /// The function itself.
    fn next(&self) -> *mut c_void {
        let known = self.next.load(Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: a name that ends with 0.
        let next = unsafe { dlsym(NEXT, self.name.as_ptr()) };
        self.next.store(next, Relaxed);
        next
    }
}

/// Interposes functions: `error` is what a failed call returns, which sets errno unless the function
/// returns the error itself (`errno`).
macro_rules! interpose {
    ($($name:ident($($arg:ident: $type:ty),*) -> $result:ty, $error:expr;)*) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($arg: $type),*) -> $result {
                let function = &functions::$name;
                if let Some(errno) = function.fails() {
                    let error: fn(c_int) -> $result = $error;
                    return error(errno);
                }
                // SAFETY: the function of this name in the C library, which has this type.
                unsafe {
                    let next: unsafe extern "C" fn($($type),*) -> $result =
                        std::mem::transmute(function.next());
                    next($($arg),*)
                }
            }
        )*

        #[allow(non_upper_case_globals, reason = "the names are the functions'")]
        mod functions {
            use super::Function;

            $(pub(super) static $name: Function = Function::new(
                match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name with a 0 in it"),
                });)*
        }

        static FUNCTIONS: &[&Function] = &[$(&functions::$name),*];
    };
}

fn minus(errno: c_int) -> c_int {
    // SAFETY: errno of this thread.
    unsafe { *__errno_location() = errno };
    -1
}

fn minus_size(errno: c_int) -> isize {
    minus(errno) as isize
}

fn map_failed(errno: c_int) -> *mut c_void {
    minus(errno);
    -1_isize as *mut c_void
}

interpose! {
    open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int, minus;
    read(fd: c_int, to: *mut c_void, size: usize) -> isize, minus_size;
    write(fd: c_int, from: *const c_void, size: usize) -> isize, minus_size;
    ftruncate64(fd: c_int, size: i64) -> c_int, minus;
    rename(from: *const c_char, to: *const c_char) -> c_int, minus;
    mmap(at: *mut c_void, size: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64)
        -> *mut c_void, map_failed;
    madvise(at: *mut c_void, size: usize, advice: c_int) -> c_int, minus;
    mincore(at: *mut c_void, size: usize, to: *mut u8) -> c_int, minus;
    eventfd(value: c_uint, flags: c_int) -> c_int, minus;
    poll(fds: *mut c_void, count: u64, timeout: c_int) -> c_int, minus;
    timer_create(clock: c_int, event: *mut c_void, timer: *mut c_void) -> c_int, minus;
    timer_settime(timer: *mut c_void, flags: c_int, new: *const c_void, old: *mut c_void)
        -> c_int, minus;
    sigaction(signal: c_int, new: *const c_void, old: *mut c_void) -> c_int, minus;
    pthread_create(thread: *mut c_void, attr: *const c_void, start: *mut c_void, arg: *mut c_void)
        -> c_int, |errno| errno;
}

/// Requests that are counted by themselves, too (linux/kvm.h).
const KVM_RUN: u64 = 0xae80;
const KVM_CREATE_VM: u64 = 0xae01;
static RUN: Function = Function::new(c"KVM_RUN");
static CREATE_VM: Function = Function::new(c"KVM_CREATE_VM");
static IOCTL: Function = Function::new(c"ioctl");

#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: u64, arg: usize) -> c_int {
    let by_request = match request {
        KVM_RUN => RUN.fails(),
        KVM_CREATE_VM => CREATE_VM.fails(),
        _ => None,
    };
    if let Some(errno) = IOCTL.fails().or(by_request) {
        return minus(errno);
    }
    // SAFETY: the function of this name in the C library, which takes one argument of any kind.
    unsafe {
        let next: unsafe extern "C" fn(c_int, u64, usize) -> c_int =
            std::mem::transmute(IOCTL.next());
        next(fd, request, arg)
    }
}

/// SYS_userfaultfd of x86-64.
const USERFAULTFD: c_long = 323;
static SYSCALL: Function = Function::new(c"syscall");

/// Of what goes through `syscall`, userfaultfd(2) is the one that may fail: the others are how the Rust
/// library waits, which has no failures to speak of.
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    number: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    if number == USERFAULTFD
        && let Some(errno) = SYSCALL.fails()
    {
        return minus(errno).into();
    }
    type Syscall =
        unsafe extern "C" fn(c_long, usize, usize, usize, usize, usize, usize) -> c_long;
    // SAFETY: the function of this name in the C library, which takes six arguments at most.
    unsafe {
        let next: Syscall = std::mem::transmute(SYSCALL.next());
        next(number, a, b, c, d, e, f)
    }
}

/// Threads of this process, without those that KVM adds for a VM, which end some time after it.
fn threads() -> usize {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 };
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    tasks.flatten().filter_map(|task| name(task).ok()).filter(|name| !name.starts_with("kvm-")).count()
}

/// Mappings that a VM has: of vCPUs, and of memory large enough to be a guest's. The C library keeps
/// stacks of threads that have ended, which are smaller.
fn mappings() -> usize {
    const LARGE: u64 = 8 << 20;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let is_guests = |line: &&str| {
        let mut words = line.split_whitespace();
        let bounds = words.next().and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).unwrap_or_default();
        let size = bounds.map_or(0, |(start, end)| number(end) - number(start));
        let writable = words.next().is_some_and(|mode| mode.starts_with("rw"));
        let name = words.nth(3).unwrap_or_default();
        name.contains("kvm") || name.contains("memfd") || name.is_empty() && writable && size >= LARGE
    };
    maps.lines().filter(is_guests).count()
}

/// Writes the report.
extern "C" fn report() {
    let Some(path) = std::env::var_os("MAPGPA_FAULT_REPORT") else { return };
    REPORTING.store(true, Relaxed);
    // A thread that has done its work may have some steps to its end.
    for _ in 0..200 {
        if threads() <= 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let entries = |path: &str| std::fs::read_dir(path).map_or(0, Iterator::count);
    // The directory that is being read is one more.
    let fds = entries("/proc/self/fd") - 1;
    let mut text = format!("fds {fds}\nthreads {}\nmappings {}\n", threads(), mappings());
    for function in FUNCTIONS.iter().chain([&&SYSCALL, &&IOCTL, &&RUN, &&CREATE_VM]) {
        let name = function.name.to_string_lossy();
        text += &format!("{name} {}\n", function.calls.load(Relaxed));
    }
    let _ = std::fs::write(path, text);
}
