//! What a kernel's console says, line by line: the failures of MapGPA that it reports, its end, and
//! the words of our own init. Everything that depends on a phrase of Linux is in this file.

use crate::engine::Alarm;
use crate::firmware;

/// What one line means for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said<'a> {
    /// Nothing.
    Nothing,
    /// What the judge is to know.
    Alarm(Alarm),
    /// The kernel panicked; why.
    Panic(&'a str),
    /// A firmware looks for something to boot.
    Bds,
    /// A firmware has reported an exception, and does nothing more.
    Dead,
    /// User space was reached.
    Userspace,
    /// Our init walks all shared memory back by a kexec, and then resets the machine.
    Kexec,
    /// A step of our init failed; which, and how.
    StepFailed(&'a str),
    /// A module is not one of this kernel's, or lacks another; which, and how.
    ModuleUnfit(&'a str),
    /// Our init has done what it was to do.
    Done,
}

/// What begins each line of our init (guest-tests/linux-init).
pub const INIT: &str = "mapgpa-init: ";

/// Failures of conversions, by the words of arch/x86/mm/pat/set_memory.c, arch/x86/coco/tdx/tdx.c
/// and drivers/virt/coco/tdx-guest/tdx-guest.c.
const GAVE_UP: [&str; 5] = [
    "CPA VMM failure to convert memory",
    "Failed to unshare range",
    "Failed to restore encryption mask for Quote buffer",
    "Failed to allocate Quote buffer",
    "Failed to set memory decrypted",
];

/// How the kernel begins the report of an exception that it has no handler for.
const OOPS: [&str; 6] = [
    "BUG: unable to handle",
    "Oops: ",
    "kernel BUG at ",
    "general protection fault",
    "invalid opcode: ",
    "PANIC: double fault",
];

/// How loading a module fails that is of another kernel, lacks another module, or has no signature:
/// ENOEXEC, ENOENT, EKEYREJECTED.
const UNFIT: [&str; 3] = ["failed, error 8", "failed, error 2", "failed, error 129"];

/// What a line of the console means.
#[must_use]
pub fn read(line: &str) -> Said<'_> {
    let text = without_time(line);
    if let Some(said) = text.strip_prefix(INIT) {
        return read_init(said);
    }
    if GAVE_UP.iter().any(|phrase| text.contains(phrase)) {
        return Said::Alarm(Alarm::GaveUp);
    }
    if OOPS.iter().any(|phrase| text.starts_with(phrase)) {
        return Said::Alarm(Alarm::Oops);
    }
    if text.starts_with("WARNING: ") || text.starts_with("DMA: failed to allocate") {
        return Said::Alarm(Alarm::Warning);
    }
    if let Some(why) = text.strip_prefix("Kernel panic - not syncing: ") {
        return Said::Panic(why);
    }
    if text.starts_with("Run ") && text.ends_with(" as init process") {
        return Said::Userspace;
    }
    firmware::console::read(text)
}

fn read_init(said: &str) -> Said<'_> {
    if said.starts_with("userspace reached") {
        Said::Userspace
    } else if said.starts_with("kexec: begins") {
        Said::Kexec
    } else if said.starts_with("load ") && UNFIT.iter().any(|error| said.ends_with(error)) {
        Said::ModuleUnfit(said)
    } else if said.contains(": failed") {
        Said::StepFailed(said)
    } else if said.starts_with("done") {
        Said::Done
    } else {
        Said::Nothing
    }
}

/// A line without the time and the caller that printk may put before it: `[    0.123456][    T1] `.
fn without_time(line: &str) -> &str {
    let mut text = line;
    while let Some((prefix, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        if !prefix.bytes().all(|byte| byte == b' ' || byte == b'.' || byte.is_ascii_alphanumeric())
        {
            break;
        }
        text = rest.trim_start();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_real_kernels() {
        for (line, said) in [
            (
                "[    0.021384] CPA VMM failure to convert memory (addr=00000000d2f6a8c6, \
                 numpages=16384) to shared: -5",
                Said::Alarm(Alarm::GaveUp),
            ),
            (
                "WARNING: CPU: 0 PID: 1 at arch/x86/mm/pat/set_memory.c:2250",
                Said::Alarm(Alarm::Warning),
            ),
            (
                "[    0.5][    T1] DMA: failed to allocate 128 KiB GFP_KERNEL pool",
                Said::Alarm(Alarm::Warning),
            ),
            (
                "[    1.0] BUG: unable to handle page fault for address: ff",
                Said::Alarm(Alarm::Oops),
            ),
            ("[    1.0] watchdog: BUG: soft lockup - CPU#0 stuck", Said::Nothing),
            (
                "[    1.0] Kernel panic - not syncing: VFS: Unable to mount",
                Said::Panic("VFS: Unable to mount"),
            ),
            ("[    1.0] Run /init as init process", Said::Userspace),
            ("mapgpa-init: userspace reached, Linux 6.12.0", Said::Userspace),
            (
                "mapgpa-init: load a.ko: failed, error 8",
                Said::ModuleUnfit("load a.ko: failed, error 8"),
            ),
            (
                "mapgpa-init: load a.ko: failed, error 5",
                Said::StepFailed("load a.ko: failed, error 5"),
            ),
            ("mapgpa-init: load a.ko: ok", Said::Nothing),
            ("mapgpa-init: done", Said::Done),
            ("[drm] not a time", Said::Nothing),
            ("[", Said::Nothing),
        ] {
            assert_eq!(read(line), said, "{line}");
        }
    }
}
