//! The ACPI tables of a kernel's machine: the least with which generic and cloud kernels from 6.1 on
//! find their CPUs, the power-off and the PM timer. One path for all: cloud kernels read no MP table.

use std::ops::Range;

use acpi_tables::aml::{self, Name, Package, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, fadt};

/// Where the tables lie: in what the memory map calls reserved below 1 MiB.
pub const BASE: u64 = 0xe_0000;
/// Port of the PM1 event block, 4 bytes: status and enable.
pub const PM1_EVENT: u16 = 0x600;
/// Port of the PM1 control block, 2 bytes.
pub const PM1_CONTROL: u16 = 0x604;
/// Port of the PM timer, 4 bytes.
pub const PM_TIMER: u16 = 0x608;
/// The sleep type of power-off (S5) in the PM1 control block.
pub const SLEEP_OFF: u8 = 5;
/// The interrupt that ACPI would raise.
const SCI: u16 = 9;
/// A latency that says: no such C state (ACPI 6.5, table 5.9).
const NO_C_STATE: u16 = 0xfff;

const OEM: [u8; 6] = *b"MAPGPA";
const OEM_TABLE: [u8; 8] = *b"EMULATED";
const LOCAL_APIC: u32 = 0xfee0_0000;

/// Tables in one piece, the RSDP first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// The tables.
    pub bytes: Vec<u8>,
    /// Where addresses of 8 bytes are in them, each of another table.
    pub pointers: Vec<usize>,
    /// Checksums that addresses go into: where each is, and the bytes that it is of.
    pub checksums: Vec<(usize, Range<usize>)>,
}

/// The tables of a machine with `vcpus` vCPUs, to be written at [`BASE`]. The RSDP comes first.
#[must_use]
pub fn tables(vcpus: u8) -> Vec<u8> {
    tables_at(BASE, vcpus).bytes
}

/// The same, to be written at `base`.
#[must_use]
pub fn tables_at(base: u64, vcpus: u8) -> Tables {
    let (dsdt, madt) = (dsdt(), madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    let rsdp_size = align(Rsdp::len());
    let xsdt_size = 64; // A header of 36 bytes and two entries, aligned.
    let dsdt_at = rsdp_size + xsdt_size;
    let fadt_at = dsdt_at + align(dsdt.len());
    let madt_at = fadt_at + align(fadt::FADT::len());
    let address = |at: usize| base + at as u64;
    xsdt.add_entry(address(fadt_at));
    xsdt.add_entry(address(madt_at));

    let mut bytes = vec![0; madt_at + madt.len()];
    let mut put = |at: usize, table: &[u8]| bytes[at..at + table.len()].copy_from_slice(table);
    put(0, &to_bytes(&Rsdp::new(OEM, address(rsdp_size))));
    put(rsdp_size, &to_bytes(&xsdt));
    put(dsdt_at, &dsdt);
    put(fadt_at, &to_bytes(&fadt(address(dsdt_at))));
    put(madt_at, &madt);
    // ACPI 6.5: 5.2.5.3 (RSDP), 5.2.8 (XSDT), 5.2.9 (FADT's X_DSDT), 5.2.6 (checksums).
    let table = |at: usize, size: usize| (at + 9, at..at + size);
    Tables {
        bytes,
        pointers: vec![24, rsdp_size + 36, rsdp_size + 44, fadt_at + 140],
        checksums: vec![
            (8, 0..20),
            (32, 0..Rsdp::len()),
            table(rsdp_size, 52),
            table(fadt_at, fadt::FADT::len()),
        ],
    }
}

const fn align(size: usize) -> usize {
    size.next_multiple_of(16)
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The DSDT: how to power off.
fn dsdt() -> Vec<u8> {
    let (off, zero) = (SLEEP_OFF, aml::ZERO);
    let package = Package::new(vec![&off, &off, &zero, &zero]);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, 1);
    dsdt.append_slice(&to_bytes(&Name::new(Path::new("_S5_"), &package)));
    dsdt.as_slice().to_vec()
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    to_bytes(&madt)
}

fn fadt(dsdt: u64) -> fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.sci_int = SCI.into();
    (fadt.pm1a_evt_blk, fadt.pm1_evt_len) = (u32::from(PM1_EVENT).into(), 4);
    (fadt.pm1a_cnt_blk, fadt.pm1_cnt_len) = (u32::from(PM1_CONTROL).into(), 2);
    (fadt.pm_tmr_blk, fadt.pm_tmr_len) = (u32::from(PM_TIMER).into(), 4);
    fadt.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, PM1_EVENT);
    fadt.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, PM1_CONTROL);
    fadt.x_pm_tmr_blk = port(32, AccessSize::DwordAccess, PM_TIMER);
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (NO_C_STATE.into(), NO_C_STATE.into());
    // Legacy devices (the serial port), but no keyboard controller to look for.
    fadt.iapc_boot_arch = 1.into();
    fadt.finalize()
}

fn port(bits: u8, access: AccessSize, port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> usize {
        let value = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        usize::try_from(value).expect("small")
    }

    /// The table at an address, by its own length.
    fn table(bytes: &[u8], address: usize) -> &[u8] {
        let base = usize::try_from(BASE).expect("small");
        let rest = &bytes[address - base..];
        let size = u32::from_le_bytes(rest[4..8].try_into().expect("4 bytes"));
        &rest[..size as usize]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_tables_hang_together_and_their_checksums_are_right() {
        for vcpus in [1, 2, 64, 255] {
            let bytes = tables(vcpus);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let xsdt = table(&bytes, u64_at(&bytes, 24));
            assert_eq!((&xsdt[..4], xsdt.len(), sum(xsdt)), (&b"XSDT"[..], 52, 0));
            let fadt = table(&bytes, u64_at(xsdt, 36));
            assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
            let madt = table(&bytes, u64_at(xsdt, 44));
            assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
            assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus));
            let dsdt = table(&bytes, u64_at(fadt, 140));
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            assert!(memchr::memmem::find(dsdt, b"_S5_").is_some());
            assert!(bytes.len() < 0x2_0000, "ends below 1 MiB");
        }
    }
}
