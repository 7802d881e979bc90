//! A TD: made, configured, filled with what the guest starts from, finalised, and given up again.
//!
//! The order is that of Documentation/virt/kvm/x86/intel-tdx.rst, with KVM_SET_CPUID2 before
//! KVM_TDX_INIT_VCPU: KVM switches the vCPU to x2APIC there, for which its CPUID must have it
//! (`tdx_vcpu_init()` in arch/x86/kvm/vmx/tdx.c). It also decides by CPUID which GPAs are legal.
#![allow(unsafe_code, reason = "memslots")]

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_MAX_VCPUS, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X86_TDX_VM, kvm_cpuid_entry2, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use mapgpa_abi::layout::IMAGE_END;
use mapgpa_abi::{Alias, PAGE_SIZE, shared_bit};
use rangemap::RangeSet;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::host::Host;
use super::startup::{self, Job};
use super::uapi::{self, Capabilities, Command, Cpuid, InitVm, MemRegion};
use super::{TdxError, refused};
use crate::backend::Setup;
use crate::backend::emulated::image::Image;
use crate::backend::emulated::memory::{self, HOST_PAGE, Ram, SetupError};
use crate::backend::emulated::tables::{self, Level, Tables};
use crate::backend::emulated::vm::{VmVcpu, failed};
use crate::backend::guest_memfd::{self, GuestMemfd, Slot};
use crate::pagemap::Pages;

/// Routes of the split irqchip, as many as QEMU has.
const IRQ_ROUTES: u64 = 24;
/// State components that a guest test may use: x87, SSE, AVX. Others ask for permissions (AMX), or
/// have no use.
const XFAM: u64 = 0b111;
/// How often a sub-command is tried again that says EAGAIN or EINTR, as in QEMU.
const TRIES: u32 = 10_000;
/// CPUID leaf with the GPAW in EAX\[23:16\], as KVM has it (`setup_tdparams_eptp_controls()`).
const LEAF_ADDRESS_BITS: u32 = 0x8000_0008;
/// CPUID leaf 1, ECX: x2APIC.
const X2APIC: u32 = 1 << 21;

/// Memory of the VMM's own in the TD: its contents, and what is behind it.
#[derive(Debug)]
struct Own {
    gpa: u64,
    contents: MmapRegion,
    _shared: MmapRegion,
    _file: GuestMemfd,
}

/// A TD. RAM is the caller's, and must outlive it.
#[derive(Debug)]
pub(super) struct Td<'a> {
    // Dropped in this order: the VM before the memory behind it.
    fd: VmFd,
    ram: &'a Ram,
    files: Vec<GuestMemfd>,
    own: Vec<Own>,
}

impl<'a> Td<'a> {
    /// Makes the TD that will run `image` on `vcpus` vCPUs, without vCPUs or contents yet.
    pub(super) fn new(
        host: &Host,
        ram: &'a Ram,
        image: &Image,
        setup: &Setup<'_>,
        vcpus: u64,
        gpaw: u32,
    ) -> Result<Self, TdxError> {
        let fd = host
            .kvm()
            .create_vm_with_type(u64::from(KVM_X86_TDX_VM))
            .map_err(failed("KVM_CREATE_VM(KVM_X86_TDX_VM)"))?;
        let mut this = Self { fd, ram, files: Vec::new(), own: Vec::new() };
        let most = this.fd.check_extension_raw(u64::from(KVM_CAP_MAX_VCPUS));
        if vcpus > u64::from(most.cast_unsigned()) {
            return Err(TdxError::Vcpus { vcpus, most });
        }
        this.enable(KVM_CAP_EXIT_HYPERCALL, 1 << uapi::HC_MAP_GPA_RANGE, "KVM_CAP_EXIT_HYPERCALL")?;
        this.enable(KVM_CAP_SPLIT_IRQCHIP, IRQ_ROUTES, "KVM_CAP_SPLIT_IRQCHIP")?;
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        this.enable(KVM_CAP_X2APIC_API, x2apic.into(), "KVM_CAP_X2APIC_API")?;
        this.init(host, gpaw)?;
        this.add_memory(image, setup, vcpus, gpaw)?;
        Ok(this)
    }

