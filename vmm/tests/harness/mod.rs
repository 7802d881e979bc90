//! A harness for tests that not every machine can run: what cannot run is reported as ignored, with the
//! reason, never as passed.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Completion, Trial};
use mapgpa::backend::emulated;
use mapgpa::memory::MemoryModel;

/// The environment's variables that name a kernel (vmlinux) and the library of the simulated TDX host.
pub const KERNEL: &str = "MAPGPA_TEST_KERNEL";
pub const HOST: &str = "MAPGPA_TEST_HOST";

/// What a test needs of the machine.
#[derive(Debug, Clone, Copy)]
pub enum Needs {
    Nothing,
    /// A KVM that runs guest tests.
    Kvm,
    /// That, and that forbidden accesses can be caught.
    Userfaultfd,
    /// A KVM with VMs of type KVM_X86_SW_PROTECTED_VM, and userfaultfd.
    GuestMemfd,
    /// A KVM, and the right to take userfaultfd away (unshare and setpriv, as root).
    TakeAway,
    /// A KVM that runs kernels, and a kernel.
    Kernel,
    /// That, and the simulated TDX host.
    SimulatedHost,
    /// A browser.
    Chromium,
}

/// The browser's name, if there is one.
pub fn chromium() -> Option<&'static str> {
    ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|name| {
        Command::new(name).arg("--version").output().is_ok_and(|run| run.status.success())
    })
}

impl Needs {
    /// Why this machine lacks it, if it does.
    fn missing(self) -> Option<String> {
        let kvm = || emulated::default_gpaw().err().map(|error| mapgpa::one_line(&error));
        // In the lab there is a KVM for kernels; who runs tests there names the file.
        let kernels = |variable: &str| match (std::env::var_os(variable), emulated::kernel_mode()) {
            (None, _) => {
                Some(format!("{variable} is not set (guest-tests/lab/fault-tests sets it)"))
            }
            (_, Err(error)) => Some(mapgpa::one_line(&error)),
            (_, Ok(mode)) if mode.is_fit() => None,
            (_, Ok(_)) => Some("this KVM interprets kernel-mode code".to_owned()),
        };
        match self {
            Self::Nothing => None,
            Self::Kvm => kvm(),
            Self::Userfaultfd => kvm().or_else(|| {
                emulated::can_catch_accesses().err().map(|error| format!("no userfaultfd: {error}"))
            }),
            Self::GuestMemfd => Self::Userfaultfd.missing().or_else(|| {
                let model = MemoryModel::GuestMemfd;
                emulated::check_memory_model(model).err().map(|error| mapgpa::one_line(&error))
            }),
            Self::TakeAway => kvm().or_else(|| {
                let may = Command::new("unshare").args(["-m", "setpriv", "--version"]).output();
                (!may.is_ok_and(|run| run.status.success()))
                    .then(|| "needs root, unshare and setpriv".to_owned())
            }),
            Self::Kernel => kernels(KERNEL),
            Self::SimulatedHost => kernels(HOST),
            Self::Chromium if chromium().is_some() => None,
            Self::Chromium => Some("no Chromium (apt-get install chromium)".to_owned()),
        }
    }

    /// Whether the environment demands that the machine has it.
    fn required(self) -> bool {
        let variable = match self {
            // Not everybody who has KVM is root.
            Self::Nothing | Self::TakeAway => return false,
            Self::Kvm | Self::Userfaultfd => "MAPGPA_REQUIRE_KVM",
            Self::Kernel | Self::SimulatedHost => "MAPGPA_REQUIRE_LAB",
            Self::GuestMemfd => "MAPGPA_REQUIRE_GUEST_MEMFD",
            Self::Chromium => "MAPGPA_REQUIRE_CHROMIUM",
        };
        std::env::var_os(variable).is_some_and(|value| value == "1")
    }
}

/// Runs the tests of a binary (`harness = false`). One that cannot run here is reported as ignored,
/// with the reason; with MAPGPA_REQUIRE_KVM=1 (or _GUEST_MEMFD, _LAB, _CHROMIUM) it fails.
pub fn harness(tests: Vec<(&'static str, Needs, fn())>) -> ExitCode {
    let trials = tests.into_iter().map(|(name, needs, test)| {
        Trial::ignorable_test(name, move || match needs.missing() {
            None => {
                test();
                Ok(Completion::Completed)
            }
            Some(reason) if needs.required() => Err(format!("required, but {reason}").into()),
            Some(reason) => Ok(Completion::ignored_with(reason)),
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
