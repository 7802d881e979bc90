//! Why a case cannot be run as asked, or a run could not be done.

use std::path::{Path, PathBuf};

use super::{MEMORY_MAX, MEMORY_MIN, VCPUS_MAX};
use crate::backend::emulated::{self, KernelMode};
use crate::backend::hosted;
use crate::backend::tdx;
use crate::linux::boot::BootError;
use crate::memory::MemoryError;
use crate::units::show_size;

/// A case that cannot be run as asked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CaseError {
    /// The policy can do nothing of what it is about.
    #[error("policy {policy} cannot apply with --direction {direction}: {why}")]
    CannotApply {
        /// The policy.
        policy: String,
        /// The direction.
        direction: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// The guest has no loop that could be bounded.
    #[error("--bound: {guest} has no retry loop to bound (`mapgpa list guests` shows which have)")]
    NoBound {
        /// The guest.
        guest: String,
    },
    /// The guest runs in VMs only.
    #[error("{guest} runs in a VM only: it needs --backend emulated")]
    VmOnly {
        /// The guest.
        guest: String,
    },
    /// The guest knows only some widths of addresses.
    #[error("{guest} runs with a GPAW of 48 or 52 only, and it is {gpaw} here (--gpaw)")]
    GuestGpaw {
        /// The guest.
        guest: String,
        /// The GPAW.
        gpaw: u32,
    },
    /// Memory of a size that cannot be.
    #[error("--memory {}: expected {} to {}", show_size(*.0), show_size(MEMORY_MIN), show_size(MEMORY_MAX))]
    Memory(u64),
    /// The range does not fit.
    #[error(
        "--range {}{}: needs --memory {} or more, but it is {}",
        show_size(*range), if *scattered { " --layout scattered" } else { "" },
        show_size(*needs), show_size(*memory)
    )]
    Range {
        /// Bytes of the range.
        range: u64,
        /// Its pages lie apart.
        scattered: bool,
        /// Bytes of memory that would do.
        needs: u64,
        /// Bytes of memory that there are.
        memory: u64,
    },
    /// No memory is large enough for the range.
    #[error(
        "--range {}{}: does not fit in {}, the most memory that a guest can have",
        show_size(*range), if *scattered { " --layout scattered" } else { "" }, show_size(MEMORY_MAX)
    )]
    Largest {
        /// Bytes of the range.
        range: u64,
        /// Its pages lie apart.
        scattered: bool,
    },
    /// More vCPUs than pages.
    #[error("--vcpus {vcpus}: expected 1 to {most}{}", if *most < VCPUS_MAX { ", one for each page of the range" } else { "" })]
    Vcpus {
        /// Asked for.
        vcpus: usize,
        /// The most.
        most: usize,
    },
    /// Overlapping conversions make sense one way only.
    #[error(
        "--layout overlapping: expected --direction to-shared or round-trip, and 2 vCPUs or more"
    )]
    Overlapping,
    /// A GPAW that cannot be.
    #[error(
        "--gpaw {gpaw}: expected a number of bits from {least} to 52, so that memory lies below the shared bit"
    )]
    Gpaw {
        /// Asked for.
        gpaw: u32,
        /// The least.
        least: u32,
    },
}

/// A run that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The VM failed.
    #[error(transparent)]
    Emulated(#[from] emulated::EmulatedError),
    /// The TD failed.
    #[error(transparent)]
    Tdx(#[from] tdx::TdxError),
    /// Guest memory failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A run without a VM failed.
    #[error(transparent)]
    Hosted(#[from] hosted::HostedError),
    /// This host's KVM cannot run kernels at speed.
    #[error(
        "this host's KVM cannot run a kernel: code at CPL 0 runs at {:.1} million instructions a \
         second{}, a kernel needs {:.0}; `make lab` has a KVM that can, on any machine (docs/lab.md)",
        mode.mips, if mode.sse { "" } else { " and without SSE" }, KernelMode::FIT_MIPS
    )]
    Unfit {
        /// What was found.
        mode: KernelMode,
    },
    /// The guest kernel refuses a module.
    #[error("--module: {0}: it is not one of this kernel's, or needs another one before it")]
    Module(String),
    /// A firmware, or the kernel that it boots, is not as its image says.
    #[error("--firmware: {0}: its code is not laid out as expected")]
    Firmware(String),
    /// A kernel does not fit into memory.
    #[error(transparent)]
    Boot(BootError),
    /// The trace cannot be written.
    #[error("--trace {}: cannot be written", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
}

impl RunError {
    /// Whether the user's ELF file is at fault, rather than this host.
    #[must_use]
    pub const fn is_bad_image(&self) -> bool {
        match self {
            Self::Emulated(error) => error.is_bad_image(),
            Self::Tdx(error) => error.is_bad_image(),
            _ => false,
        }
    }
}

/// An error of writing the trace.
pub(crate) fn trace_error(path: &Path, source: std::io::Error) -> RunError {
    RunError::Trace { path: path.to_owned(), source }
}
