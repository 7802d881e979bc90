//! What a kernel finds in memory when it starts, by the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst): boot parameters, memory map, command line, initrd, ACPI
//! tables, identity page tables, GDT. Plain bytes and addresses; the backend writes them.

use linux_loader::loader::Cmdline;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use mapgpa_abi::layout::{HOLE_END, HOLE_START};
use vm_memory::ByteValued;

use super::acpi;
use super::image::{Kernel, Segment};
use crate::units::show_size;

/// GPA of the GDT.
const GDT: u64 = 0x6000;
/// GPA of the boot parameters ("zero page").
const ZERO_PAGE: u64 = 0x7000;
/// RSP at the entry point; the kernel sets its own at once.
const STACK_TOP: u64 = 0x9000;
/// GPA of the top page table; the others follow.
const PAGE_TABLES: u64 = 0x9000;
/// GPA of the command line.
const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its final 0: COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h.
const CMDLINE_SIZE: usize = 2048;
/// The end of low memory, as BIOSes have it: what follows was theirs.
const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Where kernels may lie and all memory above is free.
const HIGH_MEMORY: u64 = 0x10_0000;
/// The highest address of an initrd: 2 GiB, which every kernel can reach.
const INITRD_END: u64 = 0x7fff_f000;
/// What a kernel needs beside its image and its initrd, unpacked: measured with 6.12 and 7.3, whose
/// swiotlb of 64 MiB is most of it.
const KERNEL_NEEDS: u64 = 160 << 20;

/// Selector of the 64-bit code segment.
pub const CODE: u16 = 0x10;
/// Selector of the data segment.
pub const DATA: u16 = 0x18;

/// Why a kernel cannot be put into memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BootError {
    /// Not enough memory for kernel and initrd.
    #[error(
        "--memory {}: the kernel ({} MiB) and the initrd ({} MiB) need --memory {} or more",
        show_size(*memory), kernel >> 20, initrd >> 20, show_size(*needs)
    )]
    Memory {
        /// Bytes of memory.
        memory: u64,
        /// Bytes of the kernel in memory.
        kernel: u64,
        /// Bytes of the initrd.
        initrd: u64,
        /// Bytes of memory that would do, a multiple of 64 MiB.
        needs: u64,
    },
    /// The initrd does not fit between the kernel and the highest address it can have.
    #[error(
        "the initrd of {} MiB is too large: there is room for {} MiB below 2 GiB", size >> 20, room >> 20
    )]
    Initrd {
        /// Bytes of the initrd.
        size: u64,
        /// Bytes of room.
        room: u64,
    },
    /// A kernel that wants to lie where the boot data is.
    #[error("the kernel wants to lie at {0:#x}, below 1 MiB, where its boot data is")]
    Placement(u64),
    /// A command line that cannot be passed on.
    #[error("--cmdline: {0}")]
    Cmdline(String),
}

/// A kernel ready to be loaded.
#[derive(Debug)]
pub struct Boot<'a> {
    /// What is written where, by GPA, in order of writing.
    pub writes: Vec<(u64, std::borrow::Cow<'a, [u8]>)>,
    /// The kernel's segments, whose bytes are to be patched on the way.
    pub segments: &'a [Segment],
    /// RIP.
    pub entry: u64,
    /// RSI.
    pub zero_page: u64,
    /// RSP.
    pub stack: u64,
    /// CR3.
    pub page_tables: u64,
    /// GPA and limit of the GDT.
    pub gdt: (u64, u16),
}

/// What is asked of a boot.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The initrd's bytes.
    pub initrd: &'a [u8],
    /// The command line.
    pub cmdline: &'a str,
    /// Bytes of memory, with the hole of `abi::layout`.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u8,
}

/// Lays a kernel out in memory.
///
/// # Errors
/// It does not fit, or the command line cannot be passed on.
pub fn plan<'a>(wanted: Wanted<'a>) -> Result<Boot<'a>, BootError> {
    let Wanted { kernel, initrd, cmdline, memory, vcpus } = wanted;
    let low_end = memory.min(HOLE_START);
    if let Some(segment) = kernel.segments.iter().find(|segment| segment.address < HIGH_MEMORY) {
        return Err(BootError::Placement(segment.address));
    }
    let ends = kernel.segments.iter().map(|segment| segment.address + segment.size);
    let kernel_end = ends.max().unwrap_or(HIGH_MEMORY);
    let initrd_size = initrd.len() as u64;
    let needs = (kernel_end + 2 * initrd_size + KERNEL_NEEDS).next_multiple_of(64 << 20);
    if needs > memory {
        let kernel = kernel_end - HIGH_MEMORY;
        return Err(BootError::Memory { memory, kernel, initrd: initrd_size, needs });
    }
    let initrd_end = low_end.min(INITRD_END);
    let room = initrd_end - kernel_end.min(initrd_end);
    let initrd_at = initrd_end.saturating_sub(initrd_size) & !0xfff;
    if initrd_at < kernel_end {
        return Err(BootError::Initrd { size: initrd_size, room });
    }
    let cmdline = command_line(cmdline)?;
    let params = boot_parameters(cmdline.len(), (initrd_at, initrd_size), memory);
    let writes = vec![
        (GDT, gdt().into()),
        (ZERO_PAGE, params.as_slice().to_vec().into()),
        (PAGE_TABLES, page_tables().into()),
        (CMDLINE, cmdline.into()),
        (acpi::BASE, acpi::tables(vcpus).into()),
        (initrd_at, initrd.into()),
    ];
    Ok(Boot {
        writes,
        segments: &kernel.segments,
        entry: kernel.entry,
        zero_page: ZERO_PAGE,
        stack: STACK_TOP,
        page_tables: PAGE_TABLES,
        gdt: (GDT, 4 * 8 - 1),
    })
}

