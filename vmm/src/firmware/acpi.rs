//! ACPI tables by way of fw_cfg: the tables of a kernel's machine, and the script by which OVMF puts
//! them into memory (QEMU, hw/acpi/bios-linker-loader.c; EDK2, OvmfPkg/AcpiPlatformDxe).

use super::fw_cfg::FwCfg;
use crate::linux::acpi;

/// The script's name, by which OVMF looks for it.
pub const SCRIPT: &str = "etc/table-loader";
/// The other files' names, which the script refers to.
const TABLES: &str = "etc/acpi/tables";
const LARGE: &str = "etc/mapgpa/large";
/// Bytes of a command, and of a file's name in it.
const COMMAND: usize = 128;
const NAME: usize = 56;
/// Commands.
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Allocation anywhere below 4 GiB.
const ZONE_HIGH: u8 = 1;

/// Puts the tables of a machine with one vCPU into `device`. With `large` there is a file of so many
/// bytes more, which the firmware reads in one DMA and does not use.
pub fn add(device: &mut FwCfg, large: Option<usize>) {
    let mut tables = acpi::tables_at(0, 1);
    for (at, _) in &tables.checksums {
        // It is worked out over itself.
        tables.bytes[*at] = 0;
    }
    let mut script = Vec::new();
    allocate(&mut script, TABLES, 64);
    for at in &tables.pointers {
        let mut command = [0; COMMAND];
        command[..4].copy_from_slice(&ADD_POINTER.to_le_bytes());
        put_name(&mut command, 4, TABLES);
        put_name(&mut command, 4 + NAME, TABLES);
        put_u32(&mut command, 4 + 2 * NAME, *at);
        command[8 + 2 * NAME] = 8;
        script.extend(command);
    }
    for (at, of) in &tables.checksums {
        let mut command = [0; COMMAND];
        command[..4].copy_from_slice(&ADD_CHECKSUM.to_le_bytes());
        put_name(&mut command, 4, TABLES);
        put_u32(&mut command, 4 + NAME, *at);
        put_u32(&mut command, 8 + NAME, of.start);
        put_u32(&mut command, 12 + NAME, of.len());
        script.extend(command);
    }
    if let Some(size) = large {
        allocate(&mut script, LARGE, 4096);
        device.add_file(LARGE, (0..=250).cycle().take(size).collect());
    }
    device.add_file(TABLES, tables.bytes);
    device.add_file(SCRIPT, script);
}

fn allocate(script: &mut Vec<u8>, file: &str, align: usize) {
    let mut command = [0; COMMAND];
    command[..4].copy_from_slice(&ALLOCATE.to_le_bytes());
    put_name(&mut command, 4, file);
    put_u32(&mut command, 4 + NAME, align);
    command[8 + NAME] = ZONE_HIGH;
    script.extend(command);
}

fn put_name(command: &mut [u8; COMMAND], at: usize, name: &str) {
    command[at..at + name.len()].copy_from_slice(name.as_bytes());
}

fn put_u32(command: &mut [u8; COMMAND], at: usize, value: usize) {
    command[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does what a firmware does with the script, and gives the tables as they are at `base`.
    fn load(base: u64) -> Vec<u8> {
        let tables = acpi::tables_at(0, 1);
        let mut bytes = tables.bytes;
        for (at, _) in &tables.checksums {
            bytes[*at] = 0;
        }
        for at in tables.pointers {
            let pointer = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
            bytes[at..at + 8].copy_from_slice(&(pointer + base).to_le_bytes());
        }
        for (at, of) in tables.checksums {
            let sum = bytes[of].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            bytes[at] = sum.wrapping_neg();
        }
        bytes
    }

    #[test]
    fn what_the_script_makes_is_what_would_have_been_written_there() {
        assert_eq!(load(acpi::BASE), acpi::tables(1));
        assert_ne!(load(acpi::BASE + 4096), acpi::tables(1));
    }
}
