//! What is in the kernel's headers and not in the crate `kvm-bindings`: numbers of ioctls and the
//! structures of KVM_MEMORY_ENCRYPT_OP for TDX.
//!
//! Sources: Linux, include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h, 6.16 to 7.2;
//! Documentation/virt/kvm/x86/intel-tdx.rst.
#![allow(dead_code, reason = "the test client uses this file too, and each uses a part")]

/// Type of a TD in KVM_CREATE_VM.
pub(crate) const VM_TYPE_TDX: u64 = 5;

/// An ioctl of KVM's by direction (1 writes to the kernel, 2 reads), number and size.
const fn io(direction: u64, number: u64, size: u64) -> u64 {
    direction << 30 | size << 16 | 0xae << 8 | number
}

/// Ioctls, of /dev/kvm, of VMs and of vCPUs.
pub(crate) mod ioctl {
    use super::io;

    pub(crate) const GET_API_VERSION: u64 = io(0, 0x00, 0);
    pub(crate) const CREATE_VM: u64 = io(0, 0x01, 0);
    pub(crate) const CHECK_EXTENSION: u64 = io(0, 0x03, 0);
    pub(crate) const GET_VCPU_MMAP_SIZE: u64 = io(0, 0x04, 0);
    pub(crate) const GET_SUPPORTED_CPUID: u64 = io(3, 0x05, 8);

    pub(crate) const CREATE_VCPU: u64 = io(0, 0x41, 0);
    pub(crate) const SET_USER_MEMORY_REGION: u64 = io(1, 0x46, 32);
    pub(crate) const SET_TSS_ADDR: u64 = io(0, 0x47, 0);
    pub(crate) const SET_IDENTITY_MAP_ADDR: u64 = io(1, 0x48, 8);
    pub(crate) const SET_USER_MEMORY_REGION2: u64 = io(1, 0x49, 160);
    pub(crate) const CREATE_IRQCHIP: u64 = io(0, 0x60, 0);
    pub(crate) const SET_GSI_ROUTING: u64 = io(1, 0x6a, 8);
    pub(crate) const IRQFD: u64 = io(1, 0x76, 32);
    pub(crate) const SET_BOOT_CPU_ID: u64 = io(0, 0x78, 0);
    pub(crate) const IOEVENTFD: u64 = io(1, 0x79, 64);
    pub(crate) const SET_TSC_KHZ: u64 = io(0, 0xa2, 0);
    pub(crate) const GET_TSC_KHZ: u64 = io(0, 0xa3, 0);
    pub(crate) const ENABLE_CAP: u64 = io(1, 0xa3, 104);
    pub(crate) const SIGNAL_MSI: u64 = io(1, 0xa5, 32);
    pub(crate) const MEMORY_ENCRYPT_OP: u64 = io(3, 0xba, 8);
    pub(crate) const X86_SET_MSR_FILTER: u64 = io(1, 0xc6, 392);
    pub(crate) const SET_MEMORY_ATTRIBUTES: u64 = io(1, 0xd2, 32);
    pub(crate) const CREATE_GUEST_MEMFD: u64 = io(3, 0xd4, 64);

    pub(crate) const RUN: u64 = io(0, 0x80, 0);
    pub(crate) const GET_REGS: u64 = io(2, 0x81, 144);
    pub(crate) const SET_REGS: u64 = io(1, 0x82, 144);
    pub(crate) const GET_SREGS: u64 = io(2, 0x83, 312);
    pub(crate) const SET_SREGS: u64 = io(1, 0x84, 312);
    pub(crate) const GET_MSRS: u64 = io(3, 0x88, 8);
    pub(crate) const SET_MSRS: u64 = io(1, 0x89, 8);
    pub(crate) const SET_SIGNAL_MASK: u64 = io(1, 0x8b, 4);
    pub(crate) const GET_FPU: u64 = io(2, 0x8c, 416);
    pub(crate) const SET_FPU: u64 = io(1, 0x8d, 416);
    pub(crate) const GET_LAPIC: u64 = io(2, 0x8e, 1024);
    pub(crate) const SET_LAPIC: u64 = io(1, 0x8f, 1024);
    pub(crate) const SET_CPUID2: u64 = io(1, 0x90, 8);
    pub(crate) const GET_CPUID2: u64 = io(3, 0x91, 8);
    pub(crate) const GET_MP_STATE: u64 = io(2, 0x98, 4);
    pub(crate) const SET_MP_STATE: u64 = io(1, 0x99, 4);
    pub(crate) const NMI: u64 = io(0, 0x9a, 0);
    pub(crate) const SET_GUEST_DEBUG: u64 = io(1, 0x9b, 72);
    pub(crate) const GET_VCPU_EVENTS: u64 = io(2, 0x9f, 64);
    pub(crate) const SET_VCPU_EVENTS: u64 = io(1, 0xa0, 64);
    pub(crate) const GET_DEBUGREGS: u64 = io(2, 0xa1, 128);
    pub(crate) const SET_DEBUGREGS: u64 = io(1, 0xa2, 128);
    pub(crate) const GET_XSAVE: u64 = io(2, 0xa4, 4096);
    pub(crate) const SET_XSAVE: u64 = io(1, 0xa5, 4096);
    pub(crate) const GET_XCRS: u64 = io(2, 0xa6, 392);
    pub(crate) const SET_XCRS: u64 = io(1, 0xa7, 392);
    pub(crate) const GET_SREGS2: u64 = io(2, 0xcc, 320);
    pub(crate) const SET_SREGS2: u64 = io(1, 0xcd, 320);
    pub(crate) const GET_XSAVE2: u64 = io(2, 0xcf, 4096);
}

