//! What the processor reads on the guest's behalf: GDT, IDT, TSS and page tables; for backend `tdx`, too.
//!
//! They lie in the hole of `abi::layout`, in memory of their own that only ring 0 may touch, so
//! that a guest test can neither damage nor convert them. Layout: a page with GDT and IDT, three
//! pages a vCPU with its TSS, then the page tables. Formats: Intel SDM 3A, chapters 3 to 7.
#![expect(clippy::cast_possible_truncation, reason = "fields of descriptors; a host has 64 bits")]

use mapgpa_abi::layout::{
    FAULT_STACKS, HOLE_START, MAX_VCPUS, SHARED_VA, STACK_SIZE, STACKS, VECTOR_SIZE, VECTORS,
    fault_stack_top,
};
use mapgpa_abi::{PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M};

use crate::pagemap::Pages;

/// Where the tables lie.
const BASE: u64 = HOLE_START;
/// Offset of the IDT.
const IDT: usize = 0x800;
/// Size of the IDT in bytes.
const IDT_SIZE: u16 = 16 * VECTORS as u16;
/// Offset of the first TSS.
const TSS: u64 = PAGE_SIZE;
/// Bytes from one TSS to the next.
const TSS_STRIDE: u64 = 3 * PAGE_SIZE;
/// Offset of the I/O permission bitmap in a TSS.
const TSS_BITMAP: u16 = 104;
/// Size of a TSS in bytes: the bitmap has a bit for each port, and a byte of ones after it.
const TSS_SIZE: u64 = TSS_BITMAP as u64 + 65536 / 8 + 1;

/// Selector of the code segment, at CPL 0.
const KERNEL_CODE: u16 = 2 << 3;
/// Selector of the data segment, at CPL 0.
const KERNEL_DATA: u16 = 1 << 3;
/// Selector of the code segment at CPL 3.
pub(in crate::backend) const CODE: u16 = KERNEL_CODE | 3;
/// Selector of the data segment at CPL 3.
pub(in crate::backend) const DATA: u16 = KERNEL_DATA | 3;
/// The vector of an NMI.
const NMI: usize = 2;
/// The first TSS's index in the GDT; each takes two entries.
const TSS_INDEX: u64 = 4;

/// Page table entry: present, writable, accessed, dirty; the processor has nothing to update then.
const PRESENT: u64 = 1 | 1 << 1 | 1 << 5 | 1 << 6;
/// Page table entry: CPL 3 may use it.
const USER: u64 = 1 << 2;
/// Page table entry: a 2 MiB page.
const LARGE: u64 = 1 << 7;

/// At which privilege level a guest test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) enum Level {
    /// 3, on backend `emulated`: the VMM sets the registers.
    User,
    /// 0, in a real TD: start-up code does.
    Kernel {
        /// Address of the code that takes an NMI.
        nmi: u64,
        /// What is mapped beside RAM and the tables: 2 MiB that hold the start-up code.
        startup: u64,
    },
}

impl Level {
    /// Descriptors of data, of code, and the type of a TSS: busy, or about to be loaded.
    const fn descriptors(self) -> [u64; 3] {
        match self {
            Self::User => [0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff, 0x8b],
            Self::Kernel { .. } => [0x00cf_9300_0000_ffff, 0x00af_9b00_0000_ffff, 0x89],
        }
    }

    /// An interrupt gate to `address`, on the stack of IST 1.
    const fn gate(self, address: u64) -> (u64, u64) {
        let (code, rights) = match self {
            Self::User => (CODE, 0xee),
            Self::Kernel { .. } => (KERNEL_CODE, 0x8e),
        };
        let low = address & 0xffff
            | (code as u64) << 16
            | 1 << 32
            | rights << 40
            | (address >> 16 & 0xffff) << 48;
        (low, address >> 32)
    }
}

/// The tables of a guest.
#[derive(Debug)]
pub(in crate::backend) struct Tables {
    /// Their bytes, a whole number of pages.
    pub(in crate::backend) bytes: Vec<u8>,
    /// GPA of the top-level page table.
    pub(in crate::backend) cr3: u64,
    /// Size of the IDT minus 1; 0 if the image has no exception entry points.
    pub(in crate::backend) idt_limit: u16,
}

