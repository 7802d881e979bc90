//! Backend `emulated`: a plain KVM VM in which the VMM plays the TDX module.
//!
//! The way of a call: the guest's TDCALL was replaced by a port write ([`image`]), which exits to
//! [`vcpu`], which hands the registers to [`crate::tdcall`]; a conversion comes back to [`alias`].
//! Guest tests run at CPL 3 from the first instruction on ([`vm`], [`tables`]).

mod alias;
pub(in crate::backend) mod boot;
mod contents;
mod fault;
mod firmware;
pub mod floor;
pub(in crate::backend) mod image;
mod kernel;
mod kernel_mode;
pub(in crate::backend) mod memory;
mod model;
mod pc;
mod protected;
mod registers;
mod scan;
mod stash;
pub(in crate::backend) mod tables;
pub(in crate::backend) mod tick;
mod userfaultfd;
pub(in crate::backend) mod vcpu;
pub(in crate::backend) mod vm;

use std::thread::Builder;
use std::time::Instant;

pub use firmware::{FirmwareSetup, run_firmware};
pub use image::ImageError;
pub use kernel::{KernelSetup, run_kernel};
pub use kernel_mode::{KernelMode, kernel_mode};
pub use memory::SetupError;
pub use pc::MachineSetup;
pub use vm::VmError;

use crate::backend::{End, Setup};
use crate::engine::{Engine, EventSink, Settings};
use crate::memory::{HostWork, Memory, MemoryError, MemoryModel};
use crate::platform::{Bare, Platform};
use alias::AliasMemory;
use image::Tdcalls;
use memory::Ram;
use model::Model;
use protected::ProtectedMemory;
use userfaultfd::Userfaultfd;
use vcpu::Run;
use vm::{Host, Vm, VmVcpu};

/// The image of the built-in guests.
pub const GUESTS_IMAGE: &[u8] = include_bytes!(env!("MAPGPA_IMAGE_GUESTS"));
/// The image that `mapgpa host` boots to see what this host can do.
pub const CANARY_IMAGE: &[u8] = include_bytes!(env!("MAPGPA_IMAGE_CANARY"));
/// The image of the scripted guest that tests of this backend run.
pub const PROBE_IMAGE: &[u8] = include_bytes!(env!("MAPGPA_IMAGE_PROBE"));

