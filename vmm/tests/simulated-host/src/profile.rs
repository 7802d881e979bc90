//! What the environment asks of the host: a kernel, faults of its own, and mistakes put into what the
//! program says (docs/testing.md).

use std::sync::OnceLock;

use mapgpa_kvm_model::Kernel;

/// The kernel to be: `6.16` or `7.2` (the default).
const KERNEL: &str = "MAPGPA_SIM_KERNEL";
/// What is wrong with the host: one of [`FAULTS`].
const HOST: &str = "MAPGPA_SIM_HOST";
/// What is wrong with the program: one of [`MISTAKES`], put in on the way from the program.
const BREAK: &str = "MAPGPA_SIM_BREAK";

/// Hosts that refuse or break.
pub(crate) const FAULTS: [&str; 26] = [
    "no-access",
    "no-tdx",
    "no-guest-memfd",
    "no-attributes",
    "no-exit-hypercall",
    "no-split-irqchip",
    "create-vm",
    "capabilities",
    "no-key-id",
    "init-vm",
    "init-vm-entropy",
    "create-vcpu",
    "one-vcpu",
    "set-cpuid2",
    "init-vcpu",
    "guest-memfd",
    "memory-region",
    "set-attributes",
    "init-mem-region",
    "init-mem-region-busy",
    "init-mem-region-interrupted",
    "finalize",
    "finalize-busy",
    "memory-faults",
    "run",
    "internal-error",
];

/// Mistakes of a VMM's.
pub(crate) const MISTAKES: [&str; 43] = [
    "capabilities.flags",
    "capabilities.hw-error",
    "capabilities.id",
    "capabilities.nent",
    "capabilities.pointer",
    "init-vm.flags",
    "init-vm.hw-error",
    "init-vm.id",
    "init-vm.skip",
    "init-vm.twice",
    "init-vm.reserved",
    "init-vm.padding",
    "init-vm.attributes",
    "init-vm.xfam",
    "init-vm.gpaw",
    "init-vm.cpuid-entry",
    "init-vm.cpuid-bit",
    "init-vm.nent",
    "init-vm.pointer",
    "init-vcpu.flags",
    "init-vcpu.hw-error",
    "init-vcpu.id",
    "init-vcpu.skip",
    "init-vcpu.twice",
    "init-mem-region.flags",
    "init-mem-region.hw-error",
    "init-mem-region.id",
    "init-mem-region.skip",
    "init-mem-region.twice",
    "init-mem-region.gpa",
    "init-mem-region.source",
    "init-mem-region.pages",
    "init-mem-region.shared",
    "init-mem-region.pointer",
    "finalize.hw-error",
    "finalize.id",
    "finalize.skip",
    "finalize.twice",
    "set-cpuid2.skip",
    "set-attributes.skip",
    "set-attributes.flags",
    "split-irqchip.skip",
    "exit-hypercall.skip",
];

/// What the environment asks.
#[derive(Debug)]
pub(crate) struct Profile {
    /// The kernel.
    pub(crate) kernel: Kernel,
    fault: Option<&'static str>,
    mistake: Option<&'static str>,
}

/// What the environment asks; the process ends if it is nonsense.
pub(crate) fn get() -> &'static Profile {
    static PROFILE: OnceLock<Profile> = OnceLock::new();
    PROFILE.get_or_init(|| {
        read().unwrap_or_else(|why| {
            eprintln!("simulated TDX host: {why}");
            std::process::exit(99)
        })
    })
}

fn read() -> Result<Profile, String> {
    let kernel = match std::env::var(KERNEL).as_deref() {
        Ok("6.16") => Kernel::V6_16,
        Ok("7.2" | "") | Err(_) => Kernel::V7_2,
        Ok(other) => return Err(format!("{KERNEL}={other}: takes 6.16 or 7.2")),
    };
    Ok(Profile { kernel, fault: one_of(HOST, &FAULTS)?, mistake: one_of(BREAK, &MISTAKES)? })
}

fn one_of(variable: &str, names: &[&'static str]) -> Result<Option<&'static str>, String> {
    let Ok(value) = std::env::var(variable) else { return Ok(None) };
    if value.is_empty() {
        return Ok(None);
    }
    match names.iter().find(|name| **name == value) {
        Some(name) => Ok(Some(name)),
        None => Err(format!("{variable}={value}: takes one of {}", names.join(", "))),
    }
}

impl Profile {
    /// Whether the host has this fault.
    pub(crate) fn host_is(&self, fault: &str) -> bool {
        debug_assert!(FAULTS.contains(&fault));
        self.fault == Some(fault)
    }

    /// Whether the program makes this mistake.
    pub(crate) fn makes(&self, call: &str, what: &str) -> bool {
        self.mistake.and_then(|mistake| mistake.split_once('.')) == Some((call, what))
    }
}
