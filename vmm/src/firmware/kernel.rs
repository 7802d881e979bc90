//! A kernel that the firmware boots as an EFI application: its boot code rewritten, and how the
//! kernel in its payload is recognised when that code jumps to it.
//!
//! The payload cannot be rewritten: its TDCALLs are replaced in memory, once it is unpacked. The
//! jump to it is a `jmp *%rax` in the boot code (arch/x86/boot/compressed/head_64.S, and the EFI
//! stub's enter_kernel in drivers/firmware/efi/libstub/x86-stub.c). Each of these becomes a port
//! write, at which the VMM jumps to RAX, and looks whether the kernel's first bytes are there. By
//! then the EFI stub has called ExitBootServices.

use mapgpa_abi::PAGE_SIZE;

use crate::linux::image::{self, Kernel, KernelError};
use crate::pagemap::Pages;
use crate::patch::{self, Patched};

/// `jmp *%rax`, and the port write that stands for it: `out JUMP_PORT, al`.
const JUMP_RAX: [u8; 2] = [0xff, 0xe0];
/// The port of the hook for `jmp *%rax`.
pub const JUMP_PORT: u16 = 0xe7;
const JUMP_RAX_HOOK: [u8; 2] = [0xe6, 0xe7];
/// Bytes by which the kernel is recognised; they refer to nothing by absolute address.
const FIRST: usize = 16;

/// The kernel in the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inner {
    /// The bytes at its entry point.
    pub first: [u8; FIRST],
    /// Its entry point, as linked.
    entry: u64,
    /// Its executable segments: address as linked, and size.
    segments: Vec<(u64, u64)>,
    /// TDCALLs in them.
    pub sites: u64,
}

impl Inner {
    /// The pages of its executable segments when its entry point is at `entry`.
    pub fn code(&self, entry: u64) -> impl Iterator<Item = Pages> + '_ {
        self.segments.iter().map(move |(address, size)| {
            let start = entry.wrapping_add(address.wrapping_sub(self.entry));
            let first = start / PAGE_SIZE;
            Pages { first, count: start.saturating_add(*size).div_ceil(PAGE_SIZE) - first }
        })
    }
}

/// What the firmware boots.
#[derive(Debug, Clone)]
pub struct Booted {
    /// The file, rewritten.
    pub image: Vec<u8>,
    /// TDCALLs and jumps replaced in its boot code.
    pub boot_code: Patched,
    /// The kernel in it.
    pub inner: Inner,
}

impl Booted {
    /// The bzImage in the bytes of a file, whose payload is `kernel`, its TDCALLs replaced, `sites`
    /// of them.
    ///
    /// # Errors
    /// It is no bzImage with an EFI stub, or its boot code is not as expected.
    pub fn new(mut image: Vec<u8>, kernel: &Kernel, sites: u64) -> Result<Self, KernelError> {
        let payload = image::bzimage_payload(&image)?.filter(|_| image.starts_with(b"MZ"));
        let payload = payload.ok_or(KernelError::NoEfiStub)?;
        let (before, rest) = image.split_at_mut(payload.start);
        let after = rest.get_mut(payload.len()..).unwrap_or_default();
        let jumps = patch::replace(after, &JUMP_RAX, &JUMP_RAX_HOOK);
        if jumps.sites == 0 {
            return Err(KernelError::NoJump);
        }
        let boot_code = patch::patch(before).and(patch::patch(after)).and(jumps);
        let segments: Vec<_> =
            kernel.segments.iter().filter(|segment| segment.executable).collect();
        let first = segments.iter().find_map(|segment| {
            let at = usize::try_from(kernel.entry.checked_sub(segment.address)?).ok()?;
            kernel.elf.get(segment.file.clone())?.get(at..at + FIRST)?.try_into().ok()
        });
        let inner = Inner {
            first: first.ok_or(KernelError::Segment("its entry point is in no segment"))?,
            entry: kernel.entry,
            segments: segments.iter().map(|segment| (segment.address, segment.size)).collect(),
            sites,
        };
        Ok(Self { image, boot_code, inner })
    }
}