/// The command line with its final 0.
fn command_line(text: &str) -> Result<Vec<u8>, BootError> {
    let error = |error: linux_loader::cmdline::Error| BootError::Cmdline(error.to_string());
    if text.chars().any(|c| !matches!(c, ' '..='~')) {
        return Err(error(linux_loader::cmdline::Error::InvalidAscii));
    }
    let cmdline = Cmdline::try_from(text, CMDLINE_SIZE).map_err(error)?;
    Ok(cmdline.as_cstring().map_err(error)?.into_bytes_with_nul())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "addresses below 4 GiB, and a size below 2 KiB"
)]
fn boot_parameters(cmdline: usize, initrd: (u64, u64), memory: u64) -> boot_params {
    let mut params = boot_params::default();
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.version = 0x20f;
    // A boot loader without a number of its own; the kernel is loaded high.
    params.hdr.type_of_loader = 0xff;
    params.hdr.loadflags = 1;
    // Normal text mode, which nothing shows.
    params.hdr.vid_mode = 0xffff;
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline as u32 - 1;
    if initrd.1 > 0 {
        params.hdr.ramdisk_image = initrd.0 as u32;
        params.hdr.ramdisk_size = initrd.1 as u32;
    }
    params.acpi_rsdp_addr = acpi::BASE;
    let map = memory_map(memory);
    params.e820_entries = map.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = entry;
    }
    params
}

/// The memory map: RAM (1), reserved (2), and ACPI tables (3). Of what is merely reserved a TDX guest
/// believes that the host shares it; ACPI tables it reads as private memory (arch/x86/mm/ioremap.c).
fn memory_map(memory: u64) -> Vec<boot_e820_entry> {
    let low_end = memory.min(HOLE_START);
    let mut map = vec![
        (0, LOW_MEMORY_END, 1),
        (LOW_MEMORY_END, 0xa_0000, 2),
        (acpi::BASE, HIGH_MEMORY, 3),
        (HIGH_MEMORY, low_end, 1),
    ];
    if memory > HOLE_START {
        map.push((HOLE_END, HOLE_END + memory - HOLE_START, 1));
    }
    map.into_iter()
        .map(|(start, end, type_)| boot_e820_entry {
            addr: start,
            size: end - start,
            r#type: type_,
        })
        .collect()
}

/// The first 4 GiB at their own addresses, in pages of 2 MiB.
fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 0x1000;
    let mut tables = vec![0u64; 6 * 512];
    tables[0] = (PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    for directory in 0..4 {
        tables[512 + directory] = (PAGE_TABLES + (2 + directory as u64) * PAGE) | PRESENT_WRITABLE;
    }
    for (number, entry) in (0..).zip(&mut tables[1024..]) {
        *entry = number << 21 | LARGE | PRESENT_WRITABLE;
    }
    tables.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// Null, null, flat 64-bit code at [`CODE`], flat data at [`DATA`] (Intel SDM 3A, 3.4.5).
fn gdt() -> Vec<u8> {
    [0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Kernel {
        let segment = Segment { address: 16 << 20, size: 40 << 20, file: 0..0, executable: true };
        Kernel { elf: Vec::new(), segments: vec![segment], entry: 16 << 20, version: None }
    }

    fn try_plan(initrd: usize, cmdline: &str, memory: u64) -> Result<u64, BootError> {
        let (kernel, initrd) = (kernel(), vec![0; initrd]);
        let wanted = Wanted { kernel: &kernel, initrd: &initrd, cmdline, memory, vcpus: 1 };
        plan(wanted).map(|boot| boot.writes.last().map_or(0, |(gpa, _)| *gpa))
    }

    #[test]
    fn the_initrd_lies_high_and_whole() {
        assert_eq!(try_plan(0x1800, "", 512 << 20), Ok((512 << 20) - 0x2000));
        assert_eq!(try_plan(0x1000, "", 8 << 30), Ok(INITRD_END - 0x1000));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = try_plan(200 << 20, "", 512 << 20).expect_err("too large");
        assert_eq!(
            error.to_string(),
            "--memory 512M: the kernel (55 MiB) and the initrd (200 MiB) need --memory 640M or more"
        );
        let mut kernel = kernel();
        kernel.segments[0].address = 0x8000;
        let wanted =
            Wanted { kernel: &kernel, initrd: &[], cmdline: "", memory: 1 << 30, vcpus: 1 };
        assert_eq!(plan(wanted).map(|_| ()), Err(BootError::Placement(0x8000)));
        assert!(matches!(try_plan(0, &"x".repeat(2048), 1 << 30), Err(BootError::Cmdline(_))));
        assert!(matches!(try_plan(0, "a\nb", 1 << 30), Err(BootError::Cmdline(_))));
    }

    #[test]
    fn the_memory_map_has_the_hole_and_adds_up() {
        for memory in [256 << 20, 3 << 30, 4 << 30] {
            let map = memory_map(memory);
            let ram: u64 =
                map.iter().filter(|entry| entry.r#type == 1).map(|entry| entry.size).sum();
            assert_eq!(ram + (HIGH_MEMORY - LOW_MEMORY_END), memory);
        }
    }
}
