//! One run of a kernel under a policy: its files read and checked, run, and reported.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::boot::{self, BootError, Wanted};
use super::devices::SERIAL_IRQ;
use super::image::{IMAGE_MAX, Kernel, KernelError};
use super::initramfs::{self, Module, ModuleError};
use super::machine::{Machine, Until};
use crate::backend::emulated::{self, EmulatedError, KernelMode, KernelSetup, MachineSetup};
use crate::case::machine::MachineRun;
use crate::case::{HIGH_START, LOW_END, Ran, Recipe, RunError, read_at_most};
use crate::patch::Patched;
use crate::policy::Policy;
use crate::report::{Follow, KernelRow};
use crate::units::show_size;

/// Memory of a kernel unless the user says otherwise, in bytes.
pub const MEMORY: u64 = 512 << 20;
/// The most vCPUs of a kernel: as many as have APIC ids of 8 bits, and no more than sensible.
pub const VCPUS_MAX: usize = 64;
/// The most memory.
const MEMORY_MAX: u64 = 1 << 40;
/// The most bytes of an initrd: what lies below 2 GiB at all.
const INITRD_MAX: u64 = 2 << 30;
/// What is always on the command line: a serial console from the start; no IOAPIC, which a TD would
/// reach through #VE; the kernel where it was loaded; an end rather than a hang; warnings and errors
/// only, as every character is an exit.
const CMDLINE: &str = "console=ttyS0 earlyprintk=ttyS0 noapic nokaslr panic=-1 reboot=k loglevel=";
/// Bytes of a slab of swiotlb, in which `swiotlb=` counts.
const SLAB: u64 = 2048;

/// Why a kernel cannot be run as asked.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// A file cannot be read.
    #[error("{option} {}: cannot be read", path.display())]
    Read {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The kernel is unusable.
    #[error("{option} {}", path.display())]
    Kernel {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: KernelError,
    },
    /// A module is unusable.
    #[error("--module {}", path.display())]
    Module {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ModuleError,
    },
    /// It does not fit into memory, or the command line is not one.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Memory of a size that cannot be.
    #[error("--memory {}: expected at most {}", show_size(*.0), show_size(MEMORY_MAX))]
    Memory(u64),
    /// A swiotlb that cannot be.
    #[error("--swiotlb {}: expected less than half of the memory of {}", show_size(*.0), show_size(*.1))]
    Swiotlb(u64, u64),
    /// Too few or too many vCPUs.
    #[error("--vcpus {0}: expected 1 to {VCPUS_MAX}")]
    Vcpus(usize),
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

impl LinuxError {
    /// The same of a kernel that another option than --kernel named.
    #[must_use]
    pub fn named_by(mut self, name: &'static str) -> Self {
        if let Self::Read { option, .. } | Self::Kernel { option, .. } = &mut self {
            *option = name;
        }
        self
    }
}

/// What the user asks of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// An initrd instead of our own.
    pub initrd: Option<PathBuf>,
    /// What is added to the command line.
    pub cmdline: String,
    /// Size of swiotlb in bytes, which is then used for all I/O.
    pub swiotlb: Option<u64>,
    /// Modules that our init loads and unloads.
    pub modules: Vec<PathBuf>,
    /// Our init walks all shared memory back by a kexec.
    pub kexec: bool,
    /// Bytes of memory.
    pub memory: u64,
    /// When the run ends; nothing: at user space with an initrd of the user's, else when it ends.
    pub until: Option<Until>,
}

/// What a kernel is booted with, read and checked.
#[derive(Debug, Clone)]
pub struct Software {
    /// The kernel, its TDCALLs replaced.
    pub kernel: Kernel,
    /// How many of them.
    pub patched: Patched,
    /// The initrd.
    pub initrd: Vec<u8>,
    /// The command line.
    pub cmdline: String,
    /// When the run ends.
    pub until: Until,
}

impl Software {
    /// Reads the files that `options` name.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn load(options: &Options) -> Result<Self, LinuxError> {
        let path = &options.kernel;
        let kernel_error =
            |source| LinuxError::Kernel { option: "--kernel", path: path.clone(), source };
        let bytes = read("--kernel", path, IMAGE_MAX as u64)?;
        let mut kernel = Kernel::of_file(bytes).map_err(kernel_error)?;
        let patched = kernel.patch();
        if patched.sites == 0 {
            // A program is an ELF file too.
            let is_kernel = kernel.version.is_some();
            let error = if is_kernel { KernelError::NoSites } else { KernelError::NotKernel };
            return Err(kernel_error(error));
        }
        let (initrd, until) = match &options.initrd {
            Some(path) => (read("--initrd", path, INITRD_MAX)?, Until::Userspace),
            None => {
                let modules = options.modules.iter().map(|path| module(path));
                let modules = modules.collect::<Result<Vec<_>, _>>()?;
                (initramfs::archive(&modules, options.kexec), Until::Exit)
            }
        };
        let until = options.until.unwrap_or(until);
        // That user space is reached with an initrd of the user's, the kernel says at level 6.
        let level = if options.initrd.is_some() && until == Until::Userspace { 7 } else { 5 };
        let mut cmdline = format!("{CMDLINE}{level}");
        if let Some(swiotlb) = options.swiotlb {
            cmdline += &format!(" swiotlb={},force", swiotlb / SLAB);
            if swiotlb > options.memory / 2 {
                return Err(LinuxError::Swiotlb(swiotlb, options.memory));
            }
        }
        if !options.cmdline.is_empty() {
            cmdline += " ";
            cmdline += &options.cmdline;
        }
        Ok(Self { kernel, patched, initrd, cmdline, until })
    }

    /// What a report says of it.
    #[must_use]
    pub fn row(&self, run: &MachineRun) -> KernelRow {
        KernelRow {
            version: self.kernel.version.clone(),
            sites: self.patched.sites,
            lookalikes: self.patched.lookalikes,
            vcpus: run.vcpus,
            memory: run.memory,
            cmdline: self.cmdline.clone(),
        }
    }
}

