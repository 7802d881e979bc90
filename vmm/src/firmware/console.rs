//! What EDK2 says on the serial console, and the terminal codes around it. Everything that depends on
//! its phrases is in this file.

use std::borrow::Cow;

use crate::engine::Alarm;
use crate::linux::console::Said;

/// How boot device selection begins each of its lines (MdeModulePkg/Universal/BdsDxe).
const BDS: &str = "BdsDxe: ";
/// How the handler of an exception begins its report
/// (UefiCpuPkg/Library/CpuExceptionHandlerLib, DumpImageAndCpuContent).
const EXCEPTION: &str = "!!!! X64 Exception Type - ";

/// How that report ends; then it loops for ever.
const EXCEPTION_END: [&str; 2] =
    ["!!!! Find image based on IP", "!!!! Can't find image information"];

/// What a line means, without terminal codes.
#[must_use]
pub fn read(line: &str) -> Said<'_> {
    if line.starts_with(BDS) {
        Said::Bds
    } else if line.starts_with(EXCEPTION) {
        Said::Alarm(Alarm::Oops)
    } else if EXCEPTION_END.iter().any(|phrase| line.starts_with(phrase)) {
        Said::Dead
    } else {
        Said::Nothing
    }
}

/// A line without the control sequences of a terminal (ECMA-48, 5.4): colours and positions.
#[must_use]
pub fn plain(line: &str) -> Cow<'_, str> {
    if !line.contains('\x1b') {
        return Cow::Borrowed(line);
    }
    let mut parts = line.split('\x1b');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = match part.strip_prefix('[') {
            // Parameters, then a final byte.
            Some(sequence) => sequence
                .trim_start_matches(|c: char| ('\x20'..='\x3f').contains(&c))
                .get(1..)
                .unwrap_or_default(),
            None => part.get(1..).unwrap_or_default(),
        };
        text.push_str(rest);
    }
    Cow::Owned(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_real_firmware() {
        let line = "\x1b[2J\x1b[01;01H\x1b[=3h\x1b[0m\x1b[35m\x1b[40mBdsDxe: No bootable option";
        assert_eq!(plain(line), "BdsDxe: No bootable option");
        assert_eq!(read(&plain(line)), Said::Bds);
        let line =
            "!!!! X64 Exception Type - 06(#UD - Invalid Opcode)  CPU Apic ID - 00000000 !!!!";
        assert_eq!(read(line), Said::Alarm(Alarm::Oops));
        assert_eq!(read("!!!! Can't find image information. !!!!"), Said::Dead);
        assert_eq!(read("EFI stub: Loaded initrd"), Said::Nothing);
        for odd in ["\x1b", "\x1b[", "\x1b[12;", "\x1b[é", "a\x1bé", "\x1b[0mé"] {
            let _ = plain(odd);
        }
        assert_eq!(plain("a\x1b[0mé"), "aé");
    }
}
