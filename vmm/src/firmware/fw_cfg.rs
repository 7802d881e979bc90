//! QEMU's fw_cfg device: named blobs that a firmware reads by ports, or by DMA through the shared
//! alias (docs/specs/fw_cfg.rst of QEMU).

use std::collections::BTreeMap;

use mapgpa_abi::{Alias, PAGE_SIZE, shared_bit};

use crate::engine::{Engine, EventSink, Flow};
use crate::memory::{Contents, MemoryError};

/// Selector, data, and the two halves of the DMA address.
const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const DMA_HIGH: u16 = 0x514;
const DMA_LOW: u16 = 0x518;

/// Keys of the items that have no names.
pub mod key {
    /// "QEMU".
    pub(super) const SIGNATURE: u16 = 0;
    /// What the device can do.
    pub(super) const ID: u16 = 1;
    /// vCPUs at boot.
    pub(super) const CPUS: u16 = 5;
    /// Kernel: bytes.
    pub const KERNEL_SIZE: u16 = 8;
    /// Initrd: bytes.
    pub const INITRD_SIZE: u16 = 0xb;
    /// The most vCPUs.
    pub(super) const MAX_CPUS: u16 = 0xf;
    /// Kernel.
    pub const KERNEL: u16 = 0x11;
    /// Initrd.
    pub const INITRD: u16 = 0x12;
    /// Command line: bytes, with the final 0.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// Command line.
    pub const CMDLINE: u16 = 0x15;
    /// Real-mode part of a kernel: bytes; 0, as the kernel is passed whole.
    pub const SETUP_SIZE: u16 = 0x17;
    /// The list of named items.
    pub(super) const DIRECTORY: u16 = 0x19;
    /// The first of these.
    pub(super) const FILES: u16 = 0x20;
}

/// The device has the traditional interface and DMA.
const ID: u32 = 0b11;
/// What DMA_HIGH and DMA_LOW read as: "QEMU CFG".
const DMA_SIGNATURE: &[u8; 8] = b"QEMU CFG";
/// Bits of a DMA's control word.
const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    directory: Vec<(&'static str, u16)>,
    selected: u16,
    offset: usize,
    dma_high: u32,
}

/// What a write to a port of the device asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Nothing more.
    Nothing,
    /// The DMA that is described at this GPA.
    Dma(u64),
}

impl Default for FwCfg {
    fn default() -> Self {
        let mut this = Self {
            items: BTreeMap::new(),
            directory: Vec::new(),
            selected: 0,
            offset: 0,
            dma_high: 0,
        };
        this.add(key::SIGNATURE, b"QEMU".to_vec());
        this.add(key::ID, ID.to_le_bytes().to_vec());
        this.add(key::CPUS, vec![1, 0]);
        this.add(key::MAX_CPUS, vec![1, 0]);
        this
    }
}

impl FwCfg {
    /// Adds an item.
    pub fn add(&mut self, key: u16, bytes: Vec<u8>) {
        self.items.insert(key, bytes);
    }

