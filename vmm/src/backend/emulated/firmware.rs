//! A firmware on its machine ([`super::pc`]): its image below 4 GiB, memory that it has to accept, and
//! the vCPU at the reset vector as the TDX module starts it.

use std::time::Instant;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use mapgpa_abi::PAGE_SIZE;
use vm_memory::{Bytes, VolatileMemory};

use super::alias::AliasMemory;
use super::memory::{self, Ram, SetupError};
use super::pc::{MachineSetup, Pc};
use super::userfaultfd::Userfaultfd;
use super::vcpu::Run;
use super::vm::Host;
use super::{EmulatedError, drive};
use crate::backend::End;
use crate::engine::{Engine, EventSink, Phase, Settings};
use crate::firmware::hob;
use crate::firmware::image::Firmware;
use crate::firmware::machine::Machine;
use crate::firmware::tdvf::{Kind, Section, image_start};
use crate::pagemap::Pages;

/// The reset vector.
const RESET_VECTOR: u64 = 0xffff_fff0;
/// Leaf 1 of CPUID, EAX, which the TDX module passes in RDX.
const SIGNATURE: u64 = 0x0008_06f8;

/// A firmware and the machine that it gets.
#[derive(Debug)]
pub struct FirmwareSetup<'a> {
    /// The firmware, rewritten.
    pub firmware: &'a Firmware,
    /// What is around it; its memory lies below the hole.
    pub machine: MachineSetup<'a>,
}

/// Runs a firmware on `machine` until it ends or the time-out.
///
/// # Errors
/// The run could not begin; what fails later is in [`End::error`].
pub fn run_firmware<S: EventSink + Send>(
    setup: &FirmwareSetup<'_>,
    machine: &Machine,
    settings: Settings,
    sink: S,
) -> Result<End<S, EmulatedError>, EmulatedError> {
    let gpaw = settings.gpaw;
    Host::get()?.check_gpaw(gpaw)?;
    let Firmware { image, sections, .. } = setup.firmware;
    let size = setup.machine.memory;
    let ram = Ram::with_huge_pages(size)?;
    let hob = sections.iter().find(|section| section.kind == Kind::TdHob);
    let hob = hob.map_or(0, |section| section.gpa);
    ram.write(hob, &hob::list(sections, size))?;

    let flash = memory::map(image.len() as u64)?;
    let start = image_start(image.len());
    flash
        .as_volatile_slice()
        .write_slice(image, 0)
        .map_err(|_| SetupError::Outside { gpa: start, size: image.len() })?;
    let vm = Pc::new(setup.machine, 1, gpaw, &ram, &[(start, &flash)])?;
    let vcpus = vm.vcpus(|sregs| at_reset(sregs, gpaw, hob))?;

    let userfaultfd = Userfaultfd::open().ok();
    let memory = AliasMemory::new(&ram, userfaultfd.as_ref())?;
    let mut engine = Engine::new(settings, memory, sink);
    for pages in unaccepted(sections, size) {
        engine.preset_pending(pages)?;
    }
    engine.phase(Phase::Sec, Pages::of_bytes(0, size));
    let run = Run::new(engine, &ram, machine, 1, Instant::now() + setup.machine.timeout);
    drive(run, userfaultfd.as_ref(), vcpus)
}

/// The memory that no section says to be accepted from the start.
fn unaccepted(sections: &[Section], memory: u64) -> Vec<Pages> {
    let mut accepted: Vec<_> = sections.iter().filter(|section| section.is_memory()).collect();
    accepted.sort_by_key(|section| section.gpa);
    let mut pages = Vec::new();
    let mut at = 0;
    for section in accepted {
        pages.push(Pages::of_bytes(at, section.gpa - at));
        at = section.gpa + section.size;
    }
    pages.push(Pages::of_bytes(at, memory - memory % PAGE_SIZE - at));
    pages.retain(|run| run.count > 0);
    pages
}

/// The registers of a TD's vCPU at its start: flat 32-bit segments, protected mode without paging,
/// what will be long mode enabled (TDX module base specification, "Initial State of Guest GPRs", "... of
/// CRs", "... of Segment Registers").
fn at_reset(sregs: &mut kvm_sregs, gpaw: u32, hob: u64) -> kvm_regs {
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 8,
        type_: 0b1011,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 16, type_: 0b0011, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0xffff, type_: 0b1011, present: 1, ..kvm_segment::default() };
    let table = kvm_dtable { base: 0, limit: 0xffff, ..kvm_dtable::default() };
    (sregs.gdt, sregs.idt) = (table, table);
    // PE, ET, NE; PAE, MCE, OSFXSR, OSXMMEXCPT; SCE, LME, NXE.
    sregs.cr0 = 1 | 1 << 4 | 1 << 5;
    sregs.cr3 = 0;
    sregs.cr4 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10;
    sregs.efer = 1 | 1 << 8 | 1 << 11;
    kvm_regs {
        rip: RESET_VECTOR,
        rflags: 1 << 1,
        rbx: gpaw.into(),
        rcx: hob,
        rdx: SIGNATURE,
        r8: hob,
        ..kvm_regs::default()
    }
}
