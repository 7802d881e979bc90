//! KVM's TDX interface, which kvm-bindings does not have yet: the sub-commands of
//! KVM_MEMORY_ENCRYPT_OP and their structures, as in Linux's arch/x86/include/uapi/asm/kvm.h and
//! Documentation/virt/kvm/x86/intel-tdx.rst; the exit as in include/uapi/linux/kvm.h.
#![allow(unsafe_code, reason = "KVM_MEMORY_ENCRYPT_OP, and the union of kvm_run")]

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{kvm_cpuid_entry2, kvm_run};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iowr_nr!(KVM_MEMORY_ENCRYPT_OP, kvm_bindings::KVMIO, 0xba, libc::c_ulong);

/// A sub-command, enum kvm_tdx_cmd_id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Command {
    /// On the VM: what can be configured.
    Capabilities = 0,
    /// On the VM: makes the TD.
    InitVm = 1,
    /// On a vCPU: makes it one of the TD.
    InitVcpu = 2,
    /// On a vCPU: adds initial memory.
    InitMemRegion = 3,
    /// On the VM: the TD may run from now on.
    FinalizeVm = 4,
    /// On a vCPU: CPUID as the TDX module virtualises it.
    GetCpuid = 5,
    /// On the VM: it may run no more, and gives up its key (since Linux 6.18).
    TerminateVm = 6,
}

impl Command {
    /// Its name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "KVM_TDX_CAPABILITIES",
            Self::InitVm => "KVM_TDX_INIT_VM",
            Self::InitVcpu => "KVM_TDX_INIT_VCPU",
            Self::InitMemRegion => "KVM_TDX_INIT_MEM_REGION",
            Self::FinalizeVm => "KVM_TDX_FINALIZE_VM",
            Self::GetCpuid => "KVM_TDX_GET_CPUID",
            Self::TerminateVm => "KVM_TDX_TERMINATE_VM",
        }
    }
}

/// struct kvm_tdx_cmd.
#[repr(C)]
#[derive(Debug, Default)]
struct Cmd {
    id: u32,
    flags: u32,
    data: u64,
    hw_error: u64,
}

/// struct kvm_tdx_init_mem_region. KVM advances it as far as it comes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct MemRegion {
    /// Address of the contents in this process, of whole pages.
    pub(super) source: u64,
    /// Where they go.
    pub(super) gpa: u64,
    /// How many pages.
    pub(super) pages: u64,
}

/// KVM_TDX_MEASURE_MEMORY_REGION: the contents are part of the TD's measurement.
pub(super) const MEASURE: u32 = 1;

/// TD attribute: private EPT violations are no #VE to the guest.
pub(super) const SEPT_VE_DISABLE: u64 = mapgpa_abi::tdcall::ATTR_SEPT_VE_DISABLE;

/// KVM_EXIT_TDX.
pub(super) const EXIT_TDX: u32 = 40;
/// KVM_SYSTEM_EVENT_TDX_FATAL.
pub(super) const SYSTEM_EVENT_TDX_FATAL: u32 = 7;
/// KVM_HC_MAP_GPA_RANGE (include/uapi/linux/kvm_para.h).
pub(super) const HC_MAP_GPA_RANGE: u64 = 12;
/// KVM_MAP_GPA_RANGE_ENCRYPTED: the range is to become private.
pub(super) const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
/// KVM_MEMORY_EXIT_FLAG_PRIVATE: the access was private.
pub(super) const MEMORY_EXIT_FLAG_PRIVATE: u64 = 1 << 3;

/// A list of CPUID entries with what is before it: struct kvm_tdx_capabilities, kvm_tdx_init_vm (head
/// of 256 bytes) and kvm_cpuid2 (none). A `kvm_cpuid2` follows the head: count, padding, entries.
#[derive(Debug, Clone)]
pub(super) struct WithCpuid<const HEAD: usize> {
    words: Vec<u64>,
}

/// 64-bit words of an entry.
const ENTRY: usize = size_of::<kvm_cpuid_entry2>() / 8;

/// struct kvm_tdx_capabilities: supported_attrs, supported_xfam, four words on TDVMCALLs, 250 reserved.
pub(super) type Capabilities = WithCpuid<256>;
/// struct kvm_tdx_init_vm: attributes, xfam, three digests of 48 bytes, 12 reserved words.
pub(super) type InitVm = WithCpuid<32>;
/// struct kvm_cpuid2.
pub(super) type Cpuid = WithCpuid<0>;

impl<const HEAD: usize> WithCpuid<HEAD> {
    /// All zero, with room for `entries` entries.
    pub(super) fn new(entries: u32) -> Self {
        let mut words = vec![0; HEAD + 1 + entries as usize * ENTRY];
        words[HEAD] = entries.into();
        Self { words }
    }

