//! A kernel on its machine ([`super::pc`]): in memory, and at its 64-bit entry point at CPL 0.

use std::time::Instant;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use mapgpa_abi::PAGE_SIZE;

use super::alias::AliasMemory;
use super::memory::Ram;
use super::pc::{MachineSetup, Pc};
use super::userfaultfd::Userfaultfd;
use super::vcpu::Run;
use super::vm::{Host, set_flat_segments};
use super::{EmulatedError, drive};
use crate::backend::End;
use crate::engine::{Engine, EventSink, Settings};
use crate::linux::boot::{self, Boot};
use crate::linux::image::Kernel;
use crate::linux::machine::Machine;
use crate::pagemap::Pages;

/// A kernel and the machine that it gets.
#[derive(Debug)]
pub struct KernelSetup<'a> {
    /// The kernel, its TDCALLs replaced.
    pub kernel: &'a Kernel,
    /// What it finds in memory, and where it starts.
    pub boot: &'a Boot<'a>,
    /// What is around it.
    pub machine: MachineSetup<'a>,
}

/// Runs a kernel on `machine` until it ends or the time-out.
///
/// # Errors
/// The run could not begin; what fails later is in [`End::error`].
pub fn run_kernel<S: EventSink + Send>(
    setup: &KernelSetup<'_>,
    machine: &Machine,
    settings: Settings,
    sink: S,
) -> Result<End<S, EmulatedError>, EmulatedError> {
    Host::get()?.check_gpaw(settings.gpaw)?;
    let ram = Ram::with_huge_pages(setup.machine.memory)?;
    load(setup, &ram)?;
    let vcpus = u8::try_from(settings.vcpus).unwrap_or(u8::MAX);
    let vm = Pc::new(setup.machine, vcpus, settings.gpaw, &ram, &[])?;
    let vcpu_fds = vm.vcpus(|sregs| start(sregs, setup.boot))?;
    let userfaultfd = Userfaultfd::open().ok();
    let memory = AliasMemory::new(&ram, userfaultfd.as_ref())?;
    let engine = Engine::new(settings, memory, sink);
    let run = Run::new(engine, &ram, machine, vcpus.into(), Instant::now() + setup.machine.timeout);
    drive(run, userfaultfd.as_ref(), vcpu_fds)
}

/// Puts the kernel and its boot data into memory.
fn load(setup: &KernelSetup<'_>, ram: &Ram) -> Result<(), EmulatedError> {
    for segment in setup.boot.segments {
        let first = segment.address / PAGE_SIZE;
        let end = (segment.address + segment.size).div_ceil(PAGE_SIZE);
        ram.populate(Pages { first, count: end - first });
        let bytes = setup.kernel.elf.get(segment.file.clone()).unwrap_or(&[]);
        ram.write(segment.address, bytes)?;
    }
    for (gpa, bytes) in &setup.boot.writes {
        ram.write(*gpa, bytes)?;
    }
    Ok(())
}

/// The registers at the kernel's 64-bit entry point (Documentation/arch/x86/boot.rst).
fn start(sregs: &mut kvm_sregs, boot: &Boot<'_>) -> kvm_regs {
    set_flat_segments(sregs, boot::CODE, boot::DATA, 0);
    // A busy TSS, as long mode demands; nothing uses it.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0b1011, present: 1, ..kvm_segment::default() };
    let (base, limit) = boot.gdt;
    sregs.gdt = kvm_dtable { base, limit, ..kvm_dtable::default() };
    sregs.idt.limit = 0;
    // PE, MP, ET, NE, WP, PG; PAE; LME, LMA (Intel SDM 3A, 2.5 and 2.2.1).
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    sregs.cr3 = boot.page_tables;
    sregs.cr4 = 1 << 5;
    sregs.efer = 1 << 8 | 1 << 10;
    kvm_regs {
        rip: boot.entry,
        rsi: boot.zero_page,
        rsp: boot.stack,
        rflags: 1 << 1,
        ..kvm_regs::default()
    }
}
