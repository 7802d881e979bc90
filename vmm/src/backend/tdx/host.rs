//! What this host offers for TDs, and where it lacks something, what and how to get it.

use std::path::Path;
use std::sync::OnceLock;

use kvm_bindings::{KVM_CAP_VM_TYPES, KVM_X86_TDX_VM};
use kvm_ioctls::Kvm;
use mapgpa_kvm_model::Kernel;

use super::{TdxError, vm};
use crate::backend::emulated::vm::{VmError, failed};
use crate::backend::guest_memfd;

/// The parameter of kvm_intel that turns TDX on.
const PARAMETER: &str = "/sys/module/kvm_intel/parameters/tdx";

/// The host's KVM, which makes TDs; opened once a process.
#[derive(Debug)]
pub(super) struct Host {
    kvm: Kvm,
}

impl Host {
    /// Opens /dev/kvm, or gives what was opened before.
    pub(super) fn get() -> Result<&'static Self, TdxError> {
        static HOST: OnceLock<Host> = OnceLock::new();
        if let Some(host) = HOST.get() {
            return Ok(host);
        }
        let kvm = Kvm::new().map_err(|error| VmError::Open(error.into()))?;
        let types = kvm.check_extension_raw(u64::from(KVM_CAP_VM_TYPES)).cast_unsigned();
        if types >> KVM_X86_TDX_VM & 1 == 0 {
            return Err(TdxError::NoTds(lacking()));
        }
        if !guest_memfd::is_supported(&kvm, KVM_X86_TDX_VM) {
            return Err(TdxError::Lacks("guest_memfd with memory attributes for TDs"));
        }
        Ok(HOST.get_or_init(|| Self { kvm }))
    }

    /// The host's KVM.
    pub(super) const fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

/// What is missing for TDs, as far as it can be told from outside, and what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lacking {
    /// What is missing.
    pub what: &'static str,
    /// What to do, if there is something.
    pub advice: Option<&'static str>,
}

/// Looks for what is missing (Documentation/arch/x86/tdx.rst; the kernel says the rest in its log).
#[must_use]
pub fn lacking() -> Lacking {
    let platform = crate::host::cpu_has("tdx_host_platform");
    let parameter = std::fs::read_to_string(PARAMETER).ok();
    let on = parameter.as_deref().is_some_and(|value| value.trim() == "Y");
    let lacking = |what, advice| Lacking { what, advice };
    match (platform, &parameter) {
        (true, Some(_)) if on => lacking(
            "the TDX module was not initialised",
            Some("look for \"tdx\" in the kernel's log; update the BIOS, which brings the module"),
        ),
        (true, Some(_)) => lacking(
            "TDX is off in KVM",
            Some("load kvm_intel with tdx=1 (kvm_intel.tdx=1 on the kernel's command line)"),
        ),
        (true, None) => lacking(
            "this kernel's KVM knows no TDX",
            Some("Linux 6.16 or later with CONFIG_INTEL_TDX_HOST and CONFIG_KVM_INTEL_TDX"),
        ),
        (false, Some(_)) if Path::new("/sys/module/kvm_intel").exists() => lacking(
            "this processor has no TDX, or the BIOS has it off",
            Some("enable TDX (with TME-MT and SEAM) in the BIOS, if the processor has it"),
        ),
        _ => lacking("this machine has no TDX", None),
    }
}

/// What a host that makes TDs offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// How its KVM reads a VMM's answers, by its release.
    pub kernel: Kernel,
    /// TD attributes that can be set.
    pub attributes: u64,
    /// Extended features that a TD can have.
    pub xfam: u64,
    /// CPUID leaves that can be configured.
    pub cpuid_leaves: u32,
}

/// Asks the host, with a VM of type TDX that is given up at once.
///
/// # Errors
/// There are no TDs here, or KVM refuses.
pub fn facts() -> Result<Facts, TdxError> {
    let host = Host::get()?;
    let vm = host
        .kvm()
        .create_vm_with_type(u64::from(KVM_X86_TDX_VM))
        .map_err(failed("KVM_CREATE_VM(KVM_X86_TDX_VM)"))?;
    let capabilities = vm::capabilities(&vm)?;
    Ok(Facts {
        kernel: kernel(),
        attributes: capabilities.head(0),
        xfam: capabilities.head(1),
        cpuid_leaves: capabilities.count(),
    })
}

/// How the running kernel reads a VMM's answers. An older release that makes TDs has them by a
/// backport, and is taken for the oldest: what is said to that means the same on all.
#[must_use]
pub fn kernel() -> Kernel {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    kernel_of(&release)
}

fn kernel_of(release: &str) -> Kernel {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => {
            Kernel::of_release(major, minor).unwrap_or(Kernel::V6_16)
        }
        _ => Kernel::V6_16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        for (release, kernel) in [
            ("6.16.0-rc1", Kernel::V6_16),
            ("6.12.0-124.el10.x86_64", Kernel::V6_16),
            ("7.1.4+deb14-amd64", Kernel::V6_16),
            ("7.2.0", Kernel::V7_2),
            ("7.12-generic", Kernel::V7_2),
            ("8.0.1", Kernel::V7_2),
            ("odd", Kernel::V6_16),
            ("", Kernel::V6_16),
        ] {
            assert_eq!(kernel_of(release), kernel, "{release}");
        }
    }
}
