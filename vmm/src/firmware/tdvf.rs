//! The metadata of a TDVF image: where its parts and its memory lie in the guest.
//!
//! They are found by the table of GUIDs that ends below the reset vector (EDK2,
//! OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm and X64/IntelTdxMetadata.asm; Intel, "TDX Virtual
//! Firmware Design Guide" (344991), 11).

use std::ops::Range;

use mapgpa_abi::PAGE_SIZE;

/// The most bytes of an image: it lies below 4 GiB, and above the TSS of KVM.
pub const IMAGE_MAX: usize = 16 << 20;
/// Where an image ends in the guest's address space.
pub const IMAGE_END: u64 = 1 << 32;
/// The reset vector and what follows it: bytes between the table and the end of the image.
const RESET: usize = 0x20;
/// 96b582de-1fb2-45f7-baea-a366c55a082d: the footer of the table.
const FOOTER: [u8; 16] = [
    0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d,
];
/// e47a6535-984a-4798-865e-4685a7bf8ec2: how far the metadata lies before the end of the image.
const OFFSET: [u8; 16] = [
    0x35, 0x65, 0x7a, 0xe4, 0x4a, 0x98, 0x98, 0x47, 0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2,
];
/// An entry ends with its size and its GUID.
const ENTRY_END: usize = 18;
/// Bytes of the descriptor: signature, length, version, number of sections.
const DESCRIPTOR: usize = 16;
/// Bytes of a section.
const SECTION: usize = 32;
/// The most sections, far above what there is.
const SECTIONS_MAX: u32 = 64;

/// What a section is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Boot firmware volume: the code.
    Bfv,
    /// Configuration firmware volume: the variables.
    Cfv,
    /// Where the TD HOB list is to be.
    TdHob,
    /// Memory accepted from the start.
    TempMem,
    /// The same, to be used for good.
    PermMem,
}

/// A section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is.
    pub kind: Kind,
    /// Where its bytes are in the image; empty for memory.
    pub data: Range<usize>,
    /// GPA in bytes.
    pub gpa: u64,
    /// Size in memory in bytes.
    pub size: u64,
}

impl Section {
    /// Whether it is memory, rather than a part of the image.
    #[must_use]
    pub const fn is_memory(&self) -> bool {
        !matches!(self.kind, Kind::Bfv | Kind::Cfv)
    }
}

/// Why an image is no TDVF.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TdvfError {
    /// Its size cannot be.
    #[error("{0} bytes: expected a multiple of 4096 up to {IMAGE_MAX}")]
    Size(usize),
    /// There is no table of GUIDs.
    #[error(
        "no TDVF: there is no table of GUIDs (footer 96b582de-1fb2-45f7-baea-a366c55a082d) below the \
         reset vector: no OVMF image, or truncated"
    )]
    NoTable,
    /// The table is damaged.
    #[error("no TDVF: its table of GUIDs is damaged: {0}")]
    Table(&'static str),
    /// The table does not tell of TDX metadata.
    #[error(
        "no TDVF: an OVMF image without TDX metadata: expected one built for TDX, such as \
         OVMF.inteltdx.fd (entries found: {0})"
    )]
    NoMetadata(usize),
    /// The metadata is damaged.
    #[error("its TDX metadata is damaged: {0}")]
    Metadata(String),
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(u32_at(bytes, at)?) | u64::from(u32_at(bytes, at + 4)?) << 32)
}

/// Where an image of this size begins in the guest's address space.
#[must_use]
pub const fn image_start(size: usize) -> u64 {
    IMAGE_END - size as u64
}

