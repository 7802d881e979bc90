//! The devices of a kernel's machine behind its I/O ports: a serial console, a clock, ACPI's power
//! management, the keyboard controller's reset. Interrupt controllers and the PIT are KVM's.

use std::io;
use std::time::Instant;

use mapgpa_abi::layout::HOLE_START;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::acpi::{PM_TIMER, PM1_CONTROL, PM1_EVENT};

/// The interrupt line of the serial port.
pub const SERIAL_IRQ: u32 = 4;

/// Ports of the first serial port, 8 of them.
const SERIAL: u16 = 0x3f8;
/// Index and data port of the CMOS clock.
const CMOS: (u16, u16) = (0x70, 0x71);
/// Status and command port of the keyboard controller.
const KEYBOARD: u16 = 0x64;
/// The command that resets the machine.
const KEYBOARD_RESET: u8 = 0xfe;
/// The reset control register of chipsets, and its bit that resets.
const RESET_CONTROL: (u16, u8) = (0xcf9, 1 << 2);
/// The second half of the PM1 event block.
const PM1_ENABLE: u16 = PM1_EVENT + 2;
/// Bits of the PM1 control block: ACPI is on, and the machine is to sleep (ACPI 6.5, table 4.13).
const SCI_ENABLED: u8 = 1;
const SLEEP_ENABLE: u8 = 1 << 5;
/// Ticks of the PM timer a second (ACPI 6.5, 4.8.2.1).
const PM_TIMER_HZ: u128 = 3_579_545;
/// A console line without its end is cut after this many bytes.
const LINE_MAX: usize = 4096;

/// What an access to a port leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more.
    None,
    /// The machine is switched off.
    PowerOff,
    /// The machine is reset.
    Reset,
}

/// The serial port's interrupt: an eventfd that KVM turns into an edge.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The devices.
#[derive(Debug)]
pub struct Devices {
    serial: Serial<Interrupt, NoEvents, Vec<u8>>,
    cmos_index: u8,
    /// Bytes of memory, which the CMOS tells of.
    memory: u64,
    /// The PM1 enable register, which reads as it was written. No event ever happens.
    pm1_enable: [u8; 2],
    started: Instant,
}

impl Devices {
    /// Devices of a machine with `memory` bytes just switched on, and the eventfd that is to raise [`SERIAL_IRQ`].
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(memory: u64) -> io::Result<(Self, EventFd)> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let interrupt = Interrupt(event.try_clone()?);
        let serial = Serial::new(interrupt, Vec::new());
        let started = Instant::now();
        Ok((Self { serial, cmos_index: 0, memory, pm1_enable: [0; 2], started }, event))
    }

    /// Fills `data` with what a read of `port` gives; all ones where no device is.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        let value = match port {
            _ if port.wrapping_sub(SERIAL) < 8 => u32::from(self.serial.read(offset(port, SERIAL))),
            _ if port == CMOS.1 => cmos(self.cmos_index, self.memory).into(),
            // Ready for a command. Its output always looks full, so that Linux finds no keyboard.
            KEYBOARD => 0xfd,
            // Gate and output of the PIT's channel 2, as after its time is up.
            0x61 => 0x20,
            PM1_ENABLE => u16::from_le_bytes(self.pm1_enable).into(),
            PM1_EVENT..PM1_CONTROL => 0,
            PM1_CONTROL => SCI_ENABLED.into(),
            PM_TIMER => self.pm_timer(),
            _ => u32::MAX,
        };
        let bytes = value.to_le_bytes();
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Takes what was written to `port`.
    pub fn write(&mut self, port: u16, data: &[u8]) -> Effect {
        let Some(&byte) = data.first() else { return Effect::None };
        match port {
            _ if port.wrapping_sub(SERIAL) < 8 => {
                // It fails if the interrupt's counter is full, which is as good as raised.
                let _ = self.serial.write(offset(port, SERIAL), byte);
                Effect::None
            }
            _ if port == CMOS.0 => {
                self.cmos_index = byte & 0x7f;
                Effect::None
            }
            PM1_ENABLE => {
                self.pm1_enable = [byte, data.get(1).copied().unwrap_or(0)];
                Effect::None
            }
            KEYBOARD if byte == KEYBOARD_RESET => Effect::Reset,
            _ if port == RESET_CONTROL.0 && byte & RESET_CONTROL.1 != 0 => Effect::Reset,
            // The upper byte has the sleep type and the bit that begins it.
            PM1_CONTROL if data.get(1).is_some_and(|high| high & SLEEP_ENABLE != 0) => {
                Effect::PowerOff
            }
            _ => Effect::None,
        }
    }

    /// The lines that the console has ended since, or with `all` what is left of one too.
    pub fn lines(&mut self, all: bool) -> Vec<String> {
        let out = self.serial.writer_mut();
        let end = match out.iter().rposition(|byte| *byte == b'\n') {
            _ if all || out.len() > LINE_MAX => out.len(),
            Some(at) => at + 1,
            None => return Vec::new(),
        };
        let text: Vec<u8> = out.drain(..end).collect();
        String::from_utf8_lossy(&text).lines().map(|line| line.trim_end().to_owned()).collect()
    }

    /// The PM timer, which has 24 bits.
    fn pm_timer(&self) -> u32 {
        (self.started.elapsed().as_nanos() * PM_TIMER_HZ / 1_000_000_000 % (1 << 24)) as u32
    }
}

