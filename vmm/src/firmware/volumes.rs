//! Firmware volumes: which of them runs in place, and what the compressed one holds.
//!
//! UEFI Platform Initialization 1.8, vol. 3, 2 and 3; EDK2 MdePkg/Include/Pi/PiFirmwareVolume.h and
//! PiFirmwareFile.h. No crate on crates.io reads compressed sections (td-shim-interface does not).

use std::io::{self, Read};
use std::ops::Range;

use lzma_rust2::LzmaReader;

/// Bytes of a volume's header before its block map.
const HEADER: usize = 0x38;
/// EE4E5898-3914-4259-9D6E-DC7BD79403CF: a section that LZMA has compressed.
const LZMA: [u8; 16] = [
    0x98, 0x58, 0x4e, 0xee, 0x14, 0x39, 0x59, 0x42, 0x9d, 0x6e, 0xdc, 0x7b, 0xd7, 0x94, 0x03, 0xcf,
];
/// EFI_SECTION_GUID_DEFINED.
const GUID_DEFINED: u8 = 2;
/// The most bytes of what is decompressed, and of memory for it (in KiB).
const DECOMPRESSED_MAX: u64 = 256 << 20;
const LZMA_MEMORY_KIB: u32 = 256 << 10;

/// What is wrong with the volumes of an image.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// There is no volume where one has to be.
    #[error("no firmware volume (_FVH) at offset {0:#x}")]
    NoVolume(usize),
    /// A volume is longer than what it lies in.
    #[error(
        "the firmware volume at offset {at:#x} has {size:#x} bytes, and {room:#x} are there: truncated"
    )]
    Truncated {
        /// Offset in the image.
        at: usize,
        /// Its size.
        size: u64,
        /// What is there.
        room: usize,
    },
    /// No file has a compressed section.
    #[error("no LZMA-compressed section in its firmware volumes")]
    NotCompressed,
    /// The section cannot be decompressed.
    #[error("its LZMA-compressed section is damaged")]
    Corrupt(#[source] io::Error),
}

/// The volumes in `within` of `image`, one after the other.
///
/// # Errors
/// They do not fill it.
pub fn volumes(image: &[u8], within: Range<usize>) -> Result<Vec<Range<usize>>, VolumeError> {
    let mut found = Vec::new();
    let mut at = within.start;
    while at < within.end {
        let header = image.get(at..within.end).unwrap_or_default();
        let size = header.get(0x20..0x28).and_then(|bytes| bytes.try_into().ok());
        let size = size.map_or(0, u64::from_le_bytes);
        if header.get(0x28..0x2c) != Some(b"_FVH") || size < HEADER as u64 {
            return Err(VolumeError::NoVolume(at));
        }
        let room = within.end - at;
        let fits = usize::try_from(size).ok().filter(|size| *size <= room);
        let size = fits.ok_or(VolumeError::Truncated { at, size, room })?;
        found.push(at..at + size);
        at += size;
    }
    Ok(found)
}

/// What the first compressed section in `volume` holds; nothing if there is none.
///
/// # Errors
/// It is damaged.
pub fn decompress(volume: &[u8]) -> Result<Option<Vec<u8>>, VolumeError> {
    let Some(section) = files(volume).find_map(|file| compressed(&volume[file])) else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    let reader = LzmaReader::new_mem_limit(section, LZMA_MEMORY_KIB, None);
    reader
        .and_then(|reader| reader.take(DECOMPRESSED_MAX).read_to_end(&mut bytes))
        .map_err(VolumeError::Corrupt)?;
    Ok(Some(bytes))
}

/// The contents of each file of a volume.
fn files(volume: &[u8]) -> impl Iterator<Item = Range<usize>> + '_ {
    let half = |at: usize| {
        volume
            .get(at..at + 2)
            .map_or(0, |bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    };
    // Where there is an extended header, a pad file around it is the first.
    let mut at = half(0x30);
    std::iter::from_fn(move || {
        at = at.next_multiple_of(8);
        let size = u24(volume, at + 20)?;
        // FFS_ATTRIB_LARGE_FILE: the size follows the header.
        let large = volume.get(at + 19)? & 1 != 0;
        let header = if large { 32 } else { 24 };
        let size = if large {
            let bytes = volume.get(at + 24..at + 32)?.try_into().ok()?;
            usize::try_from(u64::from_le_bytes(bytes)).ok()?
        } else {
            size
        };
        let end = at.checked_add(size)?;
        // Free space is all ones.
        if size < header || end > volume.len() {
            return None;
        }
        let file = at + header..end;
        at = end;
        Some(file)
    })
}

/// The data of the first section of a file that is compressed by LZMA.
fn compressed(file: &[u8]) -> Option<&[u8]> {
    let mut at = 0usize;
    loop {
        at = at.next_multiple_of(4);
        let short = u24(file, at)?;
        let (header, size) = if short == 0xff_ffff {
            let bytes = file.get(at + 4..at + 8)?.try_into().ok()?;
            (8, u32::from_le_bytes(bytes) as usize)
        } else {
            (4, short)
        };
        let section = file.get(at..at.checked_add(size)?).filter(|_| size >= header)?;
        let guid = section.get(header..header + 16);
        if section[3] == GUID_DEFINED && guid == Some(&LZMA) {
            let offset = section.get(header + 16..header + 18)?;
            return section.get(usize::from(u16::from_le_bytes([offset[0], offset[1]]))..);
        }
        at += size;
    }
}

fn u24(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(3)?)?;
    Some(usize::from(bytes[0]) | usize::from(bytes[1]) << 8 | usize::from(bytes[2]) << 16)
}