    /// The VM.
    pub(super) const fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The guest_memfd of each region of RAM.
    pub(super) fn files(&self) -> &[GuestMemfd] {
        &self.files
    }

    fn enable(&self, cap: u32, arg: u64, name: &'static str) -> Result<(), TdxError> {
        let enable = kvm_enable_cap { cap, args: [arg, 0, 0, 0], ..kvm_enable_cap::default() };
        Ok(self.fd.enable_cap(&enable).map_err(failed(name))?)
    }

    /// Configures the TD by what KVM and the TDX module let be configured.
    fn init(&self, host: &Host, gpaw: u32) -> Result<(), TdxError> {
        let capabilities = capabilities(&self.fd)?;
        if capabilities.head(0) & uapi::SEPT_VE_DISABLE == 0 {
            return Err(TdxError::Lacks("the TD attribute SEPT_VE_DISABLE"));
        }
        let supported = host
            .kvm()
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let entries = configuration(&capabilities.entries(), supported.as_slice(), gpaw);
        let mut init = InitVm::of(&entries);
        init.set_head(0, uapi::SEPT_VE_DISABLE);
        init.set_head(1, capabilities.head(1) & XFAM);
        again(|| uapi::with_cpuid(&self.fd, Command::InitVm, &mut init))
    }

    /// Puts RAM, tables and start-up code into memslots, private but for what is shared from the start.
    fn add_memory(
        &mut self,
        image: &Image,
        setup: &Setup<'_>,
        vcpus: u64,
        gpaw: u32,
    ) -> Result<(), TdxError> {
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let (shared, size) = region.host(Alias::Shared, region.pages);
            let (shared, size) = (shared as u64, size as u64);
            let file = GuestMemfd::new(&self.fd, size)?;
            let slot = Slot { slot, gpa: region.pages.gpa(), size, shared, offset: 0 };
            // SAFETY: guest memory, which outlives this VM: RAM is borrowed for as long.
            unsafe { file.add_slot(&self.fd, &slot) }?;
            self.files.push(file);
            for piece in without(region.pages, setup.shared) {
                let size = piece.count * PAGE_SIZE;
                guest_memfd::set_private(&self.fd, piece.gpa(), size, true)?;
            }
        }
        let level = Level::Kernel { nmi: startup::nmi(), startup: startup::BLOCK };
        let regions = self.ram.regions().iter().map(|region| region.pages);
        let tables = Tables::new(vcpus, regions, shared_bit(gpaw), image.vectors, level);
        let accept = self.accept(setup)?;
        let job = Job {
            gdt: tables::gdt(),
            idt: (tables::idt(), tables.idt_limit),
            cr3: tables.cr3,
            entry: image.entry,
            accept: &accept,
        };
        let startup = job.bytes().ok_or(TdxError::Scattered)?;
        self.add_own(tables::base(), &tables.bytes)?;
        self.add_own(startup::PAGES.gpa(), &startup)
    }

    /// Puts `bytes`, whole pages, into a private memslot of their own at `gpa`.
    fn add_own(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), TdxError> {
        let size = bytes.len() as u64;
        let (contents, shared) = (memory::map(size)?, memory::map(size)?);
        contents
            .as_volatile_slice()
            .write_slice(bytes, 0)
            .map_err(|_| SetupError::Outside { gpa, size: bytes.len() })?;
        let file = GuestMemfd::new(&self.fd, size)?;
        let number = u32::try_from(self.files.len() + self.own.len()).unwrap_or(u32::MAX);
        let address = shared.as_ptr().addr() as u64;
        let slot = Slot { slot: number, gpa, size, shared: address, offset: 0 };
        // SAFETY: guest memory, which this TD owns and drops after the VM.
        unsafe { file.add_slot(&self.fd, &slot) }?;
        self.own.push(Own { gpa, contents, _shared: shared, _file: file });
        Ok(guest_memfd::set_private(&self.fd, gpa, size, true)?)
    }

    /// Makes the vCPU of this index, one of the TD.
    pub(super) fn vcpu(&self, index: u32) -> Result<VmVcpu<'_>, TdxError> {
        let vcpu = self.fd.create_vcpu(index.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        let cpuid = vcpu_cpuid(&td_cpuid(&vcpu)?, index)?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        uapi::plain(&vcpu, Command::InitVcpu, startup::JOB).map_err(refused)?;
        Ok(VmVcpu::new(vcpu, self))
    }

    /// Adds the contents that the guest starts from, by way of `vcpu`, and makes the TD ready to run.
    pub(super) fn finish(&self, vcpu: &VcpuFd) -> Result<(), TdxError> {
        for own in &self.own {
            let pages = own.contents.size() as u64 / PAGE_SIZE;
            add(vcpu, own.contents.as_ptr().addr() as u64, own.gpa, pages)?;
        }
        for run in self.contents()?.iter() {
            let run = Pages { first: run.start, count: run.end - run.start };
            for region in self.ram.regions() {
                if let Some(part) = region.clip(run) {
                    let (source, _) = region.host(Alias::Private, part);
                    add(vcpu, source as u64, part.gpa(), part.count)?;
                }
            }
        }
        again(|| uapi::plain(&self.fd, Command::FinalizeVm, 0))
    }

    /// The pages that have contents: what was loaded lies below the end of images, and a page of zeros
    /// need not be added to be one.
    fn contents(&self) -> Result<RangeSet<u64>, TdxError> {
        let mut found = RangeSet::new();
        let mut bytes = vec![0; HOST_PAGE];
        for region in self.ram.regions() {
            let end = region.pages.end().min(IMAGE_END / PAGE_SIZE);
            for page in region.pages.first..end {
                let part = Pages { first: page, count: 1 };
                let size = bytes.len();
                let outside = |_| SetupError::Outside { gpa: part.gpa(), size };
                region.read(Alias::Private, part, &mut bytes).map_err(outside)?;
                if bytes.iter().any(|byte| *byte != 0) {
                    found.insert(page..page + 1);
                }
            }
        }
        Ok(found)
    }

    /// What the start-up code is to accept: RAM that has no contents and is not shared.
    fn accept(&self, setup: &Setup<'_>) -> Result<Vec<Pages>, TdxError> {
        let mut rest = RangeSet::new();
        for region in self.ram.regions() {
            rest.insert(region.pages.first..region.pages.end());
        }
        for run in self.contents()? {
            rest.remove(run);
        }
        if let Some(shared) = setup.shared {
            rest.remove(shared.first..shared.end());
        }
        Ok(rest.iter().map(|run| Pages { first: run.start, count: run.end - run.start }).collect())
    }
}

