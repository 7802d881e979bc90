//! PCI configuration space of the firmware's machine: the two devices by which OVMF knows a Q35, the
//! host bridge and the LPC bridge. By ports, and by device registers (ECAM).
//!
//! OvmfPkg/Include/OvmfPlatforms.h and IndustryStandard/Q35MchIch9.h of EDK2.

use mapgpa_abi::layout::HOLE_END;

/// The address port; the four data ports follow after it.
const ADDRESS: u16 = 0xcf8;
const DATA: std::ops::Range<u16> = 0xcfc..0xd00;
/// Where OVMF puts ECAM on a Q35 (PcdPciExpressBaseAddress), and its size: 256 buses.
const ECAM: std::ops::Range<u64> = 0xe000_0000..0xf000_0000;
/// Bus, device and function of the LPC bridge (ICH9).
const LPC: u32 = 0x1f << 3;
/// Bytes of a function's space that are there.
const SPACE: usize = 256;

/// The configuration space.
#[derive(Debug)]
pub struct Pci {
    address: u32,
    host_bridge: [u8; SPACE],
    lpc: [u8; SPACE],
}

impl Default for Pci {
    fn default() -> Self {
        let device = |id: u32, class: u32| {
            let mut space = [0; SPACE];
            space[..4].copy_from_slice(&id.to_le_bytes());
            space[8..12].copy_from_slice(&class.to_le_bytes());
            space
        };
        let host_bridge = device(0x29c0_8086, 0x0600_0000);
        let mut lpc = device(0x2918_8086, 0x0601_0002);
        // One of several functions.
        lpc[0xe] = 0x80;
        Self { address: 0, host_bridge, lpc }
    }
}

impl Pci {
    /// Fills `data` with what `port` reads as; false if it is none of PCI's.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        if port == ADDRESS {
            fill(data, &self.address.to_le_bytes());
        } else if DATA.contains(&port) {
            self.read(self.function(), self.register(port), data);
        } else {
            return false;
        }
        true
    }

    /// Takes what was written to `port`; false if it is none of PCI's.
    pub fn write_port(&mut self, port: u16, data: &[u8]) -> bool {
        if port == ADDRESS {
            if let Ok(bytes) = data.try_into() {
                self.address = u32::from_le_bytes(bytes);
            }
        } else if DATA.contains(&port) {
            self.write(self.function(), self.register(port), data);
        } else {
            return false;
        }
        true
    }

    /// The same at the device registers of `gpa`, without the shared bit.
    pub fn read_mmio(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some((function, register)) = ecam(gpa) else { return false };
        self.read(function, register, data);
        true
    }

    /// The same at the device registers of `gpa`, without the shared bit.
    pub fn write_mmio(&mut self, gpa: u64, data: &[u8]) -> bool {
        let Some((function, register)) = ecam(gpa) else { return false };
        self.write(function, register, data);
        true
    }

    /// The function that the address port names; none while bit 31 is clear.
    const fn function(&self) -> Option<u32> {
        if self.address >> 31 == 0 { None } else { Some(self.address >> 8 & 0xffff) }
    }

    fn register(&self, port: u16) -> usize {
        (self.address & 0xfc) as usize + usize::from(port - DATA.start)
    }

    fn read(&self, function: Option<u32>, register: usize, data: &mut [u8]) {
        let space = match function {
            Some(0) => &self.host_bridge,
            Some(LPC) => &self.lpc,
            _ => return data.fill(0xff),
        };
        fill(data, space.get(register..).unwrap_or_default());
    }

    /// Takes a write to what is not fixed: the command register, the interrupt line, and what is the
    /// device's own.
    fn write(&mut self, function: Option<u32>, register: usize, data: &[u8]) {
        let space = match function {
            Some(0) => &mut self.host_bridge,
            Some(LPC) => &mut self.lpc,
            _ => return,
        };
        if register == 4 || register == 0x3c || register >= 0x40 {
            for (byte, new) in space[register.min(SPACE)..].iter_mut().zip(data) {
                *byte = *new;
            }
        }
    }
}

/// Function and register that a GPA of ECAM names.
fn ecam(gpa: u64) -> Option<(Option<u32>, usize)> {
    if !ECAM.contains(&gpa) || gpa >= HOLE_END {
        return None;
    }
    let offset = u32::try_from(gpa - ECAM.start).ok()?;
    Some((Some(offset >> 12), (offset & 0xfff) as usize))
}

/// Copies `from` into `data`; what is missing is 0.
fn fill(data: &mut [u8], from: &[u8]) {
    for (at, byte) in data.iter_mut().enumerate() {
        *byte = from.get(at).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_registers_show_the_same() {
        let mut pci = Pci::default();
        let by_port = |pci: &mut Pci, address: u32| {
            pci.write_port(ADDRESS, &address.to_le_bytes());
            let mut data = [0; 2];
            assert!(pci.read_port(DATA.start + 2, &mut data));
            u16::from_le_bytes(data)
        };
        assert_eq!(by_port(&mut pci, 1 << 31), 0x29c0);
        assert_eq!(by_port(&mut pci, 1 << 31 | 0xf800), 0x2918);
        assert_eq!(by_port(&mut pci, 1 << 31 | 0x800), 0xffff, "no such function");
        assert_eq!(by_port(&mut pci, 0xf800), 0xffff, "bit 31 is clear");
        let lpc = ECAM.start + (0x1f << 15);
        assert!(pci.write_mmio(lpc + 0x40, &0x601u32.to_le_bytes()));
        assert!(pci.write_mmio(lpc, &[0; 4]), "fixed");
        let mut data = [0; 4];
        assert!(pci.read_mmio(lpc + 0x40, &mut data) && data == 0x601u32.to_le_bytes());
        assert!(pci.read_mmio(lpc, &mut data) && data == 0x2918_8086u32.to_le_bytes());
        assert!(pci.read_mmio(lpc + 0xffe, &mut data) && data == [0; 4], "beyond the space");
        assert!(pci.write_mmio(lpc + 0xffe, &[1; 8]));
        assert!(!pci.read_mmio(ECAM.end, &mut data) && !pci.read_port(0x80, &mut data));
    }
}
