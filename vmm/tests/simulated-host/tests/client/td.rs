//! A VMM of the smallest kind, as KVM's self tests have it: the calls that make a TD, one by one, by their
//! plain ioctls, so that a test can leave one out or make it wrong.

use std::ffi::c_void;

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_cpuid_entry2, kvm_create_guest_memfd, kvm_enable_cap,
    kvm_memory_attributes, kvm_msi, kvm_run, kvm_userspace_memory_region2,
};

use super::guest::{self, Op};
use super::uapi::{self, TdxCapabilities, TdxCmd, TdxInitMemRegion, TdxInitVm, cmd, ioctl};

/// The positive errno of a call, or its value.
pub type Sys<T = i32> = Result<T, i32>;

/// RAM from GPA 0.
pub const RAM: u64 = 32 << 20;
/// Start and size of the memory below 4 GiB, where the guest begins.
const TOP: u64 = 0xffff_0000;
const TOP_SIZE: u64 = 0x1_0000;
/// SEPT_VE_DISABLE.
pub const SEPT_VE_DISABLE: u64 = 1 << 28;

/// ioctl(2) through the C library, so that the preloaded library sees it.
fn call<T>(fd: i32, request: u64, arg: *mut T) -> Sys {
    // SAFETY: each caller below pairs the request with its structure.
    let value = unsafe { libc::ioctl(fd, request, arg.cast::<c_void>()) };
    if value < 0 { Err(errno()) } else { Ok(value) }
}

fn with_number(fd: i32, request: u64, number: u64) -> Sys {
    call(fd, request, std::ptr::without_provenance_mut::<c_void>(number as usize))
}

pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A header with room for CPUID entries behind it.
#[derive(Clone)]
#[repr(C)]
pub struct With<H> {
    pub head: H,
    pub entries: [kvm_cpuid_entry2; 256],
}

impl<H: Default> Default for With<H> {
    fn default() -> Self {
        Self { head: H::default(), entries: [kvm_cpuid_entry2::default(); 256] }
    }
}

/// A TD with one vCPU, as far as a test has made it.
pub struct Td {
    pub kvm: i32,
    pub vm: i32,
    pub vcpu: i32,
    pub memfd: i32,
    pub run: *mut kvm_run,
    run_size: usize,
    pub ram: *mut u8,
    top: *mut u8,
    pub gpaw: u32,
    /// What the guest reported.
    pub reports: Vec<u32>,
}

fn memory(size: u64) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: new memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size as usize, prot, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED, "mmap: {}", errno());
    at.cast()
}

impl Td {
    /// /dev/kvm is open and a VM of type 5 is there.
    pub fn create() -> Sys<Self> {
        // SAFETY: a path.
        let kvm = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        if kvm < 0 {
            return Err(errno());
        }
        let vm = with_number(kvm, ioctl::CREATE_VM, uapi::VM_TYPE_TDX)?;
        Ok(Self {
            kvm,
            vm,
            vcpu: -1,
            memfd: -1,
            run: std::ptr::null_mut(),
            run_size: 0,
            ram: memory(RAM),
            top: memory(TOP_SIZE),
            gpaw: 48,
            reports: Vec::new(),
        })
    }

    pub fn extension(&self, cap: u32) -> Sys {
        with_number(self.vm, ioctl::CHECK_EXTENSION, cap.into())
    }

    pub fn enable(&self, cap: u32, arg: u64) -> Sys {
        let mut enable = kvm_enable_cap { cap, args: [arg, 0, 0, 0], ..kvm_enable_cap::default() };
        call(self.vm, ioctl::ENABLE_CAP, &raw mut enable)
    }

    pub fn enable_both(&self) -> Sys {
        self.enable(KVM_CAP_SPLIT_IRQCHIP, 24)?;
        self.enable(KVM_CAP_EXIT_HYPERCALL, 1 << uapi::HC_MAP_GPA_RANGE)
    }

    /// KVM_MEMORY_ENCRYPT_OP; gives the result and `hw_error`.
    pub fn op<T>(&self, fd: i32, id: u32, flags: u32, data: *mut T) -> (Sys, u64) {
        let data = data.expose_provenance() as u64;
        let mut command = TdxCmd { id, flags, data, hw_error: 0 };
        let result = call(fd, ioctl::MEMORY_ENCRYPT_OP, &raw mut command);
        (result, command.hw_error)
    }

    pub fn capabilities(&self) -> Sys<Box<With<TdxCapabilities>>> {
        let mut caps = Box::<With<TdxCapabilities>>::default();
        caps.head.nent = 256;
        self.op(self.vm, cmd::CAPABILITIES, 0, &raw mut *caps).0.map(|_| caps)
    }

