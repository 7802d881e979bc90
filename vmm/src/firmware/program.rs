//! A program that the firmware boots where there is no kernel: it exits boot services, says so, and
//! stops. So the conversions that a firmware makes at ExitBootServices are reached in seconds.

/// The port that the program writes to once ExitBootServices has returned.
pub const PORT: u16 = 0xe8;

/// Bytes of its code.
const CODE_SIZE: u32 = 0x52;
/// Its code. RBP: image handle, RBX: boot services (UEFI 2.10, 4.4; Microsoft x64 calling convention).
#[rustfmt::skip]
const CODE: [u8; CODE_SIZE as usize] = [
    0x48, 0x89, 0xcd,                                     // mov rbp, rcx
    0x48, 0x8b, 0x5a, 0x60,                               // mov rbx, [rdx+0x60]
    0x48, 0x81, 0xec, 0x88, 0x80, 0x00, 0x00,             // sub rsp, 0x8088
    // again:
    0x48, 0xc7, 0x44, 0x24, 0x30, 0x00, 0x80, 0x00, 0x00, // mov qword [rsp+0x30], 0x8000
    0x48, 0x8d, 0x4c, 0x24, 0x30,                         // lea rcx, [rsp+0x30]: size of the map
    0x48, 0x8d, 0x94, 0x24, 0x80, 0x00, 0x00, 0x00,       // lea rdx, [rsp+0x80]: the map
    0x4c, 0x8d, 0x44, 0x24, 0x38,                         // lea r8, [rsp+0x38]: its key
    0x4c, 0x8d, 0x4c, 0x24, 0x40,                         // lea r9, [rsp+0x40]: size of an entry
    0x48, 0x8d, 0x44, 0x24, 0x48,                         // lea rax, [rsp+0x48]: its version
    0x48, 0x89, 0x44, 0x24, 0x20,                         // mov [rsp+0x20], rax
    0xff, 0x53, 0x38,                                     // call [rbx+0x38]: GetMemoryMap
    0x48, 0x89, 0xe9,                                     // mov rcx, rbp
    0x48, 0x8b, 0x54, 0x24, 0x38,                         // mov rdx, [rsp+0x38]
    0xff, 0x93, 0xe8, 0x00, 0x00, 0x00,                   // call [rbx+0xe8]: ExitBootServices
    0x48, 0x85, 0xc0,                                     // test rax, rax
    0x75, 0xc0,                                           // jnz again
    0xe6, 0xe8,                                           // out PORT, al
    0xeb, 0xfe,                                           // jmp $
];

/// Bytes of the headers, and where the code is once loaded.
const HEADERS: u32 = 0x200;
const CODE_ADDRESS: u32 = 0x1000;
/// Bytes of the section in the file.
const SECTION: u32 = 0x200;

/// The program as an EFI application (PE32+, "Microsoft Portable Executable and Common Object File
/// Format"): one section, nothing to relocate.
#[must_use]
pub fn image() -> Vec<u8> {
    let mut bytes = vec![0; (HEADERS + SECTION) as usize];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    // The DOS header says where the PE header is.
    put(0, b"MZ");
    let pe = 0x40u32;
    put(0x3c, &pe.to_le_bytes());
    // Signature; x86-64, one section; size of the optional header; executable, large addresses.
    put(0x40, b"PE\0\0");
    put(0x44, &[0x64, 0x86, 1, 0]);
    put(0x54, &[0xf0, 0, 0x22, 0]);
    let optional = 0x58;
    // PE32+, sizes, entry point.
    put(optional, &[0x0b, 0x02]);
    put(optional + 4, &SECTION.to_le_bytes());
    put(optional + 16, &CODE_ADDRESS.to_le_bytes());
    put(optional + 20, &CODE_ADDRESS.to_le_bytes());
    // Alignment in memory and in the file; size of the image and of the headers.
    put(optional + 32, &0x1000u32.to_le_bytes());
    put(optional + 36, &0x200u32.to_le_bytes());
    put(optional + 56, &(2 * CODE_ADDRESS).to_le_bytes());
    put(optional + 60, &HEADERS.to_le_bytes());
    // An EFI application, with 16 empty directories.
    put(optional + 68, &[10, 0]);
    put(optional + 108, &16u32.to_le_bytes());
    let section = optional + 0xf0;
    put(section, b".text");
    put(section + 8, &CODE_SIZE.to_le_bytes());
    put(section + 12, &CODE_ADDRESS.to_le_bytes());
    put(section + 16, &SECTION.to_le_bytes());
    put(section + 20, &HEADERS.to_le_bytes());
    // Code, to be executed and read.
    put(section + 36, &0x6000_0020u32.to_le_bytes());
    put(HEADERS as usize, &CODE);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_says_it_on_the_port_and_stays_there() {
        assert_eq!(CODE[0x4e..], [0xe6, PORT.to_le_bytes()[0], 0xeb, 0xfe]);
        // jnz goes back to the begin of the loop.
        assert_eq!(0x4e - (0x100 - usize::from(CODE[0x4d])), 0xe);
        assert_eq!(CODE[0xe..0x11], [0x48, 0xc7, 0x44]);
    }

    #[test]
    fn it_is_a_pe_file() {
        use object::pe::ImageNtHeaders64;
        use object::read::pe::PeFile;
        let image = image();
        let file = PeFile::<ImageNtHeaders64>::parse(&*image).expect("a PE file");
        let code = file.section_table().iter().next().expect("a section");
        assert_eq!(&code.pe_data(&*image).expect("its bytes")[..CODE.len()], &CODE);
    }
}