/// A run that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum EmulatedError {
    /// KVM cannot do it.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// There is no memory for the guest.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The guest's image is unusable.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Guest memory could not be converted.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Forbidden accesses can no longer be caught.
    #[error("userfaultfd failed")]
    Fault(#[source] std::io::Error),
    /// There is no timer to end the guest with.
    #[error("timer_create failed")]
    Timer(#[source] std::io::Error),
    /// There is no thread for a vCPU, or to answer its faults.
    #[error("no thread can be started")]
    Thread(#[source] std::io::Error),
    /// There is no eventfd for the serial port's interrupt.
    #[error("eventfd failed")]
    Interrupt(#[source] std::io::Error),
    /// KVM gave up on the guest.
    #[error("KVM cannot run this guest: vCPU {vcpu} exited with {exit}")]
    Exit {
        /// Index of the vCPU.
        vcpu: u32,
        /// The exit and the registers.
        exit: String,
    },
}

impl EmulatedError {
    /// Whether the user's ELF file is at fault, rather than this host.
    #[must_use]
    pub const fn is_bad_image(&self) -> bool {
        matches!(self, Self::Image(_))
    }
}

/// The GPAW that a guest gets unless the user says otherwise: 48 where guests' physical addresses
/// are that wide, else as wide as they are.
///
/// # Errors
/// There is no usable KVM here.
pub fn default_gpaw() -> Result<u32, EmulatedError> {
    Ok(Host::get()?.address_bits().min(48))
}

/// What the host's KVM says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmFacts {
    /// KVM_GET_API_VERSION.
    pub api: i32,
    /// KVM_CAP_VM_TYPES: a bit for each type of VM.
    pub vm_types: u32,
    /// Physical address bits of a guest.
    pub address_bits: u32,
    /// There are VMs of type KVM_X86_SW_PROTECTED_VM, with guest_memfd and memory attributes.
    pub guest_memfd: bool,
}

/// Asks KVM what it is.
///
/// # Errors
/// There is no usable KVM here.
pub fn kvm_facts() -> Result<KvmFacts, EmulatedError> {
    let host = Host::get()?;
    let extension = |cap| host.kvm().check_extension_raw(u64::from(cap));
    Ok(KvmFacts {
        api: host.kvm().get_api_version(),
        vm_types: extension(kvm_bindings::KVM_CAP_VM_TYPES).cast_unsigned(),
        address_bits: host.address_bits(),
        guest_memfd: host.has_protected_vms(),
    })
}

/// Whether guest tests can run here with memory of this model.
///
/// # Errors
/// Why not.
pub fn check_memory_model(model: MemoryModel) -> Result<(), EmulatedError> {
    let host = Host::get()?;
    match model {
        MemoryModel::GuestMemfd if !host.has_protected_vms() => Err(VmError::NoGuestMemfd.into()),
        MemoryModel::Alias | MemoryModel::GuestMemfd => Ok(()),
    }
}

/// Whether forbidden accesses can be caught here.
///
/// # Errors
/// Why not: no userfaultfd, or no privilege to catch what KVM touches.
pub fn can_catch_accesses() -> std::io::Result<()> {
    Userfaultfd::open().map(drop)
}

/// Checks that the ELF file `elf` can be loaded as a guest test.
///
/// # Errors
/// It cannot, or there is no memory to try it in.
pub fn check_image(elf: &[u8]) -> Result<(), ImageError> {
    let ram = Ram::new(mapgpa_abi::layout::IMAGE_END)?;
    image::load(elf, &ram, image::Tdcalls::Replaced).map(drop)
}

/// Runs `setup` with an engine made of `settings` and `sink`, until the guest ends or the time-out.
///
/// # Errors
/// The run could not begin; what fails later is in [`End::error`], so that what was recorded is
/// kept.
pub fn run<S: EventSink + Send>(
    setup: &Setup<'_>,
    settings: Settings,
    sink: S,
) -> Result<End<S, EmulatedError>, EmulatedError> {
    run_with_input(setup, &[], settings, sink)
}

/// As [`run`]; the guest finds `input` behind its parameter page (`abi::layout::INPUT`).
///
/// # Errors
/// As [`run`].
pub fn run_with_input<S: EventSink + Send>(
    setup: &Setup<'_>,
    input: &[u8],
    settings: Settings,
    sink: S,
) -> Result<End<S, EmulatedError>, EmulatedError> {
    let (vcpus, gpaw) = (settings.vcpus, settings.gpaw);
    let ram = Ram::new(setup.memory)?;
    let image = boot::load(setup, input, &ram, Tdcalls::Replaced)?;
    let vm = Vm::new(Host::get()?, &ram, &image, vcpus as u64, gpaw, setup.memory_model)?;
    let vcpu_fds = (0..vcpus as u64).map(|index| vm.vcpu(index)).collect::<Result<Vec<_>, _>>()?;
    let userfaultfd = Userfaultfd::open().ok();
    let watch = userfaultfd.as_ref();
    match vm.protected()? {
        None => run_in(
            setup,
            Engine::new(settings, AliasMemory::new(&ram, watch)?, sink),
            &ram,
            watch,
            vcpu_fds,
        ),
        Some(memory) => run_in(
            setup,
            Engine::new(settings, ProtectedMemory::new(memory, watch)?, sink),
            &ram,
            watch,
            vcpu_fds,
        ),
    }
}

/// Runs `setup`'s guest, loaded into `ram`, with this engine.
fn run_in<M: Model + Send, S: EventSink + Send>(
    setup: &Setup<'_>,
    mut engine: Engine<M, S>,
    ram: &Ram,
    userfaultfd: Option<&Userfaultfd>,
    vcpus: Vec<VmVcpu<'_>>,
) -> Result<End<S, EmulatedError>, EmulatedError> {
    if let Some(pages) = setup.shared {
        engine.preset_shared(pages)?;
    }
    engine.memory().books().work = HostWork::default();
    let run = Run::new(engine, ram, &Bare, vcpus.len(), Instant::now() + setup.timeout);
    drive(run, userfaultfd, vcpus)
}

/// Runs the vCPUs of `run` until the guest ends, or the deadline.
fn drive<M: Model + Send, S: EventSink + Send, P: Platform<M, S>>(
    run: Run<'_, M, S, P>,
    userfaultfd: Option<&Userfaultfd>,
    vcpus: Vec<VmVcpu<'_>>,
) -> Result<End<S, EmulatedError>, EmulatedError> {
    let exits = match userfaultfd {
        None => run_all(&run, vcpus),
        Some(userfaultfd) => {
            let (done, end) = std::io::pipe().map_err(EmulatedError::Fault)?;
            let gpaw = run.engine().settings().gpaw;
            let shared_bit = mapgpa_abi::shared_bit(gpaw);
            std::thread::scope(|scope| {
                let serve = || fault::serve(&run, userfaultfd, &done, shared_bit);
                let thread = Builder::new().name("faults".to_owned()).spawn_scoped(scope, serve);
                if let Err(error) = thread {
                    run.fail(EmulatedError::Thread(error));
                }
                let exits = run_all(&run, vcpus);
                drop(end);
                exits
            })
        }
    };
    let (engine, interrupted, error) = run.into_parts();
    let (mut memory, sink) = engine.end();
    let (work, checks_off) = (memory.books().work, memory.checks_off());
    Ok(End { sink, exits, work, interrupted, checks_off, error })
}

fn run_all<M: Memory + Send, S: EventSink + Send, P: Platform<M, S>>(
    run: &Run<'_, M, S, P>,
    vcpus: Vec<VmVcpu<'_>>,
) -> u64 {
    run_vcpus(run, vcpus, EmulatedError::Thread, |index, vcpu| vcpu::run(run, index, vcpu))
}

/// Runs all vCPUs by `work`, the first on this thread; returns how many exits they made.
pub(in crate::backend) fn run_vcpus<M, S, P, E, V>(
    run: &Run<'_, M, S, P, E>,
    vcpus: Vec<V>,
    no_thread: impl Fn(std::io::Error) -> E,
    work: impl Fn(u32, V) -> u64 + Sync,
) -> u64
where
    M: Memory + Send,
    S: EventSink + Send,
    P: Sync,
    E: Send,
    V: Send,
{
    let mut vcpus = (0..).zip(vcpus);
    let Some((_, first)) = vcpus.next() else { return 0 };
    let work = &work;
    std::thread::scope(|scope| {
        let mut others = Vec::new();
        for (index, vcpu) in vcpus {
            let builder = Builder::new().name(format!("vcpu {index}"));
            match builder.spawn_scoped(scope, move || work(index, vcpu)) {
                Ok(thread) => others.push(thread),
                Err(error) => run.fail(no_thread(error)),
            }
        }
        let exits = work(0, first);
        let joined = others
            .into_iter()
            .map(|other| other.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload)));
        exits + joined.sum::<u64>()
    })
}