    /// What KVM_TDX_INIT_VM wants at least.
    pub fn params(&self) -> Box<With<TdxInitVm>> {
        let mut params = Box::<With<TdxInitVm>>::default();
        params.head.attributes = SEPT_VE_DISABLE;
        params.head.xfam = 3;
        params.head.nent = 1;
        params.entries[0] = kvm_cpuid_entry2 {
            function: 0x8000_0008,
            eax: self.gpaw << 16 | self.gpaw,
            ..kvm_cpuid_entry2::default()
        };
        params
    }

    pub fn init_vm(&self, mut params: Box<With<TdxInitVm>>) -> (Sys, u64) {
        self.op(self.vm, cmd::INIT_VM, 0, &raw mut *params)
    }

    pub fn create_vcpu(&mut self) -> Sys {
        self.vcpu = with_number(self.vm, ioctl::CREATE_VCPU, 0)?;
        let size = with_number(self.kvm, ioctl::GET_VCPU_MMAP_SIZE, 0)?;
        self.run_size = usize::try_from(size).expect("a size");
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let run = unsafe {
            libc::mmap(std::ptr::null_mut(), self.run_size, prot, libc::MAP_SHARED, self.vcpu, 0)
        };
        assert_ne!(run, libc::MAP_FAILED, "mmap of the vCPU: {}", errno());
        self.run = run.cast();
        Ok(0)
    }

    /// KVM_TDX_GET_CPUID and KVM_SET_CPUID2 with what it says.
    pub fn cpuid(&self) -> Sys {
        let mut cpuid = Box::<With<uapi::Cpuid2>>::default();
        cpuid.head.nent = 256;
        self.op(self.vcpu, cmd::GET_CPUID, 0, &raw mut *cpuid).0?;
        call(self.vcpu, ioctl::SET_CPUID2, &raw mut *cpuid)
    }

    pub fn create_memfd(&mut self) -> Sys {
        let mut args =
            kvm_create_guest_memfd { size: RAM + TOP_SIZE, ..kvm_create_guest_memfd::default() };
        self.memfd = call(self.vm, ioctl::CREATE_GUEST_MEMFD, &raw mut args)?;
        Ok(0)
    }

    pub fn region(&self, region: kvm_userspace_memory_region2) -> Sys {
        let mut region = region;
        call(self.vm, ioctl::SET_USER_MEMORY_REGION2, &raw mut region)
    }

    pub fn slot(&self, slot: u32) -> kvm_userspace_memory_region2 {
        let (gpa, size, user, offset) = match slot {
            0 => (0, RAM, self.ram, 0),
            _ => (TOP, TOP_SIZE, self.top, RAM),
        };
        kvm_userspace_memory_region2 {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: user.expose_provenance() as u64,
            guest_memfd_offset: offset,
            guest_memfd: self.memfd.cast_unsigned(),
            ..kvm_userspace_memory_region2::default()
        }
    }

    pub fn slots(&mut self) -> Sys {
        self.create_memfd()?;
        self.region(self.slot(0))?;
        self.region(self.slot(1))
    }