impl Tables {
    /// Tables for `vcpus` vCPUs and the RAM regions `ram`, with the exception entry points at
    /// `vectors`.
    pub(in crate::backend) fn new(
        vcpus: u64,
        ram: impl Iterator<Item = Pages> + Clone,
        shared_bit: u64,
        vectors: Option<u64>,
        level: Level,
    ) -> Self {
        let tables_start = TSS + vcpus * TSS_STRIDE;
        let mut paging = Paging::new(BASE + tables_start);
        for region in ram {
            paging.map_region(region, shared_bit);
        }
        // The tables' own size is known only now; mapping them takes at most two more.
        let size = tables_start + (paging.tables.len() as u64 + 2) * PAGE_SIZE;
        for at in (BASE..BASE + size).step_by(PAGE_SIZE_2M as usize) {
            paging.map(at, at | PRESENT | LARGE, 2);
        }

        if let Level::Kernel { startup, .. } = level {
            paging.map(startup, startup | PRESENT | LARGE, 2);
        }

        let mut bytes = vec![0; tables_start as usize];
        let [data, code, tss_type] = level.descriptors();
        put(&mut bytes, usize::from(KERNEL_DATA), data);
        put(&mut bytes, usize::from(KERNEL_CODE), code);
        for vcpu in 0..vcpus {
            let (low, high) = tss_descriptor(tss_base(vcpu), tss_type);
            let at = usize::from(tss_selector(vcpu));
            put(&mut bytes, at, low);
            put(&mut bytes, at + 8, high);
            let tss = (tss_base(vcpu) - BASE) as usize;
            // IST 1, at offset 36.
            put(&mut bytes, tss + 36, fault_stack_top(vcpu));
            bytes[tss + 102..tss + 104].copy_from_slice(&TSS_BITMAP.to_le_bytes());
            bytes[tss + TSS_SIZE as usize - 1] = 0xff;
        }
        if let Some(vectors) = vectors {
            for vector in 0..VECTORS {
                let (low, high) = level.gate(vectors + vector * VECTOR_SIZE);
                put(&mut bytes, IDT + 16 * vector as usize, low);
                put(&mut bytes, IDT + 16 * vector as usize + 8, high);
            }
        }
        if let Level::Kernel { nmi, .. } = level {
            let (low, high) = level.gate(nmi);
            put(&mut bytes, IDT + 16 * NMI, low);
            put(&mut bytes, IDT + 16 * NMI + 8, high);
        }
        bytes.reserve(paging.tables.len() * PAGE_SIZE as usize);
        for entry in paging.tables.iter().flat_map(|table| table.iter()) {
            bytes.extend_from_slice(&entry.to_le_bytes());
        }
        let has_gates = vectors.is_some() || level != Level::User;
        let idt_limit = if has_gates { IDT_SIZE - 1 } else { 0 };
        Self { bytes, cr3: BASE + tables_start, idt_limit }
    }
}

/// GPA of the tables.
pub(in crate::backend) const fn base() -> u64 {
    BASE
}

/// Address and limit of the GDT.
pub(in crate::backend) const fn gdt() -> (u64, u16) {
    (BASE, 8 * (TSS_INDEX as u16 + 2 * MAX_VCPUS as u16) - 1)
}

/// Address of the IDT.
pub(in crate::backend) const fn idt() -> u64 {
    BASE + IDT as u64
}

/// Selector of a vCPU's TSS.
pub(in crate::backend) const fn tss_selector(vcpu: u64) -> u16 {
    ((TSS_INDEX + 2 * vcpu) << 3) as u16
}

/// Address of a vCPU's TSS.
pub(in crate::backend) const fn tss_base(vcpu: u64) -> u64 {
    BASE + TSS + vcpu * TSS_STRIDE
}

/// Limit of a TSS.
pub(in crate::backend) const fn tss_limit() -> u32 {
    TSS_SIZE as u32 - 1
}