/// A run of a kernel that has been checked as far as that goes without running.
#[derive(Debug, Clone)]
pub struct LinuxCase {
    /// What the user asked for.
    pub options: Options,
    name: String,
    software: Arc<Software>,
    /// What is asked of the run.
    pub run: MachineRun,
}

impl LinuxCase {
    /// Reads the files that `options` name; the public field has defaults, to be set.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn load(options: &Options, policy: Policy) -> Result<Self, LinuxError> {
        Ok(Self {
            options: options.clone(),
            name: options.kernel.display().to_string(),
            software: Arc::new(Software::load(options)?),
            run: MachineRun::new(policy, options.memory),
        })
    }

    /// Its release, if its image says so.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.software.kernel.version.as_deref()
    }

    /// Its name in reports: the kernel's file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks the rest of what can be checked without running.
    ///
    /// # Errors
    /// The case cannot be run as asked.
    pub fn check(&self) -> Result<(), LinuxError> {
        let MachineRun { memory, vcpus, gpaw, .. } = self.run;
        if memory > MEMORY_MAX {
            return Err(LinuxError::Memory(memory));
        }
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(LinuxError::Vcpus(vcpus));
        }
        let high = memory.saturating_sub(LOW_END);
        let top = if high > 0 { HIGH_START + high } else { HIGH_START };
        let least = 64 - (top - 1).leading_zeros() + 1;
        if !(least..=52).contains(&gpaw) {
            return Err(LinuxError::Gpaw { gpaw, least });
        }
        boot::plan(self.wanted())?;
        Ok(())
    }

    fn wanted(&self) -> Wanted<'_> {
        Wanted {
            kernel: &self.software.kernel,
            initrd: &self.software.initrd,
            cmdline: &self.software.cmdline,
            memory: self.run.memory,
            vcpus: u8::try_from(self.run.vcpus).unwrap_or(u8::MAX),
        }
    }

    /// Runs the case, which has been checked, and judges it. The console's lines go to `show` as
    /// they come.
    ///
    /// # Errors
    /// The run could not begin: this host's KVM cannot run kernels, or a host call failed.
    pub fn run(&self, show: Option<Box<dyn Write + Send>>) -> Result<Ran, RunError> {
        self.run_followed(show, None)
    }

    /// As [`LinuxCase::run`], with its calls held against recorded ones.
    ///
    /// # Errors
    /// The run could not begin.
    pub fn run_followed(
        &self,
        show: Option<Box<dyn Write + Send>>,
        follow: Option<Follow>,
    ) -> Result<Ran, RunError> {
        let mode = fit_mode()?;
        let until = self.software.until;
        let recorder = self.run.recorder(
            show,
            until == Until::Conversions,
            Some(Recipe::of_kernel(self)),
            follow,
        )?;
        let (machine, interrupt) =
            Machine::new(until, self.run.memory).map_err(EmulatedError::Interrupt)?;
        let boot = boot::plan(self.wanted()).map_err(RunError::Boot)?;
        let setup = KernelSetup {
            kernel: &self.software.kernel,
            boot: &boot,
            machine: MachineSetup {
                memory: self.run.memory,
                interrupts: &[(SERIAL_IRQ, &interrupt)],
                xsave: mode.xsave,
                timeout: self.run.timeout,
            },
        };
        let started = Instant::now();
        let mut end = emulated::run_kernel(&setup, &machine, self.run.settings(), recorder)?;
        let wall = started.elapsed();
        if let Some(line) = machine.last_line() {
            end.sink.console_line(&line);
        }
        let interrupted = end.interrupted;
        let unfit = machine.unfit_module().map(RunError::Module);
        let row = self.software.row(&self.run);
        let (report, error) = self.run.report(&self.name, Some(row), end, unfit, wall)?;
        Ok(Ran { report, interrupted, error, data: Vec::new() })
    }
}

/// What this host's KVM does with kernel mode, if it is fit for kernels and firmware.
pub(crate) fn fit_mode() -> Result<KernelMode, RunError> {
    let mode = emulated::kernel_mode()?;
    if mode.is_fit() { Ok(mode) } else { Err(RunError::Unfit { mode }) }
}

/// The bytes of a file of at most `most` bytes.
pub(crate) fn read(option: &'static str, path: &Path, most: u64) -> Result<Vec<u8>, LinuxError> {
    let error = |source| LinuxError::Read { option, path: path.to_owned(), source };
    let bytes = read_at_most(path, most).map_err(error)?;
    bytes.ok_or_else(|| error(io::ErrorKind::FileTooLarge.into()))
}

fn module(path: &Path) -> Result<Module, LinuxError> {
    let bytes = read("--module", path, INITRD_MAX)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Module::new(&name, &bytes)
        .map_err(|source| LinuxError::Module { path: path.to_owned(), source })
}