    /// Adds a named item: up to 55 characters.
    pub fn add_file(&mut self, name: &'static str, bytes: Vec<u8>) {
        let files = u16::try_from(self.directory.len()).unwrap_or(u16::MAX);
        let key = key::FILES.saturating_add(files);
        self.directory.push((name, key));
        self.add(key, bytes);
        let count = u32::from(files) + 1;
        let mut directory = count.to_be_bytes().to_vec();
        for (name, key) in &self.directory {
            let size = u32::try_from(self.items[key].len()).unwrap_or(u32::MAX);
            directory.extend(size.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let mut padded = [0; 56];
            let length = name.len().min(55);
            padded[..length].copy_from_slice(&name.as_bytes()[..length]);
            directory.extend(padded);
        }
        self.add(key::DIRECTORY, directory);
    }

    /// Whether the named item is the one that is being read.
    #[must_use]
    pub fn is_selected(&self, name: &str) -> bool {
        self.directory.iter().any(|(file, key)| *file == name && *key == self.selected)
    }

    const fn select(&mut self, key: u16) {
        self.selected = key;
        self.offset = 0;
    }

    /// Fills `data` with the next bytes of the item; zeros behind its end.
    fn next(&mut self, data: &mut [u8]) {
        let item = self.items.get(&self.selected).map_or(&[][..], Vec::as_slice);
        let rest = item.get(self.offset..).unwrap_or_default();
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
        data[count..].fill(0);
        self.offset = self.offset.saturating_add(data.len());
    }

    /// Fills `data` with what `port` reads as; false if it is none of the device's.
    pub fn read_port(&mut self, port: u16, data: &mut [u8]) -> bool {
        match port {
            DATA => self.next(data),
            DMA_HIGH | DMA_LOW => {
                let from = usize::from(port - DMA_HIGH);
                for (byte, new) in data.iter_mut().zip(&DMA_SIGNATURE[from..]) {
                    *byte = *new;
                }
            }
            _ => return false,
        }
        true
    }

    /// Takes what was written to `port`; nothing if it is none of the device's.
    pub fn write_port(&mut self, port: u16, data: &[u8]) -> Option<Asked> {
        let word = || data.try_into().map_or(0, u32::from_be_bytes);
        match port {
            SELECTOR => {
                if let Ok(key) = data.try_into() {
                    self.select(u16::from_le_bytes(key));
                }
            }
            // Items cannot be written.
            DATA => {}
            DMA_HIGH => self.dma_high = word(),
            DMA_LOW => {
                let high = std::mem::take(&mut self.dma_high);
                return Some(Asked::Dma(u64::from(high) << 32 | u64::from(word())));
            }
            _ => return None,
        }
        Some(Asked::Nothing)
    }

    /// Does the DMA that is described at `gpa`. As a device of the host it reaches shared pages only;
    /// any other page it is told to use is a touch through the wrong alias.
    ///
    /// # Errors
    /// Guest memory could not be reached.
    pub fn dma<M: Contents, S: EventSink>(
        &mut self,
        engine: &mut Engine<M, S>,
        gpa: u64,
    ) -> Result<Flow, MemoryError> {
        let bit = shared_bit(engine.settings().gpaw);
        let at = gpa & !bit;
        let mut descriptor = [0; 16];
        if let Err(flow) = touch(engine, at, 16) {
            return Ok(flow);
        }
        if !engine.memory().read(at, Alias::Shared, &mut descriptor)? {
            return Ok(engine.odd(&format!("fw_cfg: a DMA described at {at:#x}, where no RAM is")));
        }
        let word = |at: usize| descriptor[at..at + 4].try_into().map_or(0, u32::from_be_bytes);
        let (control, size) = (word(0), word(4));
        let to = (u64::from(word(8)) << 32 | u64::from(word(12))) & !bit;
        let mut flow = Flow::Continue;
        let mut result = 0u32;
        if control & DMA_SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        if control & DMA_READ != 0 {
            let size = u64::from(size);
            match touch(engine, to, size) {
                Err(stop) => (flow, result) = (stop, DMA_ERROR),
                Ok(()) if !self.read_into(engine, to, size)? => result = DMA_ERROR,
                Ok(()) => {}
            }
        } else if control & DMA_SKIP != 0 {
            self.offset = self.offset.saturating_add(size as usize);
        } else if control & DMA_WRITE != 0 {
            result = DMA_ERROR;
        }
        engine.memory().write(at, Alias::Shared, &result.to_be_bytes())?;
        Ok(flow)
    }

    /// Copies the next `size` bytes of the item to `gpa`; false if that is not all RAM.
    fn read_into<M: Contents, S: EventSink>(
        &mut self,
        engine: &mut Engine<M, S>,
        gpa: u64,
        size: u64,
    ) -> Result<bool, MemoryError> {
        let mut piece = [0; 1 << 16];
        let mut done = 0;
        while done < size {
            let count = (size - done).min(piece.len() as u64);
            let piece = &mut piece[..usize::try_from(count).unwrap_or_default()];
            self.next(piece);
            if !engine.memory().write(gpa + done, Alias::Shared, piece)? {
                return Ok(false);
            }
            done += count;
        }
        Ok(true)
    }
}

/// The device touches `size` bytes at `gpa` through the shared alias.
fn touch<M: Contents, S: EventSink>(
    engine: &mut Engine<M, S>,
    gpa: u64,
    size: u64,
) -> Result<(), Flow> {
    let bit = shared_bit(engine.settings().gpaw);
    let end = gpa.saturating_add(size);
    let mut page = gpa & !(PAGE_SIZE - 1);
    let mut result = Ok(());
    while page < end {
        match engine.touch(page | bit) {
            Err(Flow::Stop) => return Err(Flow::Stop),
            // Every page that it cannot reach is one more violation.
            Err(flow) => result = Err(flow),
            Ok(()) => {}
        }
        page += PAGE_SIZE;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut FwCfg, key: u16, size: usize) -> Vec<u8> {
        assert_eq!(device.write_port(SELECTOR, &key.to_le_bytes()), Some(Asked::Nothing));
        let mut bytes = vec![0; size];
        for byte in &mut bytes {
            assert!(device.read_port(DATA, std::slice::from_mut(byte)));
        }
        bytes
    }

    #[test]
    fn items_are_read_byte_by_byte_and_files_are_listed() {
        let mut device = FwCfg::default();
        device.add(key::KERNEL, vec![1, 2, 3]);
        device.add_file("etc/a", vec![9; 300]);
        device.add_file("etc/b", vec![7]);
        assert_eq!(read(&mut device, key::SIGNATURE, 5), b"QEMU\0");
        assert_eq!(read(&mut device, key::KERNEL, 4), [1, 2, 3, 0]);
        assert_eq!(read(&mut device, 0x4321, 2), [0, 0], "no such item");
        let directory = read(&mut device, key::DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..14], [0, 0, 0, 2, 0, 0, 1, 44, 0, 0x20, 0, 0, b'e', b't']);
        assert_eq!(
            &directory[68..82],
            [0, 0, 0, 1, 0, 0x21, 0, 0, b'e', b't', b'c', b'/', b'b', 0]
        );
        assert_eq!(read(&mut device, 0x21, 1), [7]);
    }

    #[test]
    fn the_dma_address_has_two_halves() {
        let mut device = FwCfg::default();
        let mut signature = [0; 8];
        assert!(device.read_port(DMA_HIGH, &mut signature[..4]));
        assert!(device.read_port(DMA_LOW, &mut signature[4..]));
        assert_eq!(&signature, DMA_SIGNATURE);
        assert_eq!(device.write_port(DMA_HIGH, &[0, 0, 0, 1]), Some(Asked::Nothing));
        assert_eq!(
            device.write_port(DMA_LOW, &[0, 0, 0x20, 0]),
            Some(Asked::Dma(1 << 32 | 0x2000))
        );
        assert_eq!(device.write_port(DMA_LOW, &[0, 0, 0x20, 0]), Some(Asked::Dma(0x2000)));
        assert_eq!(device.write_port(0x80, &[0]), None);
    }
}