/// The sections of `image`, in their order.
///
/// # Errors
/// It is no TDVF, or damaged.
pub fn sections(image: &[u8]) -> Result<Vec<Section>, TdvfError> {
    if image.is_empty()
        || image.len() > IMAGE_MAX
        || !(image.len() as u64).is_multiple_of(PAGE_SIZE)
    {
        return Err(TdvfError::Size(image.len()));
    }
    let at = metadata(image)?;
    let damaged = |what: &str| TdvfError::Metadata(what.to_owned());
    if image.get(at..at + 4) != Some(b"TDVF") {
        return Err(damaged(&format!("no signature TDVF at offset {at:#x}")));
    }
    let version = u32_at(image, at + 8).ok_or_else(|| damaged("it ends early"))?;
    let count = u32_at(image, at + 12).ok_or_else(|| damaged("it ends early"))?;
    if version != 1 {
        return Err(damaged(&format!("version {version}, expected 1")));
    }
    if !(1..=SECTIONS_MAX).contains(&count) {
        return Err(damaged(&format!("{count} sections, expected 1 to {SECTIONS_MAX}")));
    }
    let sections = (0..count as usize)
        .map(|index| {
            let section = section(image, at + DESCRIPTOR + index * SECTION);
            section.map_err(|what| damaged(&format!("section {index} {what}")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    check(&sections).map_err(|what| damaged(&what))?;
    Ok(sections)
}

/// The offset of the metadata, by the table of GUIDs.
fn metadata(image: &[u8]) -> Result<usize, TdvfError> {
    let end = image.len() - RESET;
    let entry = |end: usize| -> Option<(usize, &[u8])> {
        let size = image.get(end.checked_sub(ENTRY_END)?..end)?;
        Some((usize::from(u16::from_le_bytes([size[0], size[1]])), &size[2..]))
    };
    let (size, guid) = entry(end).ok_or(TdvfError::NoTable)?;
    if guid != FOOTER {
        return Err(TdvfError::NoTable);
    }
    let start = end.checked_sub(size).ok_or(TdvfError::Table("it is longer than the image"))?;
    let mut at = end - ENTRY_END;
    let mut entries = 0;
    while at > start {
        let (size, guid) = entry(at).ok_or(TdvfError::Table("an entry is cut off"))?;
        let data = at.checked_sub(size).filter(|data| size >= ENTRY_END && *data >= start);
        let data = data.ok_or(TdvfError::Table("an entry has an impossible size"))?;
        if guid == OFFSET {
            let back = u32_at(image, data).and_then(|back| usize::try_from(back).ok());
            return back
                .and_then(|back| image.len().checked_sub(back))
                .ok_or(TdvfError::Table("the TDX metadata would lie before the image"));
        }
        entries += 1;
        at = data;
    }
    Err(TdvfError::NoMetadata(entries))
}

/// The section that is described at `at`.
fn section(image: &[u8], at: usize) -> Result<Section, String> {
    let early = || "ends early".to_owned();
    let offset = u32_at(image, at).ok_or_else(early)? as usize;
    let raw_size = u32_at(image, at + 4).ok_or_else(early)? as usize;
    let gpa = u64_at(image, at + 8).ok_or_else(early)?;
    let size = u64_at(image, at + 16).ok_or_else(early)?;
    let kind = match u32_at(image, at + 24).ok_or_else(early)? {
        0 => Kind::Bfv,
        1 => Kind::Cfv,
        2 => Kind::TdHob,
        3 => Kind::TempMem,
        4 => Kind::PermMem,
        other => return Err(format!("is of type {other}, expected 0 to 4")),
    };
    let section = Section { kind, data: offset..offset.saturating_add(raw_size), gpa, size };
    if !(gpa | size).is_multiple_of(PAGE_SIZE) || size == 0 || gpa.checked_add(size).is_none() {
        return Err(format!("lies at {gpa:#x}, {size:#x} bytes: expected multiples of 4 KiB"));
    }
    if section.is_memory() {
        if raw_size != 0 {
            return Err("is memory, and has bytes in the image".to_owned());
        }
        if gpa + size > image_start(image.len()) {
            return Err(format!("is memory at {gpa:#x}, beyond what lies below the image"));
        }
    } else {
        if section.data.end > image.len() {
            return Err(format!(
                "has bytes up to {:#x}, the image has {:#x}: truncated",
                section.data.end,
                image.len()
            ));
        }
        let place = image_start(image.len()) + offset as u64;
        if gpa != place || size != raw_size as u64 {
            return Err(format!(
                "lies at {gpa:#x}, expected {place:#x}, where the image has it: truncated?"
            ));
        }
    }
    Ok(section)
}

/// Checks sections against each other.
fn check(sections: &[Section]) -> Result<(), String> {
    let count = |kind| sections.iter().filter(|section| section.kind == kind).count();
    if count(Kind::TdHob) != 1 {
        return Err(format!("{} sections for the TD HOB, expected 1", count(Kind::TdHob)));
    }
    if count(Kind::Bfv) != 1 || count(Kind::Cfv) > 1 {
        return Err("expected one section of code and at most one of variables".to_owned());
    }
    let mut by_place: Vec<_> = sections.iter().collect();
    by_place.sort_by_key(|section| section.gpa);
    let overlap = by_place.windows(2).find(|pair| pair[0].gpa + pair[0].size > pair[1].gpa);
    match overlap {
        Some(pair) => Err(format!("two sections overlap at {:#x}", pair[1].gpa)),
        None => Ok(()),
    }
}
