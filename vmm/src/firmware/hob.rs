//! The TD HOB list: what the firmware is told of memory (UEFI Platform Initialization 1.8, vol. 3, 4
//! and 5; EDK2 MdePkg/Include/Pi/PiHob.h).

use super::tdvf::{Kind, Section};

/// HOB types.
const HANDOFF: u16 = 1;
const RESOURCE: u16 = 3;
const END: u16 = 0xffff;
/// EFI_HOB_HANDOFF_TABLE_VERSION.
const VERSION: u32 = 9;
/// Resource types: memory that is there, and memory that has to be accepted first.
const SYSTEM_MEMORY: u32 = 0;
const UNACCEPTED: u32 = 7;
/// Present, initialized, tested.
const ATTRIBUTES: u32 = 7;

/// The list for a machine with `memory` bytes from 0 on, to be written at the section for it. What
/// `sections` says is accepted from the start; the rest is not.
#[must_use]
pub fn list(sections: &[Section], memory: u64) -> Vec<u8> {
    let mut accepted: Vec<(u64, u64)> = sections
        .iter()
        .filter(|section| section.is_memory())
        .map(|section| (section.gpa, section.gpa + section.size))
        .collect();
    accepted.sort_unstable();
    let mut resources = Vec::new();
    let mut at = 0;
    for (start, end) in accepted {
        if start > at {
            resources.push((UNACCEPTED, at, start));
        }
        resources.push((SYSTEM_MEMORY, start, end));
        at = end;
    }
    if at < memory {
        resources.push((UNACCEPTED, at, memory));
    }
    let base = sections.iter().find(|section| section.kind == Kind::TdHob);
    let base = base.map_or(0, |section| section.gpa);
    const HANDOFF_SIZE: u16 = 56;
    const RESOURCE_SIZE: u16 = 48;
    let end =
        base + u64::from(HANDOFF_SIZE) + resources.len() as u64 * u64::from(RESOURCE_SIZE) + 8;

    let mut bytes = Vec::new();
    header(&mut bytes, HANDOFF, HANDOFF_SIZE);
    bytes.extend(VERSION.to_le_bytes());
    // Boot mode (full configuration), and the limits of a memory that nobody allocates from.
    bytes.extend([0; 4 + 4 * 8]);
    bytes.extend(end.to_le_bytes());
    for (kind, start, end) in resources {
        header(&mut bytes, RESOURCE, RESOURCE_SIZE);
        bytes.extend([0; 16]);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(ATTRIBUTES.to_le_bytes());
        bytes.extend(start.to_le_bytes());
        bytes.extend((end - start).to_le_bytes());
    }
    header(&mut bytes, END, 8);
    bytes
}

fn header(bytes: &mut Vec<u8>, kind: u16, size: u16) {
    bytes.extend(kind.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 4]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_memory_is_in_the_list_once() {
        let section = |kind, gpa, size| Section { kind, data: 0..0, gpa, size };
        let sections = [
            section(Kind::TempMem, 0x81_0000, 0x1_0000),
            section(Kind::TdHob, 0x80_9000, 0x2000),
            section(Kind::Bfv, 0xffc8_4000, 0x37_c000),
        ];
        let memory = 64 << 20;
        let list = list(&sections, memory);
        let word = |at: usize| u64::from_le_bytes(list[at..at + 8].try_into().expect("8 bytes"));
        let size = |at: usize| usize::from(u16::from_le_bytes([list[at + 2], list[at + 3]]));
        assert_eq!((list[0], size(0), list[8]), (1, 56, 9));
        assert_eq!(word(48), 0x80_9000 + list.len() as u64, "where the list ends");
        let (mut at, mut next) = (56, 0);
        let mut kinds = Vec::new();
        while list[at] == 3 {
            assert_eq!(word(at + 32), next);
            next += word(at + 40);
            kinds.push(list[at + 24]);
            at += size(at);
        }
        assert_eq!((next, kinds), (memory, vec![7, 0, 7, 0, 7]));
        assert_eq!((&list[at..at + 4], at + 8), (&[0xff, 0xff, 8, 0][..], list.len()));
    }
}
