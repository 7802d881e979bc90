//! One run of a firmware under a policy, with or without a kernel that it boots: files read and
//! checked, run, and reported.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use mapgpa_abi::shared_bit;

use super::fw_cfg::{FwCfg, key};
use super::image::{Firmware, FirmwareError};
use super::kernel::Booted;
use super::machine::{Machine, Wanted};
use super::tdvf::IMAGE_MAX as FIRMWARE_MAX;
use super::{acpi, program};
use crate::backend::emulated::{self, EmulatedError, FirmwareSetup, MachineSetup};
use crate::case::machine::MachineRun;
use crate::case::{Ran, RunError};
use crate::linux;
use crate::linux::case::{LinuxError, Software};
use crate::linux::devices::SERIAL_IRQ;
use crate::linux::image::IMAGE_MAX;
use crate::linux::machine::{Machine as Pc, Until};
use crate::policy::Policy;
use crate::report::FirmwareRow;
use crate::units::show_size;

/// Memory of a firmware unless the user says otherwise, in bytes.
pub const MEMORY: u64 = 512 << 20;
/// The least and the most: OVMF needs the one, and has devices of a Q35 beyond the other.
const MEMORY_MIN: u64 = 128 << 20;
const MEMORY_MAX: u64 = 2 << 30;
/// Bytes of the file that the scenario large-dma has the firmware read: three blocks of 2 MiB, so
/// that at least two of them are whole, however it lies.
const LARGE: usize = 6 << 20;

/// What a firmware is made to do beside booting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// It reads a large file in one DMA: its buffer is converted, and back, in 4K pages and 2M leaves.
    LargeDma,
    /// It boots a program that exits boot services.
    ExitBootServices,
}

impl Scenario {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LargeDma => "large-dma",
            Self::ExitBootServices => "exit-boot-services",
        }
    }
}

/// Why a firmware cannot be run as asked.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareCaseError {
    /// A file cannot be read, or the kernel cannot be run.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// The firmware is unusable.
    #[error("--firmware {}", path.display())]
    Firmware {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FirmwareError,
    },
    /// Memory of a size that cannot be.
    #[error(
        "--memory {}: expected {} to {} with --firmware",
        show_size(*.0), show_size(MEMORY_MIN), show_size(MEMORY_MAX)
    )]
    Memory(u64),
    /// More vCPUs than one.
    #[error("--vcpus {0}: expected 1 with --firmware")]
    Vcpus(usize),
    /// The end of the run that was asked for never comes.
    #[error("--until {0}: with --firmware alone the run ends at bds; more needs --kernel")]
    Until(&'static str),
    /// A GPAW that cannot be.
    #[error(
        "--gpaw {0}: expected 34 to 52 with --firmware, so that 4 GiB lie below the shared bit"
    )]
    Gpaw(u32),
}

/// What the user asks of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The firmware's file.
    pub firmware: PathBuf,
    /// The kernel that it boots.
    pub kernel: Option<linux::case::Options>,
    /// What it is made to do beside.
    pub scenarios: Vec<Scenario>,
    /// When the run ends, if there is no kernel.
    pub until: Option<Until>,
    /// Bytes of memory.
    pub memory: u64,
}

/// A run of a firmware that has been checked as far as that goes without running.
#[derive(Debug)]
pub struct FirmwareCase {
    name: String,
    firmware: Firmware,
    booted: Option<(Software, Booted)>,
    scenarios: Vec<Scenario>,
    /// What is asked of the run.
    pub run: MachineRun,
}