/// Sub-commands of KVM_MEMORY_ENCRYPT_OP: `enum kvm_tdx_cmd_id`.
pub(crate) mod cmd {
    pub(crate) const CAPABILITIES: u32 = 0;
    pub(crate) const INIT_VM: u32 = 1;
    pub(crate) const INIT_VCPU: u32 = 2;
    pub(crate) const INIT_MEM_REGION: u32 = 3;
    pub(crate) const FINALIZE_VM: u32 = 4;
    pub(crate) const GET_CPUID: u32 = 5;
    /// On newer kernels.
    pub(crate) const TERMINATE_VM: u32 = 6;

    /// The name of a sub-command.
    pub(crate) fn name(id: u32) -> &'static str {
        match id {
            CAPABILITIES => "KVM_TDX_CAPABILITIES",
            INIT_VM => "KVM_TDX_INIT_VM",
            INIT_VCPU => "KVM_TDX_INIT_VCPU",
            INIT_MEM_REGION => "KVM_TDX_INIT_MEM_REGION",
            FINALIZE_VM => "KVM_TDX_FINALIZE_VM",
            GET_CPUID => "KVM_TDX_GET_CPUID",
            TERMINATE_VM => "KVM_TDX_TERMINATE_VM",
            _ => "an unknown sub-command",
        }
    }
}

/// `struct kvm_tdx_cmd`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct TdxCmd {
    pub(crate) id: u32,
    pub(crate) flags: u32,
    pub(crate) data: u64,
    pub(crate) hw_error: u64,
}

/// `struct kvm_tdx_capabilities` up to the entries of its `cpuid`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct TdxCapabilities {
    pub(crate) supported_attrs: u64,
    pub(crate) supported_xfam: u64,
    pub(crate) kernel_tdvmcallinfo_1_r11: u64,
    pub(crate) user_tdvmcallinfo_1_r11: u64,
    pub(crate) kernel_tdvmcallinfo_1_r12: u64,
    pub(crate) user_tdvmcallinfo_1_r12: u64,
    pub(crate) reserved: [u64; 250],
    pub(crate) nent: u32,
    pub(crate) padding: u32,
}

impl Default for TdxCapabilities {
    fn default() -> Self {
        Self {
            supported_attrs: 0,
            supported_xfam: 0,
            kernel_tdvmcallinfo_1_r11: 0,
            user_tdvmcallinfo_1_r11: 0,
            kernel_tdvmcallinfo_1_r12: 0,
            user_tdvmcallinfo_1_r12: 0,
            reserved: [0; 250],
            nent: 0,
            padding: 0,
        }
    }
}

/// `struct kvm_tdx_init_vm` up to the entries of its `cpuid`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct TdxInitVm {
    pub(crate) attributes: u64,
    pub(crate) xfam: u64,
    pub(crate) mrconfigid: [u64; 6],
    pub(crate) mrowner: [u64; 6],
    pub(crate) mrownerconfig: [u64; 6],
    pub(crate) reserved: [u64; 12],
    pub(crate) nent: u32,
    pub(crate) padding: u32,
}

/// `struct kvm_tdx_init_mem_region`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct TdxInitMemRegion {
    pub(crate) source_addr: u64,
    pub(crate) gpa: u64,
    pub(crate) nr_pages: u64,
}

/// `struct kvm_cpuid2` up to its entries.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Cpuid2 {
    pub(crate) nent: u32,
    pub(crate) padding: u32,
}

/// KVM_TDX_MEASURE_MEMORY_REGION.
pub(crate) const MEASURE: u32 = 1;
/// KVM_EXIT_TDX.
pub(crate) const EXIT_TDX: u32 = 40;
/// KVM_SYSTEM_EVENT_TDX_FATAL.
pub(crate) const SYSTEM_EVENT_TDX_FATAL: u32 = 7;
/// KVM_HC_MAP_GPA_RANGE (include/uapi/linux/kvm_para.h).
pub(crate) const HC_MAP_GPA_RANGE: u64 = 12;

const _: () = assert!(size_of::<TdxCmd>() == 24);
const _: () = assert!(size_of::<TdxCapabilities>() == 2056);
const _: () = assert!(size_of::<TdxInitVm>() == 264);
