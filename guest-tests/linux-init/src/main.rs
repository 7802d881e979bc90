//! The init of a Linux guest: says that user space is reached, does what the file /plan says line by
//! line, says how each step went, and resets the machine.
//!
//! Steps: `load FILE` (a module in /modules), `unload NAME`, `kexec` (walks all shared memory back to
//! private, and then resets the machine). Every line it says begins with `mapgpa-init: `, which is
//! what the VMM looks for (vmm/src/linux/console.rs).
#![no_std]
#![no_main]

mod mem;
mod sys;

use core::fmt::Write;

/// The most bytes of /plan.
const PLAN_MAX: usize = 4096;

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        sys::write_all(1, text.as_bytes());
        Ok(())
    }
}

/// Says a line, and waits until it has gone out: the next thing may be a reset.
fn say(line: core::fmt::Arguments<'_>) {
    // Console's write_str cannot fail.
    let _ = writeln!(Console, "mapgpa-init: {line}");
    sys::drain(1);
}

fn step(what: &str, name: &str, result: Result<(), sys::Errno>) {
    match result {
        Ok(()) => say(format_args!("{what}{name}: ok")),
        Err(sys::Errno(number)) => say(format_args!("{what}{name}: failed, error {number}")),
    }
}

fn run(line: &str) {
    let (what, name) = line.split_once(' ').unwrap_or((line, ""));
    match what {
        "load" => step("load ", name, sys::load_module(name)),
        "unload" => step("unload ", name, sys::unload_module(name)),
        "kexec" => {
            say(format_args!("kexec: begins"));
            // It does not come back unless it failed.
            step("kexec", "", sys::kexec_reset());
        }
        _ => say(format_args!("{what}: failed, no such step")),
    }
}

fn main() -> ! {
    // Started by hand on somebody's machine, it must not reset that.
    if !sys::is_first_process() {
        sys::write_all(2, b"linux-init is the first program of a guest, and runs as such only\n");
        sys::exit(2);
    }
    let mut release = [0; 65];
    let release = sys::release(&mut release);
    say(format_args!("userspace reached, Linux {release}"));
    // A kernel may lack some of them; no step needs them.
    for (kind, at) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        let _ = sys::mount(kind, at);
    }
    let mut plan = [0; PLAN_MAX];
    let plan = sys::read_file(c"/plan", &mut plan);
    for line in plan.lines().filter(|line| !line.is_empty()) {
        run(line);
    }
    say(format_args!("done"));
    loop {
        sys::reset();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say(format_args!("failed: {info}"));
    loop {
        sys::reset();
    }
}
