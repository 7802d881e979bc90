//! The VM: what this host's KVM offers, a VM with its memory, and vCPUs ready to run at CPL 3.
#![allow(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION")]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::os::raw::c_int;
use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_X86_SW_PROTECTED_VM, kvm_dtable, kvm_regs, kvm_segment,
    kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuFd, VmFd};
use mapgpa_abi::layout::stack_top;
use mapgpa_abi::{Alias, PAGE_SIZE, params};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::image::Image;
use super::memory::{self, Ram, Region, SetupError};
use super::protected::Protected;
use super::tables::{self, Level, Tables};
use crate::backend::guest_memfd::{self, GuestMemfd, GuestMemfdError, Slot};
use crate::memory::{MemoryError, MemoryModel};

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is no KVM, or no permission to use it.
    #[error("cannot open /dev/kvm")]
    Open(#[source] std::io::Error),
    /// A KVM call failed.
    #[error("{call} failed")]
    Call {
        /// The call, by name.
        call: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// No memory model `guest-memfd`.
    #[error(
        "--memory-model guest-memfd: this KVM has no VMs of type KVM_X86_SW_PROTECTED_VM with \
         guest_memfd (Linux 6.8 or later with CONFIG_KVM_SW_PROTECTED_VM has, and so has \
         `guest-tests/lab/lab --kernel lab-sw-protected` on any machine)"
    )]
    NoGuestMemfd,
    /// Private memory cannot be set up.
    #[error(transparent)]
    GuestMemfd(#[from] GuestMemfdError),
    /// KVM lacks what this backend is built on.
    #[error("this KVM has no {0}")]
    Lacks(&'static str),
    /// A shared bit that this host's processors cannot address.
    #[error("a GPAW of {gpaw} bits needs as many physical address bits; guests here have {most}")]
    Gpaw {
        /// The GPAW asked for.
        gpaw: u32,
        /// The most there can be.
        most: u32,
    },
}

/// An error of the KVM call named `call`.
pub(in crate::backend) fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Call { call, source: error.into() }
}

/// `call` again until no signal interrupts it, as QEMU does with KVM_CREATE_VM: the kernel gives it up
/// for any signal (mm_take_all_locks() in mm/mmap.c).
fn uninterrupted<T>(
    call: impl Fn() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    loop {
        match call() {
            Err(error) if error.errno() == libc::EINTR => {}
            done => return done,
        }
    }
}

/// The host's KVM, opened once a process.
#[derive(Debug)]
pub(super) struct Host {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Host {
    /// Opens /dev/kvm, or gives what was opened before.
    pub(super) fn get() -> Result<&'static Self, VmError> {
        static HOST: OnceLock<Host> = OnceLock::new();
        if let Some(host) = HOST.get() {
            return Ok(host);
        }
        let host = Self::open()?;
        Ok(HOST.get_or_init(|| host))
    }

    fn open() -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|error| VmError::Open(error.into()))?;
        if kvm.check_extension_int(Cap::SyncRegs) & SyncReg::Register as c_int == 0 {
            return Err(VmError::Lacks("KVM_CAP_SYNC_REGS"));
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { kvm, cpuid })
    }

    /// What guests here can be told by CPUID.
    pub(super) const fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The host's KVM.
    pub(super) const fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Creates a VM without memory or vCPUs.
    pub(super) fn create_vm(&self) -> Result<VmFd, VmError> {
        uninterrupted(|| self.kvm.create_vm()).map_err(failed("KVM_CREATE_VM"))
    }

    /// Whether there are VMs whose memory has attributes, with guest_memfd.
    pub(super) fn has_protected_vms(&self) -> bool {
        guest_memfd::is_supported(&self.kvm, KVM_X86_SW_PROTECTED_VM)
    }

    /// Creates a VM whose memory has attributes.
    fn create_protected_vm(&self) -> Result<VmFd, VmError> {
        if !self.has_protected_vms() {
            return Err(VmError::NoGuestMemfd);
        }
        uninterrupted(|| self.kvm.create_vm_with_type(KVM_X86_SW_PROTECTED_VM.into()))
            .map_err(failed("KVM_CREATE_VM"))
    }

    /// Refuses a shared bit that guests here cannot address.
    pub(super) fn check_gpaw(&self, gpaw: u32) -> Result<(), VmError> {
        let most = self.address_bits();
        if gpaw > most { Err(VmError::Gpaw { gpaw, most }) } else { Ok(()) }
    }

    /// Physical address bits of a guest: CPUID 0x8000_0008 EAX\[7:0\].
    pub(super) fn address_bits(&self) -> u32 {
        let leaf = self.cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
        // What a processor without the leaf has (AMD APM 3, E.4.7).
        leaf.map_or(36, |entry| entry.eax & 0xff)
    }
}