#[expect(clippy::cast_possible_truncation, reason = "one of 8 ports")]
const fn offset(port: u16, base: u16) -> u8 {
    (port - base) as u8
}

/// A register of the clock: midnight of 1 January 2026, standing still, so that runs are alike. The
/// memory between 16 MiB and 4 GiB is in two further ones, as QEMU and OVMF have it
/// (OvmfPkg/Library/PlatformInitLib/MemDetect.c).
#[expect(clippy::cast_possible_truncation, reason = "a byte of each")]
const fn cmos(index: u8, memory: u64) -> u8 {
    let low = if memory < HOLE_START { memory } else { HOLE_START };
    let above = low.saturating_sub(16 << 20) >> 16;
    match index {
        0x34 => above as u8,
        0x35 => (above >> 8) as u8,
        // Day of the week, day, month; year of the century, century. All in BCD.
        6 => 0x05,
        7 | 8 => 0x01,
        9 => 0x26,
        0x32 => 0x20,
        // Status registers: a time base and no update under way; 24 hours; battery good.
        0xa => 0x26,
        0xb => 0x02,
        0xd => 0x80,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices::new(64 << 20).expect("an eventfd").0
    }

    #[test]
    fn the_console_comes_in_lines() {
        let mut devices = devices();
        for byte in b"one\r\ntwo\nthr" {
            assert_eq!(devices.write(SERIAL, &[*byte]), Effect::None);
        }
        assert_eq!(devices.lines(false), ["one", "two"]);
        assert_eq!(devices.lines(false), [""; 0]);
        assert_eq!(devices.lines(true), ["thr"]);
        for _ in 0..=LINE_MAX {
            devices.write(SERIAL, b"x");
        }
        assert_eq!(devices.lines(false)[0].len(), LINE_MAX + 1, "no endless line");
    }

    #[test]
    fn the_ways_to_end() {
        let mut devices = devices();
        assert_eq!(devices.write(KEYBOARD, &[KEYBOARD_RESET]), Effect::Reset);
        assert_eq!(devices.write(RESET_CONTROL.0, &[6]), Effect::Reset);
        assert_eq!(devices.write(PM1_CONTROL, &[0, 0x34]), Effect::PowerOff);
        assert_eq!(devices.write(PM1_CONTROL, &[1, 0]), Effect::None);
        assert_eq!(devices.write(PM1_CONTROL, &[]), Effect::None);
    }

    #[test]
    fn the_cmos_tells_how_much_memory_there_is() {
        let mut devices = Devices::new(512 << 20).expect("an eventfd").0;
        let mut register = |index| {
            devices.write(CMOS.0, &[index]);
            let mut data = [0];
            devices.read(CMOS.1, &mut data);
            u64::from(data[0])
        };
        assert_eq!((register(0x34) | register(0x35) << 8) << 16, (512 - 16) << 20);
    }

    #[test]
    fn reads_of_any_size() {
        let mut devices = devices();
        for size in [1, 2, 4, 8] {
            let mut data = vec![0; size];
            devices.read(0x1234, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff));
        }
        let mut status = [0];
        devices.read(KEYBOARD, &mut status);
        assert_eq!(status[0] & 2, 0, "ready for the command that resets");
    }
}
