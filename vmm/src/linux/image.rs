//! A kernel image as distributions ship it: bzImage or vmlinux in, a checked 64-bit ELF out.
//!
//! The decompressor in a bzImage is not run: the kernel in its payload is what has to be rewritten
//! ([`crate::patch`]) before it starts.

use std::io;
use std::ops::Range;

use object::LittleEndian;
use object::elf::{EM_386, EM_AARCH64, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PF_X, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};

use super::compression::Compression;
use crate::patch::{self, Patched};

/// The most bytes of an image, compressed or not; a vmlinux with all debug information has less.
pub const IMAGE_MAX: usize = 2 << 30;
/// The most bytes of a compressed kernel when decompressed.
const PAYLOAD_MAX: usize = 512 << 20;
/// The end of the address space in which a kernel may want to lie, in bytes.
const ADDRESS_MAX: u64 = 1 << 40;

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Neither bzImage nor ELF.
    #[error("not a Linux kernel: neither a bzImage nor an ELF file (vmlinux)")]
    NotKernel,
    /// The file ends before what its headers announce.
    #[error("truncated: its headers announce {needs} bytes, the file has {has}")]
    Truncated {
        /// Bytes announced.
        needs: u64,
        /// Bytes there are.
        has: u64,
    },
    /// The payload cannot be decompressed.
    #[error("corrupt: its {compression} payload cannot be decompressed")]
    Corrupt {
        /// The compression, by name.
        compression: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A payload in no compression that we know.
    #[error("its payload begins with {0:02x?}, which is no compression that kernels use")]
    Compression(Vec<u8>),
    /// The ELF file is damaged.
    #[error("its ELF headers are damaged")]
    Elf(#[from] object::Error),
    /// The ELF file contradicts itself.
    #[error("its ELF headers are damaged: {0}")]
    Segment(&'static str),
    /// A 32-bit kernel.
    #[error("a 32-bit kernel: a TDX guest is a 64-bit one (CONFIG_64BIT)")]
    ThirtyTwoBit,
    /// A kernel of another machine.
    #[error("a kernel for {0}: a TDX guest is an x86-64 one")]
    Machine(&'static str),
    /// Too large to be one.
    #[error("larger than any kernel: {0} bytes, expected at most {IMAGE_MAX}")]
    TooLarge(usize),
    /// A bzImage from before 2008, without the place of its payload.
    #[error("a bzImage of boot protocol {:#x}: expected 0x208 or later (Linux 2.6.26)", .0)]
    OldProtocol(u16),
    /// Firmware cannot boot it.
    #[error("no bzImage with an EFI stub (CONFIG_EFI_STUB), which --firmware needs")]
    NoEfiStub,
    /// Its boot code is not as expected.
    #[error("its boot code has no `jmp *%rax`, by which the kernel in its payload is reached")]
    NoJump,
    /// It cannot be a TDX guest.
    #[error("no TDCALL site: built without CONFIG_INTEL_TDX_GUEST")]
    NoSites,
}

/// A part of the kernel that is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Physical address, in bytes.
    pub address: u64,
    /// Bytes in memory; what the file does not have is zero.
    pub size: u64,
    /// Where its bytes are in [`Kernel::elf`].
    pub file: Range<usize>,
    /// Instructions are in it.
    pub executable: bool,
}

/// A kernel that could be loaded.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The ELF file.
    pub elf: Vec<u8>,
    /// What is loaded of it.
    pub segments: Vec<Segment>,
    /// Physical address of the 64-bit entry point.
    pub entry: u64,
    /// Its release (`uname -r`), if it says so.
    pub version: Option<String>,
}

impl Kernel {
    /// The kernel in the bytes of a file: a bzImage, a vmlinux, or a compressed vmlinux.
    ///
    /// # Errors
    /// It is not one, or it is damaged, or not for x86-64.
    pub fn of_file(bytes: Vec<u8>) -> Result<Self, KernelError> {
        if bytes.len() > IMAGE_MAX {
            return Err(KernelError::TooLarge(bytes.len()));
        }
        if let Some(payload) = bzimage_payload(&bytes)? {
            return Self::of_payload(&bytes[payload]);
        }
        if is_elf(&bytes) {
            return Self::of_elf(bytes);
        }
        other_machine(&bytes)?;
        match Compression::of(&bytes) {
            Some(_) => Self::of_payload(&bytes),
            None => Err(KernelError::NotKernel),
        }
    }

    /// Replaces the TDCALLs in what is loaded of it.
    pub fn patch(&mut self) -> Patched {
        let mut patched = Patched::default();
        for segment in self.segments.iter().filter(|segment| segment.executable) {
            if let Some(code) = self.elf.get_mut(segment.file.clone()) {
                patched = patched.and(patch::patch(code));
            }
        }
        patched
    }

    fn of_payload(payload: &[u8]) -> Result<Self, KernelError> {
        // CONFIG_KERNEL_UNCOMPRESSED
        if is_elf(payload) {
            return Self::of_elf(payload.to_vec());
        }
        let compression = Compression::of(payload)
            .ok_or_else(|| KernelError::Compression(payload.iter().copied().take(6).collect()))?;
        let elf = compression
            .decompress(payload, PAYLOAD_MAX)
            .map_err(|source| KernelError::Corrupt { compression: compression.name(), source })?;
        other_machine(&elf)?;
        if !is_elf(&elf) {
            return Err(KernelError::NotKernel);
        }
        Self::of_elf(elf)
    }

    fn of_elf(elf: Vec<u8>) -> Result<Self, KernelError> {
        // Offsets of the ELF header: class 4, e_machine 18.
        let machine = elf.get(18..20).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
        if elf.get(4) == Some(&1) || machine == Some(EM_386.0) {
            return Err(KernelError::ThirtyTwoBit);
        }
        if machine == Some(EM_AARCH64.0) {
            return Err(KernelError::Machine("arm64"));
        }
        let header = FileHeader64::<LittleEndian>::parse(&*elf)?;
        let endian = header.endian()?;
        if header.e_machine(endian) != EM_X86_64 {
            return Err(KernelError::Machine("another machine"));
        }
        if !matches!(header.e_type(endian), ET_EXEC | ET_DYN) {
            return Err(KernelError::Segment("it is an object file or a core dump"));
        }
        let has = elf.len() as u64;
        let mut segments = Vec::new();
        for header in header.program_headers(endian, &*elf)? {
            if header.p_type(endian) != PT_LOAD || header.p_memsz(endian) == 0 {
                continue;
            }
            let (offset, filled) = (header.p_offset(endian), header.p_filesz(endian));
            let (address, size) = (header.p_paddr(endian), header.p_memsz(endian));
            let needs = offset.saturating_add(filled);
            if needs > has {
                return Err(KernelError::Truncated { needs, has });
            }
            if filled > size || address.saturating_add(size) > ADDRESS_MAX {
                return Err(KernelError::Segment("a segment is larger or higher than can be"));
            }
            let file = |at: u64| {
                usize::try_from(at).map_err(|_| KernelError::Segment("a segment is too large"))
            };
            segments.push(Segment {
                address,
                size,
                file: file(offset)?..file(needs)?,
                executable: header.p_flags(endian) & PF_X == PF_X,
            });
        }
        let entry = header.e_entry(endian);
        let has_entry = |segment: &&mut Segment| {
            entry.checked_sub(segment.address).is_some_and(|at| at < segment.size)
        };
        match segments.iter_mut().find(has_entry) {
            // From 7.x on the code that is only for booting lies among data.
            Some(segment) => segment.executable = true,
            None => return Err(KernelError::Segment("its entry point is in no segment")),
        }
        let version = version(&elf);
        Ok(Self { elf, segments, entry, version })
    }
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Where the payload of a bzImage is; nothing if it is none (Documentation/arch/x86/boot.rst).
pub(crate) fn bzimage_payload(bytes: &[u8]) -> Result<Option<Range<usize>>, KernelError> {
    let u16_at = |at: usize| {
        bytes.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    };
    let u32_at = |at: usize| u64::from(u16_at(at)) | u64::from(u16_at(at + 2)) << 16;
    if bytes.get(0x202..0x206) != Some(b"HdrS") {
        return Ok(None);
    }
    let protocol = u16_at(0x206);
    if protocol < 0x208 {
        return Err(KernelError::OldProtocol(protocol));
    }
    // XLF_KERNEL_64 in xloadflags, since protocol 2.12.
    if protocol >= 0x20c && u16_at(0x236) & 1 == 0 {
        return Err(KernelError::ThirtyTwoBit);
    }
    let setup_sectors = match bytes.get(0x1f1) {
        // As the protocol has it.
        Some(0) | None => 4,
        Some(sectors) => u64::from(*sectors),
    };
    let start = (setup_sectors + 1) * 512 + u32_at(0x248);
    let (needs, has) = (start + u32_at(0x24c), bytes.len() as u64);
    if needs > has || has < 0x250 {
        return Err(KernelError::Truncated { needs: needs.max(0x250), has });
    }
    match (usize::try_from(start), usize::try_from(needs)) {
        (Ok(start), Ok(end)) => Ok(Some(start..end)),
        _ => Err(KernelError::TooLarge(bytes.len())),
    }
}

/// Refuses the images of other machines that are not ELF files.
fn other_machine(bytes: &[u8]) -> Result<(), KernelError> {
    // Documentation/arch/arm64/booting.rst and arch/riscv/boot-image-header.rst
    if bytes.get(56..60) == Some(b"ARM\x64") {
        return Err(KernelError::Machine("arm64"));
    }
    if bytes.get(56..60) == Some(b"RSC\x05") {
        return Err(KernelError::Machine("RISC-V"));
    }
    // drivers/firmware/efi/libstub/zboot-header.S
    if bytes.starts_with(b"MZ") && bytes.get(4..8) == Some(b"zimg") {
        return Err(KernelError::Machine("another machine (an EFI zboot image)"));
    }
    Ok(())
}

/// The release in the banner `Linux version RELEASE (...`.
fn version(elf: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    const LONGEST: usize = 64;
    let mut from = 0;
    while let Some(at) = memchr::memmem::find(&elf[from..], BANNER) {
        from += at + BANNER.len();
        let rest = &elf[from..elf.len().min(from + LONGEST)];
        let release = rest.split(|byte| *byte == b' ').next().unwrap_or(&[]);
        // The format string "Linux version %s" is in there too.
        if release.first().is_some_and(u8::is_ascii_digit)
            && release.iter().all(u8::is_ascii_graphic)
        {
            return Some(String::from_utf8_lossy(release).into_owned());
        }
    }
    None
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
