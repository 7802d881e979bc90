//! Arguments of `mapgpa run` about a kernel or a firmware.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::firmware::case::Scenario;
use crate::linux::machine::Until;
use crate::units;

/// Options of a run with a Linux kernel as the guest.
#[derive(Debug, Args)]
#[command(next_help_heading = "A Linux kernel as the guest")]
pub(super) struct LinuxArgs {
    /// The kernel: a bzImage or vmlinux with CONFIG_INTEL_TDX_GUEST, unmodified
    #[arg(long, value_name = "IMAGE")]
    pub(super) kernel: Option<PathBuf>,
    /// An initrd instead of our own, which says what it does and resets the machine
    #[arg(long, value_name = "FILE")]
    pub(super) initrd: Option<PathBuf>,
    /// More for the kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) cmdline: Option<String>,
    /// Size of swiotlb, which the kernel shares when it boots [default: the kernel's own, 64M]
    #[arg(long, value_name = "SIZE", value_parser = units::page_size)]
    pub(super) swiotlb: Option<u64>,
    /// A module that our init loads and unloads again; in order, for several
    #[arg(long, value_name = "FILE.ko", conflicts_with = "initrd")]
    pub(super) module: Vec<PathBuf>,
    /// At the end our init kexecs, for which the kernel walks all shared memory back to private
    #[arg(long, conflicts_with = "initrd")]
    pub(super) kexec: bool,
    /// Ends the run there, if the guest does not end it first [default: exit; userspace with --initrd;
    /// bds with a firmware alone]
    #[arg(long, value_enum)]
    pub(super) until: Option<UntilArg>,
    /// Shows the console as it comes, on stderr with --format json
    #[arg(long)]
    pub(super) console: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum UntilArg {
    /// The firmware looks for something to boot
    Bds,
    /// User space is reached
    Userspace,
    /// The first conversion has ended, well or badly
    Conversions,
    /// Power-off, reset or panic
    Exit,
}

impl LinuxArgs {
    /// Whether an option was given that means nothing without a kernel. (clap's `requires` is silent
    /// where what is required conflicts with what is there.)
    pub(super) const fn any(&self) -> bool {
        self.any_of_kernel() || self.until.is_some() || self.console
    }

    /// The same, without those that mean something with a firmware alone.
    pub(super) const fn any_of_kernel(&self) -> bool {
        self.initrd.is_some()
            || self.cmdline.is_some()
            || self.swiotlb.is_some()
            || !self.module.is_empty()
            || self.kexec
    }
}

/// Options of a run with a TDX firmware as the guest.
#[derive(Debug, Args)]
#[command(next_help_heading = "A TDX firmware as the guest")]
pub(super) struct FirmwareArgs {
    /// The firmware: a TDVF image such as OVMF.inteltdx.fd, unmodified; with --kernel it boots that
    #[arg(long, value_name = "FD")]
    pub(super) firmware: Option<PathBuf>,
    /// What the firmware is made to do beside; repeat it, or put commas, for several
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(super) scenario: Vec<ScenarioArg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ScenarioArg {
    /// It reads a file of 6 MiB in one DMA, so that 2 MiB leaves are converted, and back
    LargeDma,
    /// It boots a small program that exits boot services, and the run ends there
    ExitBootServices,
}

impl From<ScenarioArg> for Scenario {
    fn from(scenario: ScenarioArg) -> Self {
        match scenario {
            ScenarioArg::LargeDma => Self::LargeDma,
            ScenarioArg::ExitBootServices => Self::ExitBootServices,
        }
    }
}

impl From<UntilArg> for Until {
    fn from(until: UntilArg) -> Self {
        match until {
            UntilArg::Bds => Self::Bds,
            UntilArg::Userspace => Self::Userspace,
            UntilArg::Conversions => Self::Conversions,
            UntilArg::Exit => Self::Exit,
        }
    }
}
