//! A TDVF image as distributions ship it: checked, its TDCALLs replaced where it runs in place, and
//! hooked where it is about to run what it has unpacked.
//!
//! Most of a firmware is in a compressed volume, whose TDCALLs cannot be replaced in the file. SEC
//! unpacks it and builds page tables for the DXE core; the `mov cr3, rax` that loads them comes
//! after the unpacking and before the first instruction of what was unpacked. So each of these in
//! SEC becomes a port write, at which the VMM loads CR3 and replaces the TDCALLs in memory. Nothing
//! is unpacked at that point: bytes in a decompressor's window are never touched.

use super::tdvf::{self, Kind, Section, TdvfError};
use super::volumes::{self, VolumeError};
use crate::patch::{self, Patched};

/// `mov cr3, rax`, and the port write that stands for it: `out CR3_PORT, al`, `nop`.
const LOAD_CR3: [u8; 3] = [0x0f, 0x22, 0xd8];
/// The port of the hook for `mov cr3, rax`.
pub const CR3_PORT: u16 = 0xe6;
const LOAD_CR3_HOOK: [u8; 3] = [0xe6, 0xe6, 0x90];

/// Why an image cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// It is no TDVF.
    #[error(transparent)]
    Tdvf(#[from] TdvfError),
    /// Its volumes are damaged.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// It cannot be a TDX guest, or its TDCALLs cannot be reached.
    #[error(
        "found {sec} TDCALLs and {hooks} loads of CR3 in its SEC volume, {packed} TDCALLs in the \
         compressed volume: expected one or more of each"
    )]
    Sites {
        /// TDCALLs in SEC.
        sec: u64,
        /// Loads of CR3 in SEC.
        hooks: u64,
        /// TDCALLs in the compressed volume.
        packed: u64,
    },
    /// Its variables are not where they have to be.
    #[error("its section of variables is damaged: {0}")]
    Variables(&'static str),
}

/// An image ready to be loaded.
#[derive(Debug, Clone)]
pub struct Firmware {
    /// Its bytes, rewritten.
    pub image: Vec<u8>,
    /// Its sections.
    pub sections: Vec<Section>,
    /// TDCALLs replaced in SEC.
    pub sec: Patched,
    /// Loads of CR3 hooked in SEC.
    pub hooks: u64,
    /// TDCALLs in the compressed volume, all of which have to be found in memory.
    pub packed: Patched,
}

impl Firmware {
    /// The firmware in the bytes of a file.
    ///
    /// # Errors
    /// It is no TDVF, or damaged, or its TDCALLs cannot be reached.
    pub fn of_file(mut image: Vec<u8>) -> Result<Self, FirmwareError> {
        let sections = tdvf::sections(&image)?;
        let code = sections.iter().find(|section| section.kind == Kind::Bfv);
        let code = code.map_or(0..0, |section| section.data.clone());
        let volumes = volumes::volumes(&image, code)?;
        let mut unpacked = None;
        for volume in &volumes {
            unpacked = volumes::decompress(&image[volume.clone()])?;
            if unpacked.is_some() {
                break;
            }
        }
        let unpacked = unpacked.ok_or(VolumeError::NotCompressed)?;
        let (sites, lookalikes) = patch::find(&unpacked);
        let packed = Patched { sites: sites.len() as u64, lookalikes };
        // The volume that the reset vector is in.
        let sec_volume = volumes.last().cloned().unwrap_or_default();
        let sec_code = &mut image[sec_volume];
        let sec = patch::patch(sec_code);
        let hooks = patch::replace(sec_code, &LOAD_CR3, &LOAD_CR3_HOOK).sites;
        if sec.sites == 0 || hooks == 0 || packed.sites == 0 {
            let (sec, packed) = (sec.sites, packed.sites);
            return Err(FirmwareError::Sites { sec, hooks, packed });
        }
        Ok(Self { image, sections, sec, hooks, packed })
    }

    /// Empties the variables, Secure Boot's keys among them: what is booted has its TDCALLs replaced,
    /// so that no signature of it holds.
    ///
    /// The layout: MdeModulePkg/Include/Guid/VariableFormat.h of EDK2.
    ///
    /// # Errors
    /// They are not where they have to be.
    pub fn blank_variables(&mut self) -> Result<(), FirmwareError> {
        let Some(section) = self.sections.iter().find(|section| section.kind == Kind::Cfv) else {
            return Ok(());
        };
        let variables = &mut self.image[section.data.clone()];
        let damaged = FirmwareError::Variables;
        if variables.get(0x28..0x2c) != Some(b"_FVH") {
            return Err(damaged("no firmware volume"));
        }
        // The store's header: GUID, size with this header, and 8 bytes more.
        let store = usize::from(u16::from_le_bytes([variables[0x30], variables[0x31]]));
        let size = variables.get(store + 16..store + 20).and_then(|bytes| bytes.try_into().ok());
        let size = size.map_or(0, u32::from_le_bytes) as usize;
        let first = store + 28;
        let all = variables.get_mut(first..store.saturating_add(size));
        all.ok_or_else(|| damaged("the store is longer than the section"))?.fill(0xff);
        Ok(())
    }
}
