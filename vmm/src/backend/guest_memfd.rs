//! guest_memfd: private guest memory that the VMM cannot map, and the attributes that say which pages
//! are private (Linux 6.8, Documentation/virt/kvm/api.rst, 4.140 to 4.142).
//!
//! It knows nothing of backends: it makes the file, the memslot and the three calls that a conversion
//! takes. GPAs, offsets and sizes are bytes and multiples of 4 KiB.
#![allow(unsafe_code, reason = "KVM_CREATE_GUEST_MEMFD, KVM_SET_USER_MEMORY_REGION2")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd,
    kvm_memory_attributes, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VmFd};
use nix::fcntl::{FallocateFlags, fallocate};

/// A call for guest_memfd or memory attributes that failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestMemfdError {
    /// No file.
    #[error("KVM_CREATE_GUEST_MEMFD failed for {size} bytes")]
    Create {
        /// Size in bytes.
        size: u64,
        /// The host's error.
        source: io::Error,
    },
    /// No memslot.
    #[error("KVM_SET_USER_MEMORY_REGION2 failed for {size} bytes at GPA {gpa:#x}")]
    Slot {
        /// Start of the slot.
        gpa: u64,
        /// Size in bytes.
        size: u64,
        /// The host's error.
        source: io::Error,
    },
    /// The attributes stay as they were, or part of them.
    #[error("KVM_SET_MEMORY_ATTRIBUTES failed for {size} bytes at GPA {gpa:#x}")]
    Attributes {
        /// Start of the range.
        gpa: u64,
        /// Size in bytes.
        size: u64,
        /// The host's error.
        source: io::Error,
    },
    /// The contents stay.
    #[error(
        "fallocate(FALLOC_FL_PUNCH_HOLE) of guest_memfd failed for {size} bytes at {offset:#x}"
    )]
    Punch {
        /// Start in the file.
        offset: u64,
        /// Size in bytes.
        size: u64,
        /// The host's error.
        source: io::Error,
    },
}

impl GuestMemfdError {
    /// The host's error.
    #[must_use]
    pub fn into_source(self) -> io::Error {
        match self {
            Self::Create { source, .. }
            | Self::Slot { source, .. }
            | Self::Attributes { source, .. }
            | Self::Punch { source, .. } => source,
        }
    }
}

/// Whether VMs of `vm_type` (`KVM_X86_SW_PROTECTED_VM`, `KVM_X86_TDX_VM`) exist here with guest_memfd
/// and memory attributes.
#[must_use]
pub fn is_supported(kvm: &Kvm, vm_type: u32) -> bool {
    let extension = |cap: u32| kvm.check_extension_raw(u64::from(cap));
    let types = extension(kvm_bindings::KVM_CAP_VM_TYPES).cast_unsigned();
    let has_type = types.checked_shr(vm_type).is_some_and(|types| types & 1 != 0);
    let attributes = extension(kvm_bindings::KVM_CAP_MEMORY_ATTRIBUTES).cast_unsigned();
    has_type
        && extension(kvm_bindings::KVM_CAP_GUEST_MEMFD) > 0
        && extension(kvm_bindings::KVM_CAP_USER_MEMORY2) > 0
        && u64::from(attributes) & u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0
}

/// A memslot that has memory for both states of its pages: a mapping of the VMM's where they are
/// shared, a guest_memfd where they are private.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Number of the memslot.
    pub slot: u32,
    /// Start, without shared bit.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address of the mapping, of `size` bytes at least.
    pub shared: u64,
    /// Where the slot begins in the guest_memfd.
    pub offset: u64,
}

/// A guest_memfd of one VM. All zero, nothing allocated until the guest touches it.
#[derive(Debug)]
pub struct GuestMemfd {
    file: OwnedFd,
}

impl GuestMemfd {
    /// Makes one of `size` bytes for the VM.
    ///
    /// # Errors
    /// The VM's type has no private memory (`EINVAL`), or the host's reason.
    pub fn new(vm: &VmFd, size: u64) -> Result<Self, GuestMemfdError> {
        let arg = kvm_create_guest_memfd { size, ..kvm_create_guest_memfd::default() };
        let fd = vm
            .create_guest_memfd(arg)
            .map_err(|error| GuestMemfdError::Create { size, source: error.into() })?;
        // SAFETY: a descriptor that was just made, and is nobody else's.
        Ok(Self { file: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Puts `slot` into the VM's memory; its pages are shared until [`set_private`].
    ///
    /// # Errors
    /// The host's reason.
    ///
    /// # Safety
    /// The mapping at [`Slot::shared`] is guest memory: it holds no Rust objects, and stays mapped for
    /// as long as the VM exists.
    pub unsafe fn add_slot(&self, vm: &VmFd, slot: &Slot) -> Result<(), GuestMemfdError> {
        let region = kvm_userspace_memory_region2 {
            slot: slot.slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: slot.gpa,
            memory_size: slot.size,
            userspace_addr: slot.shared,
            guest_memfd_offset: slot.offset,
            guest_memfd: self.file.as_raw_fd().cast_unsigned(),
            ..kvm_userspace_memory_region2::default()
        };
        // SAFETY: as promised by the caller.
        unsafe { vm.set_user_memory_region2(region) }.map_err(|error| GuestMemfdError::Slot {
            gpa: slot.gpa,
            size: slot.size,
            source: error.into(),
        })
    }

    /// Drops the contents of `size` bytes at `offset`, and gives the memory back: it reads as zero
    /// when the guest touches it next.
    ///
    /// # Errors
    /// The host's reason.
    pub fn punch(&self, offset: u64, size: u64) -> Result<(), GuestMemfdError> {
        let failed = |source| GuestMemfdError::Punch { offset, size, source };
        let whole = |value| {
            libc::off_t::try_from(value).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))
        };
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self.file.as_fd(), mode, whole(offset)?, whole(size)?)
            .map_err(|errno| failed(errno.into()))
    }
}

/// Makes `size` bytes at `gpa` private, or shared: what the guest had mapped of them is unmapped, and
/// its next touch finds the other memory of the slot.
///
/// # Errors
/// The host's reason.
pub fn set_private(vm: &VmFd, gpa: u64, size: u64, private: bool) -> Result<(), GuestMemfdError> {
    let attributes = if private { u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) } else { 0 };
    let arg = kvm_memory_attributes { address: gpa, size, attributes, flags: 0 };
    vm.set_memory_attributes(arg).map_err(|error| GuestMemfdError::Attributes {
        gpa,
        size,
        source: error.into(),
    })
}