    /// All zero but for these entries.
    pub(super) fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let mut this = Self::new(u32::try_from(entries.len()).unwrap_or(u32::MAX));
        let slots = this.words[HEAD + 1..].chunks_exact_mut(ENTRY);
        for (slot, entry) in slots.zip(entries) {
            let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
            slot.copy_from_slice(&[
                pair(entry.function, entry.index),
                pair(entry.flags, entry.eax),
                pair(entry.ebx, entry.ecx),
                pair(entry.edx, 0),
                0,
            ]);
        }
        this
    }

    /// A word of the head.
    pub(super) fn head(&self, at: usize) -> u64 {
        self.words[at]
    }

    /// Sets a word of the head.
    pub(super) fn set_head(&mut self, at: usize, value: u64) {
        self.words[at] = value;
    }

    /// How many entries KVM says there are.
    #[expect(clippy::cast_possible_truncation, reason = "the low half is the count")]
    pub(super) fn count(&self) -> u32 {
        self.words[HEAD] as u32
    }

    /// The entries.
    #[expect(clippy::cast_possible_truncation, reason = "halves of words")]
    pub(super) fn entries(&self) -> Vec<kvm_cpuid_entry2> {
        let halves = |word: u64| (word as u32, (word >> 32) as u32);
        let entry = |words: &[u64]| {
            let (function, index) = halves(words[0]);
            let (flags, eax) = halves(words[1]);
            let (ebx, ecx) = halves(words[2]);
            let (edx, _) = halves(words[3]);
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
        };
        let entries = self.words[HEAD + 1..].chunks_exact(ENTRY);
        entries.take(self.count() as usize).map(entry).collect()
    }
}

/// A descriptor that takes sub-commands.
pub(super) trait Target: AsRawFd {}
impl Target for VmFd {}
impl Target for VcpuFd {}

/// A sub-command that failed.
#[derive(Debug)]
pub(super) struct Failed {
    /// Which.
    pub(super) command: Command,
    /// The host's error.
    pub(super) source: io::Error,
    /// The TDX module's status; 0 if it was not asked.
    pub(super) hw_error: u64,
}

fn call(target: &impl Target, command: Command, flags: u32, data: u64) -> Result<(), Failed> {
    let mut cmd = Cmd { id: command as u32, flags, data, hw_error: 0 };
    // SAFETY: `cmd` lives, and `data` is a number, or the address of what the sub-command reads and
    // writes, which the callers here borrow for the call.
    let result = unsafe { ioctl_with_mut_ref(target, KVM_MEMORY_ENCRYPT_OP(), &mut cmd) };
    if result < 0 {
        let source = io::Error::last_os_error();
        return Err(Failed { command, source, hw_error: cmd.hw_error });
    }
    Ok(())
}

/// A sub-command with a number, or none.
pub(super) fn plain(target: &impl Target, command: Command, data: u64) -> Result<(), Failed> {
    call(target, command, 0, data)
}

/// A sub-command with a list of CPUID entries.
pub(super) fn with_cpuid<const HEAD: usize>(
    target: &impl Target,
    command: Command,
    list: &mut WithCpuid<HEAD>,
) -> Result<(), Failed> {
    call(target, command, 0, list.words.as_mut_ptr().expose_provenance() as u64)
}

/// KVM_TDX_INIT_MEM_REGION. Pages at [`MemRegion::source`] are read by KVM, as from any address of a
/// system call; where nothing is mapped it fails.
pub(super) fn add_memory(vcpu: &VcpuFd, region: &mut MemRegion) -> Result<(), Failed> {
    let data = (&raw mut *region).expose_provenance() as u64;
    call(vcpu, Command::InitMemRegion, MEASURE, data)
}

/// The part of kvm_run that KVM_EXIT_TDX is about; what follows depends on `nr`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct TdxExit {
    flags: u64,
    /// The TDVMCALL sub-function.
    pub(super) nr: u64,
    /// R10 of the reply.
    pub(super) ret: u64,
}

/// Says of the KVM_EXIT_HYPERCALL that `run` holds what became of it.
pub(super) const fn set_hypercall_ret(run: &mut kvm_run, ret: u64) {
    run.__bindgen_anon_1.hypercall.ret = ret;
}

/// The exit KVM_EXIT_TDX that `run` holds.
pub(super) fn tdx_exit(run: &mut kvm_run) -> &mut TdxExit {
    const { assert!(size_of::<TdxExit>() <= size_of_val_of_union()) };
    // SAFETY: the union has at least that many bytes, which are plain integers, and is aligned to 8.
    unsafe { &mut *(&raw mut run.__bindgen_anon_1).cast::<TdxExit>() }
}

const fn size_of_val_of_union() -> usize {
    size_of::<kvm_bindings::kvm_run__bindgen_ty_1>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_offsets_are_the_header_s() {
        assert_eq!(size_of::<Cmd>(), 24);
        assert_eq!(size_of::<MemRegion>(), 24);
        assert_eq!(KVM_MEMORY_ENCRYPT_OP(), 0xc008_aeba);
        // The head of kvm_tdx_init_vm is 256 bytes (tdx_td_init() asserts it), that of
        // kvm_tdx_capabilities 6 words and 250 reserved.
        assert_eq!(InitVm::new(0).words.len() * 8, 256 + 8);
        assert_eq!(Capabilities::new(0).words.len(), 6 + 250 + 1);
        assert_eq!(ENTRY * 8, 40);
        assert_eq!(align_of::<kvm_bindings::kvm_run__bindgen_ty_1>(), 8);
    }

    #[test]
    fn entries_survive() {
        let entry = kvm_cpuid_entry2 {
            function: 0x8000_0008,
            index: 1,
            flags: 2,
            eax: 3,
            ebx: 4,
            ecx: 5,
            edx: 6,
            padding: [0; 3],
        };
        let list = InitVm::of(&[entry, entry]);
        assert_eq!(list.count(), 2);
        assert_eq!(list.entries(), [entry, entry]);
    }
}
