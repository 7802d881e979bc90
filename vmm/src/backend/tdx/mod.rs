//! Backend `tdx`: real TDs, on a host whose KVM makes them.
//!
//! The way of a call: the guest's TDCALL goes to the TDX module and on to KVM, which cuts the request
//! into chunks and exits to [`vcpu`] with each; [`crate::engine`] decides it by the policy, and the
//! memory attributes change ([`memory`]). What KVM tells the guest follows from the answers
//! ([`mapgpa_kvm_model`]). Nothing reads the guest's registers, and accepts are not seen: whether pages
//! were accepted rests on the guest's own report.
//!
//! The same images run as on backend `emulated`, their TDCALLs unpatched, after start-up code of our
//! own ([`startup`]), at CPL 0.

mod host;
mod memory;
mod startup;
mod uapi;
mod vcpu;
mod vm;

use std::time::Instant;

use mapgpa_abi::params::Params;

pub use host::{Facts, Lacking, facts, kernel, lacking};

use crate::backend::emulated::image::{ImageError, Tdcalls};
use crate::backend::emulated::memory::{Ram, SetupError};
use crate::backend::emulated::vcpu::Run;
use crate::backend::emulated::vm::VmError;
use crate::backend::emulated::{boot, run_vcpus};
use crate::backend::guest_memfd::GuestMemfdError;
use crate::backend::{End, Setup};
use crate::engine::{Engine, EventSink, FrontEnd, Settings};
use crate::memory::MemoryError;
use crate::platform::Bare;
use host::Host;
use memory::TdMemory;
use vm::Td;

/// What is not seen of a TD: the TDX module answers accepts, and ends what touches too early; KVM
/// answers malformed requests.
pub const CHECKS_OFF: &[&str] = &["access-before-accept", "accept-missing", "protocol"];