/// Puts `ram` behind both aliases of a VM, and mappings of the VMM's own at their GPAs. `files` are the
/// guest_memfds of the private alias, one for each region of RAM, or none.
///
/// The mappings have to live longer than `fd`.
pub(super) fn add_memory(
    fd: &VmFd,
    ram: &Ram,
    shared_bit: u64,
    own: &[(u64, &MmapRegion)],
    files: &[GuestMemfd],
) -> Result<(), VmError> {
    let mut slots: Vec<_> = own.iter().map(|(gpa, mapping)| (*gpa, *mapping, None)).collect();
    for (at, region) in ram.regions().iter().enumerate() {
        slots.push((region.pages.gpa(), region.mapping(Alias::Private), files.get(at)));
        slots.push((region.pages.gpa() | shared_bit, region.mapping(Alias::Shared), None));
    }
    for (slot, (gpa, mapping, file)) in (0..).zip(slots) {
        let shared = mapping.as_ptr().addr() as u64;
        if let Some(file) = file {
            let slot = Slot { slot, gpa, size: mapping.size() as u64, shared, offset: 0 };
            // SAFETY: as below.
            unsafe { file.add_slot(fd, &slot) }?;
            continue;
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: mapping.size() as u64,
            userspace_addr: shared,
        };
        // SAFETY: the mapping is guest memory, and lives longer than the VM: the VMM's own are
        // dropped after the descriptor, RAM is borrowed. vCPUs are dropped before the VM.
        unsafe { fd.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// A vCPU, which cannot outlive its VM: it would go on to use the memory.
#[derive(Debug)]
pub(in crate::backend) struct VmVcpu<'a> {
    fd: VcpuFd,
    _vm: PhantomData<&'a ()>,
}

impl<'a> VmVcpu<'a> {
    /// The vCPU `fd` of `vm`, which owns or borrows the memory of the VM.
    pub(in crate::backend) const fn new<V>(fd: VcpuFd, _vm: &'a V) -> Self {
        Self { fd, _vm: PhantomData }
    }
}

impl Deref for VmVcpu<'_> {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl DerefMut for VmVcpu<'_> {
    fn deref_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

/// Flat 64-bit code and flat data for privilege level `dpl`, 0 to 3, by their selectors (Intel SDM 3A,
/// 3.4.5).
pub(super) fn set_flat_segments(sregs: &mut kvm_sregs, code: u16, data: u16, dpl: u8) {
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: code,
        type_: 0b1011,
        present: 1,
        dpl,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: data, type_: 0b0011, db: 1, l: 0, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
}

/// A VM and the memory of the tables in it. RAM is the caller's, and must outlive it.
#[derive(Debug)]
pub(super) struct Vm<'a> {
    fd: VmFd,
    host: &'static Host,
    tables: Tables,
    entry: u64,
    /// The guest_memfds of RAM, one for each region, if its memory has attributes.
    files: Vec<GuestMemfd>,
    _tables_memory: MmapRegion,
    ram: &'a Ram,
}

impl<'a> Vm<'a> {
    /// A VM with `ram` behind both aliases, that will run `image` on `vcpus` vCPUs.
    pub(super) fn new(
        host: &'static Host,
        ram: &'a Ram,
        image: &Image,
        vcpus: u64,
        gpaw: u32,
        model: MemoryModel,
    ) -> Result<Self, super::EmulatedError> {
        host.check_gpaw(gpaw)?;
        let shared_bit = mapgpa_abi::shared_bit(gpaw);
        let regions = ram.regions().iter().map(|region| region.pages);
        let tables = Tables::new(vcpus, regions, shared_bit, image.vectors, Level::User);
        let size = tables.bytes.len();
        let tables_memory = memory::map(size as u64)?;
        tables_memory
            .as_volatile_slice()
            .write_slice(&tables.bytes, 0)
            .map_err(|_| SetupError::Outside { gpa: tables::base(), size })?;

        let (fd, files) = match model {
            MemoryModel::Alias => (host.create_vm()?, Vec::new()),
            MemoryModel::GuestMemfd => {
                let fd = host.create_protected_vm()?;
                let file = |region: &Region| GuestMemfd::new(&fd, region.pages.count * PAGE_SIZE);
                let files = ram.regions().iter().map(file).collect::<Result<_, _>>();
                let files = files.map_err(VmError::from)?;
                (fd, files)
            }
        };
        add_memory(&fd, ram, shared_bit, &[(tables::base(), &tables_memory)], &files)?;
        let entry = image.entry;
        Ok(Self { fd, host, tables, entry, files, _tables_memory: tables_memory, ram })
    }

    /// Its memory, made private, if that has attributes.
    pub(super) fn protected(&self) -> Result<Option<Protected<'_>>, MemoryError> {
        if self.files.is_empty() {
            return Ok(None);
        }
        Protected::new(&self.fd, self.ram, &self.files).map(Some)
    }

    /// Creates the vCPU of this index, ready to run from the image's entry point.
    pub(super) fn vcpu(&self, index: u64) -> Result<VmVcpu<'_>, VmError> {
        let mut vcpu = self.fd.create_vcpu(index).map_err(failed("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&self.host.cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        self.set_system_registers(&vcpu, index)?;
        let regs = kvm_regs {
            rip: self.entry,
            rsp: stack_top(index),
            rdi: params::GPA,
            rsi: index,
            // IOPL 3, so that CPL 3 may use ports. A KVM that drops it looks at the TSS's bitmap.
            rflags: 1 << 1 | 3 << 12,
            ..kvm_regs::default()
        };
        vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_sync_valid_reg(SyncReg::Register);
        Ok(VmVcpu::new(vcpu, self))
    }

    /// Long mode with paging, CPL 3, SSE on (Intel SDM 3A, 2.5, 3.4.5 and 10.8.5).
    fn set_system_registers(&self, vcpu: &VcpuFd, index: u64) -> Result<(), VmError> {
        let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        set_flat_segments(&mut sregs, tables::CODE, tables::DATA, 3);
        sregs.tr = kvm_segment {
            base: tables::tss_base(index),
            limit: tables::tss_limit(),
            selector: tables::tss_selector(index),
            type_: 0b1011,
            present: 1,
            ..kvm_segment::default()
        };
        let (base, limit) = tables::gdt();
        sregs.gdt = kvm_dtable { base, limit, ..kvm_dtable::default() };
        sregs.idt = kvm_dtable {
            base: tables::idt(),
            limit: self.tables.idt_limit,
            ..kvm_dtable::default()
        };
        // PE, MP, ET, NE, WP, PG.
        sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
        sregs.cr3 = self.tables.cr3;
        // PAE, OSFXSR, OSXMMEXCPT.
        sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
        // LME, LMA.
        sregs.efer = 1 << 8 | 1 << 10;
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))
    }
}