/// The descriptor of a 64-bit TSS.
const fn tss_descriptor(base: u64, tss_type: u64) -> (u64, u64) {
    let limit = TSS_SIZE - 1;
    let low = limit & 0xffff
        | (base & 0xff_ffff) << 16
        | tss_type << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56;
    (low, base >> 32)
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Page tables under construction, the top level first.
struct Paging {
    base: u64,
    tables: Vec<[u64; 512]>,
}

impl Paging {
    fn new(base: u64) -> Self {
        Self { base, tables: vec![[0; 512]] }
    }

    /// Maps both aliases of a region, up to the end of its last GiB: an access a little beyond
    /// memory then exits with its GPA.
    fn map_region(&mut self, region: Pages, shared_bit: u64) {
        let end = (region.end() * PAGE_SIZE).next_multiple_of(PAGE_SIZE_1G);
        for gpa in (region.gpa()..end).step_by(PAGE_SIZE_2M as usize) {
            if gpa == 0 {
                self.map_low();
            } else {
                self.map(gpa, gpa | PRESENT | USER | LARGE, 2);
            }
            self.map(SHARED_VA + gpa, gpa | shared_bit | PRESENT | USER | LARGE, 2);
        }
    }

    /// The first 2 MiB by 4 KiB, without what must crash when it is touched.
    fn map_low(&mut self) {
        let stacks = STACKS..FAULT_STACKS;
        for gpa in (PAGE_SIZE..PAGE_SIZE_2M).step_by(PAGE_SIZE as usize) {
            let guard = stacks.contains(&gpa) && (gpa - STACKS).is_multiple_of(STACK_SIZE);
            if !guard {
                self.map(gpa, gpa | PRESENT | USER, 1);
            }
        }
    }

    /// Sets the entry of `level` (1: 4 KiB, 2: 2 MiB) for virtual address `va`.
    fn map(&mut self, va: u64, entry: u64, level: u32) {
        let index = |level: u32| (va >> (12 + 9 * (level - 1)) & 0x1ff) as usize;
        let mut table = 0;
        for upper in (level + 1..=4).rev() {
            let next = self.tables[table][index(upper)];
            table = if next == 0 {
                self.tables.push([0; 512]);
                let new = self.tables.len() - 1;
                let gpa = self.base + new as u64 * PAGE_SIZE;
                // What CPL 3 may do is decided at the lowest level.
                self.tables[table][index(upper)] = gpa | PRESENT | USER;
                new
            } else {
                ((next & !0xfff) - self.base) as usize / PAGE_SIZE as usize
            };
        }
        self.tables[table][index(level)] = entry;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BIT: u64 = 1 << 47;

    /// What the page tables make of a virtual address: the GPA, and whether CPL 3 may use it.
    fn walk(tables: &Tables, va: u64) -> Option<(u64, bool)> {
        let mut table = tables.cr3;
        let mut user = true;
        for level in (1..=4).rev() {
            let shift = 12 + 9 * (level - 1);
            let at = (table - BASE + (va >> shift & 0x1ff) * 8) as usize;
            let entry = u64::from_le_bytes(tables.bytes[at..at + 8].try_into().unwrap());
            if entry & 1 == 0 {
                return None;
            }
            user &= entry & USER != 0;
            let address = entry & 0x000f_ffff_ffff_f000;
            if level == 1 || entry & LARGE != 0 {
                return Some((address | va & ((1 << shift) - 1), user));
            }
            table = address;
        }
        None
    }

    fn tables() -> Tables {
        let regions = [Pages::of_bytes(0, 3 << 30), Pages::of_bytes(4 << 30, 1 << 40)];
        Tables::new(MAX_VCPUS, regions.into_iter(), BIT, Some(0x10_0000), Level::User)
    }

    #[test]
    fn both_aliases_of_all_memory_are_mapped_for_cpl_3() {
        let tables = tables();
        for gpa in [0x1000, 0x10_0008, 0x20_0000, (3 << 30) - 8, 4 << 30, (4 << 30) + (1 << 40) - 8]
        {
            assert_eq!(walk(&tables, gpa), Some((gpa, true)), "{gpa:#x}");
            assert_eq!(walk(&tables, SHARED_VA + gpa), Some((gpa | BIT, true)), "{gpa:#x}");
        }
    }

    #[test]
    fn a_real_td_runs_at_cpl_0_and_takes_an_nmi() {
        let level = Level::Kernel { nmi: 0xffff_f100, startup: 0xffe0_0000 };
        let tables = Tables::new(2, [Pages::of_bytes(0, 32 << 20)].into_iter(), BIT, None, level);
        assert_eq!(walk(&tables, 0xffff_f100), Some((0xffff_f100, false)));
        assert_eq!(walk(&tables, SHARED_VA + 0x10_0000), Some((0x10_0000 | BIT, true)));
        let word = |at: usize| u64::from_le_bytes(tables.bytes[at..at + 8].try_into().unwrap());
        let gate = word(IDT + 32);
        assert_eq!(gate & 0xffff | gate >> 32 & 0xffff_0000, 0xffff_f100);
        assert_eq!(gate >> 40 & 0xff, 0x8e, "present, DPL 0, interrupt gate");
        let tss = word(usize::from(tss_selector(1)));
        assert_eq!(tss >> 40 & 0xff, 0x89, "LTR takes a TSS that is not busy");
        assert_eq!(tables.idt_limit, IDT_SIZE - 1);
    }

    #[test]
    fn null_guards_and_tables_are_out_of_reach() {
        let tables = tables();
        assert_eq!(walk(&tables, 8), None);
        assert_eq!(walk(&tables, STACKS), None);
        assert_eq!(walk(&tables, STACKS + STACK_SIZE + 8), None);
        assert_eq!(walk(&tables, STACKS + STACK_SIZE - 8), Some((STACKS + STACK_SIZE - 8, true)));
        assert_eq!(walk(&tables, FAULT_STACKS), Some((FAULT_STACKS, true)));
        let last = BASE + tables.bytes.len() as u64 - 8;
        for at in [BASE, last] {
            assert_eq!(walk(&tables, at), Some((at, false)), "{at:#x}: ring 0 only");
            assert_eq!(walk(&tables, SHARED_VA + at), None);
        }
        assert!(last < BASE + PAGE_SIZE_1G);
    }

    #[test]
    fn the_last_tss_ends_before_the_page_tables() {
        let end = tss_base(MAX_VCPUS - 1) + u64::from(tss_limit());
        assert!(end < tables().cr3);
        assert!(usize::from(gdt().1) < IDT, "GDT and IDT share a page");
        assert!(IDT + usize::from(IDT_SIZE) <= PAGE_SIZE as usize);
    }
}