    pub fn attributes(&self, address: u64, size: u64, private: bool) -> Sys {
        let attributes = if private { u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) } else { 0 };
        let mut args = kvm_memory_attributes { address, size, attributes, flags: 0 };
        call(self.vm, ioctl::SET_MEMORY_ATTRIBUTES, &raw mut args)
    }

    pub fn all_private(&self) -> Sys {
        self.attributes(0, RAM, true)?;
        self.attributes(TOP, TOP_SIZE, true)
    }

    pub fn init_vcpu(&self) -> Sys {
        self.op(self.vcpu, cmd::INIT_VCPU, 0, std::ptr::without_provenance_mut::<u8>(0x1234)).0
    }

    pub fn add(&self, region: &mut TdxInitMemRegion) -> Sys {
        self.op(self.vcpu, cmd::INIT_MEM_REGION, uapi::MEASURE, std::ptr::from_mut(region)).0
    }

    /// Adds the guest: page tables, script, stack, code.
    pub fn add_guest(&self, script: &[Op]) -> Sys {
        let mut pages = guest::tables(1 << (self.gpaw - 1));
        pages.extend_from_slice(&guest::script(script));
        pages.resize(0xf000, 0);
        pages.extend_from_slice(guest::code());
        let source = memory(TOP_SIZE);
        // SAFETY: as many bytes as the memory has.
        unsafe { source.copy_from_nonoverlapping(pages.as_ptr(), pages.len()) };
        let mut region = TdxInitMemRegion {
            source_addr: source.expose_provenance() as u64,
            gpa: TOP,
            nr_pages: TOP_SIZE / 4096,
        };
        let mut result = self.add(&mut region);
        while result == Err(libc::EINTR) {
            result = self.add(&mut region);
        }
        // SAFETY: mapped above.
        unsafe { libc::munmap(source.cast(), TOP_SIZE as usize) };
        result
    }

    pub fn finalize(&self) -> (Sys, u64) {
        self.op(self.vm, cmd::FINALIZE_VM, 0, std::ptr::null_mut::<u8>())
    }

    /// All of it in the right order; says at which call it failed.
    pub fn build(script: &[Op]) -> Result<Self, (&'static str, i32)> {
        Self::build_with(script, |_| {})
    }

    /// The same, with parameters of the test's.
    pub fn build_with(
        script: &[Op],
        change: impl FnOnce(&mut TdxInitVm),
    ) -> Result<Self, (&'static str, i32)> {
        let at = |call| move |errno| (call, errno);
        let mut td = Self::create().map_err(at("create"))?;
        td.enable_both().map_err(at("enable"))?;
        td.capabilities().map_err(at("capabilities"))?;
        let mut params = td.params();
        change(&mut params.head);
        td.init_vm(params).0.map_err(at("init-vm"))?;
        td.create_vcpu().map_err(at("create-vcpu"))?;
        td.cpuid().map_err(at("cpuid"))?;
        td.slots().map_err(at("slots"))?;
        td.all_private().map_err(at("attributes"))?;
        td.init_vcpu().map_err(at("init-vcpu"))?;
        td.add_guest(script).map_err(at("add"))?;
        td.finalize().0.map_err(at("finalize"))?;
        Ok(td)
    }

    /// KVM_RUN.
    pub fn enter(&self) -> Sys {
        with_number(self.vcpu, ioctl::RUN, 0)
    }

    /// Runs until an exit that is no report; keeps the reports.
    pub fn run(&mut self) -> Sys<u32> {
        loop {
            self.enter()?;
            // SAFETY: the mapping is there as long as the TD; the vCPU is not running.
            let run = unsafe { &*self.run };
            // SAFETY: the exit reason is looked at first.
            let io = unsafe { run.__bindgen_anon_1.io };
            if run.exit_reason != kvm_bindings::KVM_EXIT_IO || io.port != guest::PORT {
                return Ok(run.exit_reason);
            }
            // SAFETY: where KVM says that the data are.
            let word = unsafe {
                self.run.cast::<u8>().add(io.data_offset as usize).cast::<u32>().read_unaligned()
            };
            self.reports.push(word);
            if word == guest::END {
                return Ok(0);
            }
        }
    }

    /// What the exit says: words of its union.
    pub fn word(&self, index: usize) -> u64 {
        // SAFETY: within `struct kvm_run`, whose union is at 32.
        unsafe { self.run.cast::<u8>().add(32 + 8 * index).cast::<u64>().read_unaligned() }
    }

    pub fn set_word(&self, index: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.run.cast::<u8>().add(32 + 8 * index).cast::<u64>().write_unaligned(value) }
    }

    /// `hypercall.ret` of a KVM_EXIT_HYPERCALL.
    pub fn answer(&self, ret: u64) {
        self.set_word(7, ret);
    }

    pub fn signal_msi(&self, vector: u32) -> Sys {
        let mut msi = kvm_msi { address_lo: 0xfee0_0000, data: vector, ..kvm_msi::default() };
        call(self.vm, ioctl::SIGNAL_MSI, &raw mut msi)
    }

    pub fn nmi(&self) -> Sys {
        with_number(self.vcpu, ioctl::NMI, 0)
    }

    pub fn vcpu_ioctl<T: Default>(&self, request: u64) -> Sys {
        let mut value = Box::<T>::default();
        call(self.vcpu, request, &raw mut *value)
    }

    pub fn terminate(&self) -> Sys {
        self.op(self.vm, cmd::TERMINATE_VM, 0, std::ptr::null_mut::<u8>()).0
    }

    /// Gives everything back.
    pub fn close(self) {
        // SAFETY: all are this TD's, and nothing uses them afterwards.
        unsafe {
            if !self.run.is_null() {
                libc::munmap(self.run.cast(), self.run_size);
            }
            for fd in [self.vcpu, self.vm, self.memfd, self.kvm] {
                if fd >= 0 {
                    libc::close(fd);
                }
            }
            libc::munmap(self.ram.cast(), RAM as usize);
            libc::munmap(self.top.cast(), TOP_SIZE as usize);
        }
    }
}