impl FirmwareCase {
    /// Reads the files that `options` name; the public field has defaults, to be set.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn load(options: &Options, policy: Policy) -> Result<Self, FirmwareCaseError> {
        let path = &options.firmware;
        let bytes = linux::case::read("--firmware", path, FIRMWARE_MAX as u64)?;
        let error = |source| FirmwareCaseError::Firmware { path: path.clone(), source };
        let mut firmware = Firmware::of_file(bytes).map_err(error)?;
        let booted = options.kernel.as_ref().map(load_kernel).transpose()?;
        let scenarios = options.scenarios.clone();
        let exits = scenarios.contains(&Scenario::ExitBootServices);
        if booted.is_some() || exits {
            firmware.blank_variables().map_err(error)?;
        }
        match options.until {
            Some(Until::Userspace) if booted.is_none() => {
                return Err(FirmwareCaseError::Until("userspace"));
            }
            Some(Until::Exit) if booted.is_none() => return Err(FirmwareCaseError::Until("exit")),
            _ => {}
        }
        Ok(Self {
            name: path.display().to_string(),
            firmware,
            booted,
            scenarios,
            run: MachineRun::new(policy, options.memory),
        })
    }

    /// Checks the rest of what can be checked without running.
    ///
    /// # Errors
    /// The case cannot be run as asked.
    pub fn check(&self) -> Result<(), FirmwareCaseError> {
        let MachineRun { memory, vcpus, gpaw, .. } = self.run;
        if !(MEMORY_MIN..=MEMORY_MAX).contains(&memory) {
            return Err(FirmwareCaseError::Memory(memory));
        }
        if vcpus != 1 {
            return Err(FirmwareCaseError::Vcpus(vcpus));
        }
        if !(34..=52).contains(&gpaw) {
            return Err(FirmwareCaseError::Gpaw(gpaw));
        }
        Ok(())
    }

    /// What the firmware finds by fw_cfg.
    fn fw_cfg(&self) -> FwCfg {
        let mut device = FwCfg::default();
        let large = self.scenarios.contains(&Scenario::LargeDma).then_some(LARGE);
        acpi::add(&mut device, large);
        let size =
            |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes().to_vec();
        let mut kernel = |image: Vec<u8>, initrd: &[u8], cmdline: &str| {
            let cmdline = [cmdline.as_bytes(), &[0]].concat();
            device.add(key::KERNEL_SIZE, size(&image));
            device.add(key::KERNEL, image);
            device.add(key::INITRD_SIZE, size(initrd));
            device.add(key::INITRD, initrd.to_vec());
            device.add(key::CMDLINE_SIZE, size(&cmdline));
            device.add(key::CMDLINE, cmdline);
            // All of the image is passed as the kernel, none as its real-mode part.
            device.add(key::SETUP_SIZE, vec![0; 4]);
        };
        if let Some((software, booted)) = &self.booted {
            kernel(booted.image.clone(), &software.initrd, &software.cmdline);
        } else if self.exits() {
            kernel(program::image(), &[], "");
        }
        device
    }

    /// Whether it boots the program that exits boot services.
    fn exits(&self) -> bool {
        self.booted.is_none() && self.scenarios.contains(&Scenario::ExitBootServices)
    }

    /// Runs the case, which has been checked, and judges it. The console's lines go to `show` as
    /// they come.
    ///
    /// # Errors
    /// The run could not begin: this host's KVM cannot run firmware, or a host call failed.
    pub fn run(&self, show: Option<Box<dyn Write + Send>>) -> Result<Ran, RunError> {
        let mode = linux::case::fit_mode()?;
        let until = match &self.booted {
            Some((software, _)) => software.until,
            None if self.exits() => Until::Exit,
            None => Until::Bds,
        };
        let recorder = self.run.recorder(show, until == Until::Conversions, None, None)?;
        let (pc, interrupt) = Pc::new(until, self.run.memory).map_err(EmulatedError::Interrupt)?;
        let wanted = Wanted {
            fw_cfg: self.fw_cfg(),
            packed_sites: self.firmware.packed.sites,
            kernel: self.booted.as_ref().map(|(_, booted)| booted.inner.clone()),
            until_exit: self.exits(),
            shared_bit: shared_bit(self.run.gpaw),
        };
        let machine = Machine::new(pc, wanted);
        let setup = FirmwareSetup {
            firmware: &self.firmware,
            machine: MachineSetup {
                memory: self.run.memory,
                interrupts: &[(SERIAL_IRQ, &interrupt)],
                xsave: mode.xsave,
                timeout: self.run.timeout,
            },
        };
        let started = Instant::now();
        let mut end = emulated::run_firmware(&setup, &machine, self.run.settings(), recorder)?;
        let wall = started.elapsed();
        if let Some(line) = machine.pc().last_line() {
            end.sink.console_line(&super::console::plain(&line));
        }
        let interrupted = end.interrupted;
        let unfit = machine.pc().unfit_module().map(RunError::Module);
        let unfit = machine.unfit().map(RunError::Firmware).or(unfit);
        let row = self.booted.as_ref().map(|(software, _)| software.row(&self.run));
        let (mut report, error) = self.run.report(&self.name, row, end, unfit, wall)?;
        report.firmware = Some(FirmwareRow {
            size: self.firmware.image.len(),
            sec_sites: self.firmware.sec.sites,
            packed_sites: self.firmware.packed.sites,
            memory_sites: machine.unpacked().sites,
            hooks: self.firmware.hooks,
            memory: self.run.memory,
            scenarios: self.scenarios.iter().map(|scenario| scenario.name().into()).collect(),
        });
        Ok(Ran { report, interrupted, error, data: Vec::new() })
    }
}

/// Reads a kernel and what it is booted with.
fn load_kernel(options: &linux::case::Options) -> Result<(Software, Booted), FirmwareCaseError> {
    let software = Software::load(options)?;
    let path = &options.kernel;
    let image = linux::case::read("--kernel", path, IMAGE_MAX as u64)?;
    let booted = Booted::new(image, &software.kernel, software.patched.sites)
        .map_err(|source| LinuxError::Kernel { option: "--kernel", path: path.clone(), source })?;
    Ok((software, booted))
}
