//! What KVM does with a TDX guest's MapGPA, between the guest and user space: a pure model.
//!
//! `tdx_map_gpa()` checks the request, cuts it into chunks of 2 MiB counted from its start, exits to
//! user space with KVM_HC_MAP_GPA_RANGE for each, and turns what user space says into the guest's R10
//! and R11. A VMM on KVM sees chunks, never requests, and can say no more than `hypercall.ret` and
//! whether an event is pending. `--front-end kvm-*` puts this model before the policy; the tests'
//! simulated TDX host uses the very same one.
//!
//! Sources: Linux, arch/x86/kvm/vmx/tdx.c: `tdx_map_gpa`, `__tdx_map_gpa` and
//! `tdx_complete_vmcall_map_gpa` (2c304880835d, in 6.16); the reading of `hypercall.ret` by "KVM: TDX:
//! Allow userspace to return errors to guest for MAPGPA" (3e2dec1ede0a, in 7.2).
#![no_std]

use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::{status, sub};

/// Bytes of a chunk, TDX_MAP_GPA_MAX_LEN.
pub const CHUNK: u64 = 2 << 20;
/// `hypercall.ret` for "later": EAGAIN as a positive number.
pub const EAGAIN: u64 = 11;
/// `hypercall.ret` for "no": EINVAL as a positive number.
pub const EINVAL: u64 = 22;
/// Physical address bits of a TD as its CPUID leaf 0x80000008 has them, whatever its GPAW (TDX
/// module base specification, "CPUID virtualization": MAXPA is fixed at 52).
pub const ADDRESS_BITS: u32 = 52;

/// Kernels that read `hypercall.ret` alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// 6.16 to 7.1: any value but 0 is INVALID_OPERAND to the guest.
    V6_16,
    /// 7.2 and later: EAGAIN is RETRY, EINVAL is INVALID_OPERAND, any other makes KVM_RUN fail.
    V7_2,
}

impl Kernel {
    /// All of them, oldest first.
    pub const ALL: [Self; 2] = [Self::V6_16, Self::V7_2];

    /// Its name as a front-end.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V6_16 => "kvm-6.16",
            Self::V7_2 => "kvm-7.2",
        }
    }

    /// Which one Linux `major`.`minor` is; nothing for kernels whose KVM runs no TDs.
    #[must_use]
    pub const fn of_release(major: u32, minor: u32) -> Option<Self> {
        match (major, minor) {
            (7, 2..) | (8.., _) => Some(Self::V7_2),
            (6, 16..) | (7, _) => Some(Self::V6_16),
            _ => None,
        }
    }
}

/// What KVM knows of a TD that bears on MapGPA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Td {
    /// The kernel.
    pub kernel: Kernel,
    /// The shared bit as a mask: bit 47 or 51.
    pub shared_bit: u64,
    /// Address bits of the vCPU's CPUID as user space set it: MAXPHYADDR, 36 before KVM_SET_CPUID2.
    pub address_bits: u32,
    /// User space enabled KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE.
    pub exits: bool,
}

/// What the guest finds when its TDVMCALL returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// R10.
    pub status: u64,
    /// R11. After SUCCESS it is what the guest passed: the number of the sub-function.
    pub r11: u64,
}

/// A KVM_EXIT_HYPERCALL with `nr` KVM_HC_MAP_GPA_RANGE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// `args[0]`: GPA in bytes without the shared bit.
    pub gpa: u64,
    /// `args[1]`: number of 4 KiB pages, 1 to 512.
    pub pages: u64,
    /// `args[2]` is KVM_MAP_GPA_RANGE_ENCRYPTED (1 << 4), rather than KVM_MAP_GPA_RANGE_DECRYPTED
    /// (0): the pages are to become private.
    pub private: bool,
}

/// What KVM_RUN does when user space has answered an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Exits to user space for the next chunk.
    Exit(Exit),
    /// Enters the guest with this reply.
    Reply(Reply),
    /// Fails with EINVAL: `hypercall.ret` is a value that the kernel does not know.
    RunFails,
}

/// A request under way: a chunk of it is with user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapGpa {
    td: Td,
    next: u64,
    end: u64,
}

impl MapGpa {
    /// Takes the request with `r12` (GPA, with the shared bit) and `r13` (size in bytes).
    ///
    /// # Errors
    /// The reply that the guest gets at once, user space not being asked.
    pub const fn begin(td: Td, r12: u64, r13: u64) -> Result<Self, Reply> {
        if !td.exits {
            return Err(Reply { status: status::SUBFUNC_UNSUPPORTED, r11: r12 });
        }
        let end = r12.wrapping_add(r13);
        let last = end.wrapping_sub(1);
        let illegal = if td.address_bits >= 64 { 0 } else { !0 << td.address_bits };
        if end <= r12 || (r12 | last) & illegal != 0 || (r12 ^ last) & td.shared_bit != 0 {
            return Err(Reply { status: status::INVALID_OPERAND, r11: r12 });
        }
        if !r12.is_multiple_of(PAGE_SIZE) || !r13.is_multiple_of(PAGE_SIZE) {
            return Err(Reply { status: status::ALIGN_ERROR, r11: r12 });
        }
        Ok(Self { td, next: r12, end })
    }

    /// The chunk that is with user space.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        let left = self.end - self.next;
        let size = if left < CHUNK { left } else { CHUNK };
        Exit {
            gpa: self.next & !self.td.shared_bit,
            pages: size / PAGE_SIZE,
            private: self.next & self.td.shared_bit == 0,
        }
    }

    /// User space re-enters with `ret` in `hypercall.ret`. `pending` is kvm_vcpu_has_events(): an
    /// interrupt, an NMI or the like waits for this vCPU; it counts only between two chunks.
    pub const fn complete(&mut self, ret: u64, pending: bool) -> Step {
        let refused = match (self.td.kernel, ret) {
            (_, 0) => None,
            (Kernel::V7_2, EAGAIN) => Some(status::RETRY),
            (Kernel::V6_16, _) | (Kernel::V7_2, EINVAL) => Some(status::INVALID_OPERAND),
            (Kernel::V7_2, _) => return Step::RunFails,
        };
        if let Some(status) = refused {
            return Step::Reply(Reply { status, r11: self.next });
        }
        self.next += CHUNK;
        if self.next >= self.end {
            return Step::Reply(Reply { status: status::SUCCESS, r11: sub::MAP_GPA });
        }
        if pending {
            return Step::Reply(Reply { status: status::RETRY, r11: self.next });
        }
        Step::Exit(self.exit())
    }
}

#[cfg(test)]
mod tests;