impl Drop for Td<'_> {
    fn drop(&mut self) {
        // Memory is given back faster then. Older kernels do not know it, and need not.
        let _ = uapi::plain(&self.fd, Command::TerminateVm, 0);
    }
}

/// `all` without `hole`.
fn without(all: Pages, hole: Option<Pages>) -> Vec<Pages> {
    let mut set = RangeSet::new();
    set.insert(all.first..all.end());
    if let Some(hole) = hole {
        set.remove(hole.first..hole.end());
    }
    set.iter().map(|run| Pages { first: run.start, count: run.end - run.start }).collect()
}

/// Tries a sub-command until it says neither EAGAIN, EINTR nor EBUSY (the TDX module is short of
/// entropy, a signal came, or the module is busy with another TD).
fn again(mut call: impl FnMut() -> Result<(), uapi::Failed>) -> Result<(), TdxError> {
    for _ in 0..TRIES {
        match call() {
            Err(error)
                if matches!(
                    error.source.raw_os_error(),
                    Some(libc::EAGAIN | libc::EINTR | libc::EBUSY)
                ) => {}
            result => return result.map_err(refused),
        }
    }
    call().map_err(refused)
}

/// Adds `pages` pages with the contents at `source`.
fn add(vcpu: &VcpuFd, source: u64, gpa: u64, pages: u64) -> Result<(), TdxError> {
    let mut region = MemRegion { source, gpa, pages };
    again(|| uapi::add_memory(vcpu, &mut region))
}

/// What can be configured.
pub(super) fn capabilities(vm: &VmFd) -> Result<Capabilities, TdxError> {
    // As many as the first TDX modules had; KVM says E2BIG and no more.
    let mut entries = 6;
    loop {
        let mut list = Capabilities::new(entries);
        match uapi::with_cpuid(vm, Command::Capabilities, &mut list) {
            Ok(()) => return Ok(list),
            Err(error) if error.source.raw_os_error() == Some(libc::E2BIG) && entries < 256 => {
                entries *= 2;
            }
            Err(error) => return Err(refused(error)),
        }
    }
}