/// A run that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum TdxError {
    /// KVM makes no TDs.
    #[error("this host runs no TDs: {}{}", .0.what, .0.advice.map(|advice| format!("; {advice}")).unwrap_or_default())]
    NoTds(Lacking),
    /// KVM cannot do it.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A TDX sub-command failed.
    #[error("{command} failed{}", hw(*.hw_error))]
    Command {
        /// Which.
        command: &'static str,
        /// The TDX module's status; 0 if it was not asked.
        hw_error: u64,
        /// The host's error.
        source: std::io::Error,
    },
    /// KVM or the TDX module lack what this backend is built on.
    #[error("this host's TDs have no {}", .0)]
    Lacks(&'static str),
    /// More vCPUs than a TD can have here.
    #[error("--vcpus {vcpus}: a TD has at most {most} here, as many as the host has processors")]
    Vcpus {
        /// Asked for.
        vcpus: u64,
        /// The most.
        most: i32,
    },
    /// A GPAW that TDs do not have.
    #[error("--gpaw {0}: a TD's is 48 or 52")]
    Gpaw(u32),
    /// The guest's image is in too many pieces.
    #[error("the guest's memory is in more pieces than the start-up code can accept")]
    Scattered,
    /// There is no memory for the guest.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The guest's image is unusable.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no private memory for the guest.
    #[error(transparent)]
    Private(#[from] GuestMemfdError),
    /// Guest memory could not be converted.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There is no timer to end the guest with.
    #[error("timer_create failed")]
    Timer(#[source] std::io::Error),
    /// There is no thread for a vCPU.
    #[error("no thread can be started")]
    Thread(#[source] std::io::Error),
    /// KVM ended the TD, and not for what the guest did.
    #[error("KVM ended the TD (see the kernel's log)")]
    Dead(#[source] std::io::Error),
    /// KVM does not get on with memory that is there.
    #[error("KVM exits again and again for memory that is there, at GPA {gpa:#x}")]
    Storm {
        /// Where.
        gpa: u64,
    },
    /// KVM gave up on the guest.
    #[error("KVM cannot run this TD: vCPU {vcpu} exited with {exit}")]
    Exit {
        /// Index of the vCPU.
        vcpu: u32,
        /// The exit.
        exit: String,
    },
}

impl TdxError {
    /// Whether the user's ELF file is at fault, rather than this host.
    #[must_use]
    pub const fn is_bad_image(&self) -> bool {
        matches!(self, Self::Image(_))
    }
}

/// The TDX module's status in a message.
fn hw(hw_error: u64) -> String {
    if hw_error == 0 {
        String::new()
    } else {
        format!(", status of the TDX module {hw_error:#018x}")
    }
}

/// A sub-command that failed, as an error.
fn refused(failed: uapi::Failed) -> TdxError {
    let uapi::Failed { command, source, hw_error } = failed;
    TdxError::Command { command: command.name(), hw_error, source }
}

/// The registers of a fatal error: the text that R14 and on hold, and the GPA in R13 if R12 has bit 63
/// (GHCI, TDG.VP.VMCALL\<ReportFatalError\>); data\[n\] is register n in the order of the encoding.
fn printed(data: &[u64]) -> String {
    let register = |n: usize| data.get(n).copied().unwrap_or(0);
    let (rcx, r12) = (register(1), register(12));
    // R14, R15, RBX, RDI, RSI, R8, R9, RDX, those that RCX says are passed.
    let order = [14, 15, 3, 7, 6, 8, 9, 2];
    let passed = order.into_iter().filter(|n| rcx >> n & 1 != 0);
    let bytes: Vec<u8> = passed.flat_map(|n| register(n).to_le_bytes()).collect();
    let text = String::from_utf8_lossy(&bytes);
    let text = crate::printable(text.trim_end_matches('\0'));
    let gpa = if r12 >> 63 == 0 { String::new() } else { format!(" at GPA {:#x}", register(13)) };
    format!("{text:?}{gpa}, code {:#x}, registers {data:x?}", r12 & !(1 << 63))
}

/// Runs `setup` in a TD with an engine made of `settings` and `sink`, until the guest ends or the
/// time-out. The front-end of `settings` says how the host's kernel reads answers ([`kernel`]).
///
/// # Errors
/// The run could not begin; what fails later is in [`End::error`], so that what was recorded is kept.
pub fn run<S: EventSink + Send>(
    setup: &Setup<'_>,
    settings: Settings,
    sink: S,
) -> Result<End<S, TdxError>, TdxError> {
    let gpaw = settings.gpaw;
    if !matches!(gpaw, 48 | 52) {
        return Err(TdxError::Gpaw(gpaw));
    }
    let kernel = match settings.front_end {
        FrontEnd::Kvm(kernel) => kernel,
        FrontEnd::Direct => kernel(),
    };
    let vcpus = u32::try_from(settings.vcpus).unwrap_or(u32::MAX);
    let host = Host::get()?;
    let ram = Ram::new(setup.memory)?;
    // Where one request ends and the next begins cannot be seen from here.
    let params = Params { mark_replies: true, ..setup.params };
    let setup = &Setup { params, ..setup.clone() };
    let image = boot::load(setup, &[], &ram, Tdcalls::Kept)?;
    let td = Td::new(host, &ram, &image, setup, vcpus.into(), gpaw)?;
    let fds = (0..vcpus).map(|index| td.vcpu(index)).collect::<Result<Vec<_>, _>>()?;
    if let Some(first) = fds.first() {
        td.finish(first)?;
    }
    let mut engine = Engine::new(settings, TdMemory::new(&td, &ram), sink);
    engine.accepts_are_unseen();
    if let Some(pages) = setup.shared {
        engine.preset_shared(pages)?;
    }
    engine.memory().work = crate::memory::HostWork::default();
    let run = Run::new(engine, &ram, &Bare, fds.len(), Instant::now() + setup.timeout);
    let shared_bit = mapgpa_abi::shared_bit(gpaw);
    let exits = run_vcpus(&run, fds, TdxError::Thread, |index, fd| {
        vcpu::run(&run, kernel, shared_bit, index, fd)
    });
    let (engine, interrupted, error) = run.into_parts();
    let (memory, sink) = engine.end();
    Ok(End { sink, exits, work: memory.work, interrupted, checks_off: CHECKS_OFF, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fatal_error_is_readable() {
        let mut data = [0; 16];
        data[1] = 0x7c00;
        data[12] = 1 << 63;
        data[13] = 0x20_0000;
        data[14] = u64::from_le_bytes(*b"accept\0\0");
        assert!(printed(&data).starts_with("\"accept\" at GPA 0x200000, code 0x0"));
        assert!(printed(&[]).starts_with("\"\", code 0x0"));
    }

    #[test]
    fn the_module_s_status_is_shown() {
        let source = std::io::Error::from_raw_os_error(libc::EINVAL);
        let failed = uapi::Failed {
            command: uapi::Command::InitVm,
            source,
            hw_error: 0xc000_0100_0000_0001,
        };
        let error = refused(failed);
        assert_eq!(
            crate::one_line(&error),
            "KVM_TDX_INIT_VM failed, status of the TDX module 0xc000010000000001: \
             Invalid argument (os error 22)"
        );
    }
}
