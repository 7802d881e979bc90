//! Every mistake that MAPGPA_SIM_BREAK can put in and every fault that MAPGPA_SIM_HOST can give a host,
//! and where each is noticed.

use libc::{E2BIG, EACCES, EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENOMEM, ENOSPC, ENOTTY};

use super::guest::{END, Op};
use super::td::Td;

/// Where a mistake is noticed.
#[derive(Debug, Clone, Copy)]
pub enum Seen {
    /// This call fails with this error.
    By(&'static str, i32),
    /// The TD is made, and the guest does not come to its end.
    Guest,
}

/// A mistake.
#[derive(Debug, Clone, Copy)]
pub struct Mistake {
    pub name: &'static str,
    pub seen: Seen,
}

const fn by(name: &'static str, call: &'static str, errno: i32) -> Mistake {
    Mistake { name, seen: Seen::By(call, errno) }
}

pub const MISTAKES: &[Mistake] = &[
    by("capabilities.flags", "capabilities", EINVAL),
    by("capabilities.hw-error", "capabilities", EINVAL),
    by("capabilities.id", "capabilities", EINVAL),
    by("capabilities.nent", "capabilities", E2BIG),
    by("capabilities.pointer", "capabilities", EFAULT),
    by("init-vm.flags", "init-vm", EINVAL),
    by("init-vm.hw-error", "init-vm", EINVAL),
    by("init-vm.id", "init-vm", EINVAL),
    by("init-vm.skip", "create-vcpu", EIO),
    by("init-vm.twice", "init-vm", EINVAL),
    by("init-vm.reserved", "init-vm", EINVAL),
    by("init-vm.padding", "init-vm", EINVAL),
    by("init-vm.attributes", "init-vm", EINVAL),
    by("init-vm.xfam", "init-vm", EINVAL),
    by("init-vm.gpaw", "init-vm", EINVAL),
    by("init-vm.cpuid-entry", "init-vm", EINVAL),
    by("init-vm.cpuid-bit", "init-vm", EINVAL),
    by("init-vm.nent", "init-vm", E2BIG),
    by("init-vm.pointer", "init-vm", EFAULT),
    by("init-vcpu.flags", "init-vcpu", EINVAL),
    by("init-vcpu.hw-error", "init-vcpu", EINVAL),
    by("init-vcpu.id", "init-vcpu", EINVAL),
    by("init-vcpu.skip", "add", EINVAL),
    by("init-vcpu.twice", "init-vcpu", EINVAL),
    by("init-mem-region.flags", "add", EINVAL),
    by("init-mem-region.hw-error", "add", EINVAL),
    by("init-mem-region.id", "add", EINVAL),
    // Nothing is there to execute: the first fetch is of a page that was never accepted.
    by("init-mem-region.skip", "run", EIO),
    // All of it is added, the rest is 0 pages.
    by("init-mem-region.twice", "add", EINVAL),
    by("init-mem-region.gpa", "add", EINVAL),
    by("init-mem-region.source", "add", EINVAL),
    by("init-mem-region.pages", "add", EINVAL),
    by("init-mem-region.shared", "add", EINVAL),
    by("init-mem-region.pointer", "add", EFAULT),
    by("finalize.hw-error", "finalize", EINVAL),
    by("finalize.id", "finalize", EINVAL),
    by("finalize.skip", "run", EINVAL),
    by("finalize.twice", "finalize", EINVAL),
    by("set-cpuid2.skip", "init-vcpu", EINVAL),
    by("set-attributes.skip", "add", EINVAL),
    by("set-attributes.flags", "attributes", EINVAL),
    by("split-irqchip.skip", "create-vcpu", EINVAL),
    Mistake { name: "exit-hypercall.skip", seen: Seen::Guest },
];

/// A fault, the call that meets it, and its error; 0 where the call is repeated until it succeeds.
pub const FAULTS: &[(&str, &str, i32)] = &[
    ("no-access", "create", EACCES),
    ("no-tdx", "create", EINVAL),
    ("no-guest-memfd", "capability", 234),
    ("no-attributes", "attributes", ENOTTY),
    ("no-exit-hypercall", "enable", EINVAL),
    ("no-split-irqchip", "enable", EINVAL),
    ("create-vm", "create", ENOMEM),
    ("capabilities", "capabilities", EIO),
    ("no-key-id", "init-vm", ENOSPC),
    ("init-vm", "init-vm", EIO),
    ("init-vm-entropy", "init-vm", EAGAIN),
    ("create-vcpu", "create-vcpu", ENOMEM),
    ("one-vcpu", "most vCPUs", 1),
    ("set-cpuid2", "cpuid", EINVAL),
    ("init-vcpu", "init-vcpu", EIO),
    ("guest-memfd", "slots", ENOMEM),
    ("memory-region", "slots", EINVAL),
    ("set-attributes", "attributes", ENOMEM),
    ("init-mem-region", "add", EIO),
    ("init-mem-region-busy", "add", EBUSY),
    ("init-mem-region-interrupted", "none", 0),
    ("finalize", "finalize", EIO),
    ("finalize-busy", "finalize", EBUSY),
    ("memory-faults", "run", EFAULT),
    ("run", "run", EIO),
    ("internal-error", "exit", 17),
];

/// The lists of the library are these lists, so that none is left untested.
pub fn complete() {
    let names = |variable| {
        let output = super::run("can make a TD", &[(variable, "nonsense")]);
        let text = String::from_utf8(output.stderr).expect("text");
        let list = text.trim_end().rsplit_once("takes one of ").expect("a list").1.to_owned();
        list.split(", ").map(str::to_owned).collect::<Vec<_>>()
    };
    let mistakes: Vec<_> = MISTAKES.iter().map(|mistake| mistake.name.to_owned()).collect();
    assert_eq!(names("MAPGPA_SIM_BREAK"), mistakes);
    let faults: Vec<_> = FAULTS.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(names("MAPGPA_SIM_HOST"), faults);
}

/// Makes a TD and runs it; the call that fails and its error.
fn first_failure() -> Option<(&'static str, i32)> {
    let mut td = match Td::build(&[]) {
        Ok(td) => td,
        Err(failed) => return Some(failed),
    };
    let result = td.run().err().map(|errno| ("run", errno));
    td.close();
    result
}

/// The mistake of this process is refused where the table says.
pub fn refused() {
    let name = std::env::var("MAPGPA_SIM_BREAK").expect("a mistake");
    let mistake = MISTAKES.iter().find(|mistake| mistake.name == name).expect("one of the table");
    let Seen::By(call, errno) = mistake.seen else { panic!("{mistake:?}") };
    let failed = first_failure();
    // What is added twice is the same region where KVM did not advance it.
    assert!(failed == Some((call, errno)) || failed == Some((call, EEXIST)), "{failed:?}");
}

/// The guest's MapGPA is refused.
pub fn shows_in_the_guest() {
    let mut td = Td::build(&[Op::map_gpa(1 << 47 | 0x10_0000, 0x1000)]).expect("a TD");
    assert_eq!(td.run(), Ok(0));
    assert_eq!(td.reports, [0, 0, 3, 0x8000_0000, 0x10_0000, 0x8000, END], "SUBFUNC_UNSUPPORTED");
    td.close();
}

/// The fault of this process's host shows where the table says.
pub fn fault_is_seen() {
    let name = std::env::var("MAPGPA_SIM_HOST").expect("a fault");
    let (_, call, value) = FAULTS.iter().find(|(fault, ..)| *fault == name).expect("of the table");
    match *call {
        "capability" => {
            let td = Td::create().expect("a TD");
            assert_eq!(td.extension(value.cast_unsigned()), Ok(0));
        }
        "most vCPUs" => {
            let td = Td::create().expect("a TD");
            assert_eq!(td.extension(kvm_bindings::KVM_CAP_MAX_VCPUS), Ok(*value));
        }
        "exit" => {
            let mut td = Td::build(&[]).expect("a TD");
            assert_eq!(td.run(), Ok(value.cast_unsigned()));
        }
        "none" => assert!(Td::build(&[]).is_ok()),
        _ => assert_eq!(first_failure(), Some((*call, *value))),
    }
}
