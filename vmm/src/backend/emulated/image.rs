//! A guest's ELF image: checked, loaded, and its TDCALL instructions replaced by port writes.

use mapgpa_abi::layout::{IMAGE_END, IMAGE_START, NOTE_NAME, NOTE_VECTORS, VECTOR_SIZE, VECTORS};
use mapgpa_abi::{PAGE_SIZE, PAGE_SIZE_1G};
use object::LittleEndian;
use object::elf::{EM_X86_64, ET_EXEC, FileHeader64, PF_X, PT_INTERP, PT_LOAD, ProgramHeader64};
use object::read::elf::{FileHeader, ProgramHeader};

use super::memory::{Ram, SetupError};
use crate::pagemap::Pages;
use crate::patch;

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not an ELF file, or a damaged one.
    #[error("not a usable ELF file")]
    Malformed(#[from] object::Error),
    /// An ELF file that is no bare-metal x86-64 program.
    #[error(
        "expected a 64-bit x86-64 ELF executable, linked statically and not position-independent: it is {0}"
    )]
    Kind(&'static str),
    /// A segment lies where it cannot be.
    #[error(
        "a segment of {size} bytes at {start:#x}: expected segments between {IMAGE_START:#x} and {IMAGE_END:#x}"
    )]
    Placement {
        /// Its address.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The entry point is not in executable memory.
    #[error("its entry point {0:#x} is in no executable segment")]
    Entry(u64),
    /// The note of the exception entry points is not as it should be.
    #[error(
        "its note `mapgpa` gives no address of exception entry points within an executable segment"
    )]
    Note,
    /// It cannot be loaded.
    #[error(transparent)]
    Load(#[from] SetupError),
}

/// A loaded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) struct Image {
    /// Address of the first instruction.
    pub(in crate::backend) entry: u64,
    /// Address of the exception entry points, if it has any.
    pub(in crate::backend) vectors: Option<u64>,
    /// How many TDCALL instructions were replaced.
    pub(in crate::backend) tdcalls: u64,
}

type Segment = ProgramHeader64<LittleEndian>;

/// What becomes of TDCALL instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) enum Tdcalls {
    /// They are replaced: there is no TDX module.
    Replaced,
    /// They stay: the guest is a real TD.
    Kept,
}

/// Loads the ELF file `elf` into `ram`.
///
/// # Errors
/// The file is not one that can run here.
pub(in crate::backend) fn load(
    elf: &[u8],
    ram: &Ram,
    tdcalls: Tdcalls,
) -> Result<Image, ImageError> {
    let header = FileHeader64::<LittleEndian>::parse(elf)?;
    let endian = header.endian()?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(ImageError::Kind("for another machine"));
    }
    if header.e_type(endian) != ET_EXEC {
        return Err(ImageError::Kind("position-independent, a library, or an object file"));
    }
    let segments = header.program_headers(endian, elf)?;
    if segments.iter().any(|segment| segment.p_type(endian) == PT_INTERP) {
        return Err(ImageError::Kind("linked dynamically"));
    }
    let mut image = Image { entry: header.e_entry(endian), vectors: None, tdcalls: 0 };
    for segment in segments {
        if segment.p_type(endian) == PT_LOAD {
            image.tdcalls += load_segment(segment, elf, ram, tdcalls)?;
        } else if let Some(address) = vectors(segment, elf)? {
            image.vectors = Some(address);
        }
    }
    if !is_code(segments, image.entry, 1) {
        return Err(ImageError::Entry(image.entry));
    }
    if image.vectors.is_some_and(|at| !is_code(segments, at, VECTORS * VECTOR_SIZE)) {
        return Err(ImageError::Note);
    }
    Ok(image)
}

/// Loads a segment; returns how many TDCALL instructions were replaced in it.
fn load_segment(
    segment: &Segment,
    elf: &[u8],
    ram: &Ram,
    tdcalls: Tdcalls,
) -> Result<u64, ImageError> {
    let (start, size) = (segment.p_vaddr(LittleEndian), segment.p_memsz(LittleEndian));
    if size == 0 {
        // Linkers leave segments of empty sections, at any address.
        return Ok(0);
    }
    // The second comparison also keeps the sum in the third from overflowing.
    if start < IMAGE_START || size > PAGE_SIZE_1G || start > IMAGE_END || start + size > IMAGE_END {
        return Err(ImageError::Placement { start, size });
    }
    let bytes = segment
        .data(LittleEndian, elf)
        .map_err(|()| ImageError::Kind("shorter than its program headers say"))?;
    if bytes.len() as u64 > size {
        return Err(ImageError::Kind("inconsistent about the size of a segment"));
    }
    let first = start / PAGE_SIZE;
    ram.populate(Pages { first, count: (start + size).div_ceil(PAGE_SIZE) - first });
    if !is_executable(segment) || tdcalls == Tdcalls::Kept {
        ram.write(start, bytes)?;
        return Ok(0);
    }
    let mut code = bytes.to_vec();
    let patched = patch::patch(&mut code);
    ram.write(start, &code)?;
    Ok(patched.sites)
}

/// The address in the note of the exception entry points, if the segment has that note.
fn vectors(segment: &Segment, elf: &[u8]) -> Result<Option<u64>, ImageError> {
    let Some(mut notes) = segment.notes(LittleEndian, elf)? else { return Ok(None) };
    while let Some(note) = notes.next()? {
        if note.name_bytes() == NOTE_NAME && note.n_type(LittleEndian).0 == NOTE_VECTORS {
            let address = note.desc().try_into().map_err(|_| ImageError::Note)?;
            return Ok(Some(u64::from_le_bytes(address)));
        }
    }
    Ok(None)
}

fn is_executable(segment: &Segment) -> bool {
    segment.p_flags(LittleEndian) & PF_X == PF_X
}

/// Whether `size` bytes at `address` lie in an executable segment.
fn is_code(segments: &[Segment], address: u64, size: u64) -> bool {
    segments.iter().any(|segment| {
        let start = segment.p_vaddr(LittleEndian);
        segment.p_type(LittleEndian) == PT_LOAD
            && is_executable(segment)
            && address
                .checked_sub(start)
                .is_some_and(|offset| offset.saturating_add(size) <= segment.p_memsz(LittleEndian))
    })
}