/// CPUID as the TDX module virtualises it.
fn td_cpuid(vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, TdxError> {
    let mut list = Cpuid::new(u32::try_from(KVM_MAX_CPUID_ENTRIES).unwrap_or(u32::MAX));
    match uapi::with_cpuid(vcpu, Command::GetCpuid, &mut list) {
        // KVM says in the list how many there are.
        Err(error) if error.source.raw_os_error() == Some(libc::E2BIG) => {
            list = Cpuid::new(list.count());
            uapi::with_cpuid(vcpu, Command::GetCpuid, &mut list).map_err(refused)?;
        }
        result => result.map_err(refused)?,
    }
    Ok(list.entries())
}

/// The entries that a TD is configured with: what KVM supports, as far as it can be configured, and the
/// GPAW. KVM's flags tell entries that differ in their index only; the list of what can be configured
/// has none.
fn configuration(
    configurable: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
    gpaw: u32,
) -> Vec<kvm_cpuid_entry2> {
    let configured = |has: &kvm_cpuid_entry2| {
        let same =
            |mask: &&kvm_cpuid_entry2| (mask.function, mask.index) == (has.function, has.index);
        let mask = configurable.iter().find(same)?;
        Some(kvm_cpuid_entry2 {
            eax: mask.eax & has.eax,
            ebx: mask.ebx & has.ebx,
            ecx: mask.ecx & has.ecx,
            edx: mask.edx & has.edx,
            ..*has
        })
    };
    let mut entries: Vec<_> = supported.iter().filter_map(configured).collect();
    for entry in entries.iter_mut().filter(|entry| entry.function == LEAF_ADDRESS_BITS) {
        entry.eax = entry.eax & !0x00ff_0000 | gpaw << 16;
    }
    entries
}

/// CPUID as KVM is told of it for a vCPU: the TD's, with x2APIC and the vCPU's own APIC id.
fn vcpu_cpuid(td: &[kvm_cpuid_entry2], index: u32) -> Result<CpuId, TdxError> {
    let mut entries = td.to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ecx |= X2APIC;
                entry.ebx = entry.ebx & 0x00ff_ffff | index << 24;
            }
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    CpuId::from_entries(&entries).map_err(|_| TdxError::Lacks("room for its CPUID entries"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ecx, ..kvm_cpuid_entry2::default() }
    }

    #[test]
    fn a_td_is_configured_within_what_can_be_configured() {
        let flags = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        let sub = |index, eax, flags| kvm_cpuid_entry2 { index, flags, ..entry(7, eax, 0) };
        let configurable = [
            entry(1, 0, 0xf0),
            sub(0, 1, 0),
            sub(1, 2, 0),
            entry(9, 1, 1),
            entry(LEAF_ADDRESS_BITS, 0x00ff_0000, 0),
        ];
        let supported = [
            entry(1, 7, 0x3c),
            entry(2, 1, 1),
            sub(0, 3, flags),
            sub(1, 3, flags),
            entry(LEAF_ADDRESS_BITS, 0x3034, 0),
        ];
        let entries = configuration(&configurable, &supported, 52);
        let expected = [
            entry(1, 0, 0x30),
            sub(0, 1, flags),
            sub(1, 2, flags),
            entry(LEAF_ADDRESS_BITS, 52 << 16, 0),
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_vcpu_has_its_id_and_x2apic() {
        let cpuid = vcpu_cpuid(&[entry(1, 0, 0), entry(0xb, 0, 0)], 3).expect("few entries");
        let entries = cpuid.as_slice();
        assert_eq!((entries[0].ebx >> 24, entries[0].ecx), (3, X2APIC));
        assert_eq!(entries[1].edx, 3);
    }

    #[test]
    fn what_is_shared_from_the_start_is_left_out() {
        let pages = |first, count| Pages { first, count };
        assert_eq!(without(pages(0, 10), None), [pages(0, 10)]);
        assert_eq!(without(pages(0, 10), Some(pages(4, 2))), [pages(0, 4), pages(6, 4)]);
        assert_eq!(without(pages(0, 10), Some(pages(20, 2))), [pages(0, 10)]);
    }
}
