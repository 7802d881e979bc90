//! A TDVF image made up for tests: all that is read of one, and nothing that could run.

#![allow(unreachable_pub, reason = "it is a part of the test")]

use std::io::Write;

use mapgpa_abi::tdcall::INSTRUCTION;

/// `mov cr3, rax`.
pub const LOAD_CR3: [u8; 3] = [0x0f, 0x22, 0xd8];
/// Bytes of the image, of its variables, and of the volume that runs in place.
pub const SIZE: usize = 0x1_0000;
pub const VARIABLES: usize = 0x2000;
pub const SEC: usize = 0x4000;
/// How far the metadata lies before the end.
pub const METADATA: usize = 0xa00;

const FOOTER: &str = "de82b596b21ff745baeaa366c55a082d";
const OFFSET: &str = "35657ae44a989847865e4685a7bf8ec2";
const LZMA: &str = "98584eee143959429d6edc7bd79403cf";

/// What there is of an image.
pub struct Tdvf {
    /// TDCALLs and loads of CR3 in the volume that runs in place, TDCALLs in the compressed one.
    pub sec: usize,
    pub hooks: usize,
    pub packed: usize,
    /// What the metadata tells.
    pub sections: Vec<Section>,
}

/// A section: offset, size, GPA, size in memory, type.
pub type Section = (u32, u32, u64, u64, u32);

impl Default for Tdvf {
    fn default() -> Self {
        let start = (1u64 << 32) - SIZE as u64;
        let (variables, code) = (VARIABLES as u32, (SIZE - VARIABLES) as u32);
        Self {
            sec: 2,
            hooks: 1,
            packed: 3,
            sections: vec![
                (variables, code, start + VARIABLES as u64, code.into(), 0),
                (0, variables, start, variables.into(), 1),
                (0, 0, 0x80_9000, 0x2000, 2),
                (0, 0, 0x81_0000, 0x1_0000, 3),
            ],
        }
    }
}

fn guid(hex: &str) -> Vec<u8> {
    (0..16).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex")).collect()
}

/// `count` times an instruction, among others.
fn code(instruction: &[u8], count: usize) -> Vec<u8> {
    let filler =
        [0x48, 0x8b, 0x44, 0x24, 0x08, 0x48, 0x01, 0xc8, 0xc3, 0xcc, 0xcc, 0x90].repeat(12);
    let mut code = filler.clone();
    for _ in 0..count {
        code.extend(instruction);
        code.extend(&filler);
    }
    code
}

fn volume(size: usize, contents: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 32];
    bytes.extend((size as u64).to_le_bytes());
    bytes.extend(b"_FVH");
    bytes.extend([0; 4]);
    bytes.extend(0x48u16.to_le_bytes());
    bytes.resize(0x48, 0);
    bytes.extend(contents);
    assert!(bytes.len() <= size, "{} bytes", bytes.len());
    bytes.resize(size, 0xff);
    bytes
}

/// A file with one section that LZMA has compressed.
fn packed(contents: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::LzmaOptions::with_preset(1);
    let size = contents.len() as u64;
    let mut lzma =
        lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, Some(size)).expect("options");
    lzma.write_all(contents).expect("a vector");
    let lzma = lzma.finish().expect("a vector");
    let mut section = u32::to_le_bytes(24 + lzma.len() as u32)[..3].to_vec();
    section.push(2);
    section.extend(guid(LZMA));
    section.extend([24, 0, 1, 0]);
    section.extend(lzma);
    let mut file = vec![0; 20];
    file.extend(&u32::to_le_bytes(24 + section.len() as u32)[..3]);
    file.push(0xf8);
    file.extend(section);
    file
}

impl Tdvf {
    /// The image.
    pub fn image(&self) -> Vec<u8> {
        // The store of variables: GUID, size, and something in it.
        let mut store = vec![7; 16];
        store.extend(0x1000u32.to_le_bytes());
        store.resize(0x800, 0x5a);
        let mut image = volume(VARIABLES, &store);
        image.extend(volume(SIZE - VARIABLES - SEC, &packed(&code(&INSTRUCTION, self.packed))));
        let mut sec = code(&INSTRUCTION, self.sec);
        sec.extend(code(&LOAD_CR3, self.hooks));
        image.extend(volume(SEC, &sec));
        let mut metadata = b"TDVF".to_vec();
        metadata.extend((16 + 32 * self.sections.len() as u32).to_le_bytes());
        metadata.extend(1u32.to_le_bytes());
        metadata.extend((self.sections.len() as u32).to_le_bytes());
        for (offset, raw, gpa, size, kind) in &self.sections {
            metadata.extend(offset.to_le_bytes());
            metadata.extend(raw.to_le_bytes());
            metadata.extend(gpa.to_le_bytes());
            metadata.extend(size.to_le_bytes());
            metadata.extend(kind.to_le_bytes());
            metadata.extend([0; 4]);
        }
        let at = SIZE - METADATA;
        image[at..at + metadata.len()].copy_from_slice(&metadata);
        // The table of GUIDs, from its first entry to its footer.
        let mut table = vec![1, 2, 3, 4];
        table.extend(22u16.to_le_bytes());
        table.extend([9; 16]);
        table.extend((METADATA as u32).to_le_bytes());
        table.extend(22u16.to_le_bytes());
        table.extend(guid(OFFSET));
        table.extend((table.len() as u16 + 18).to_le_bytes());
        table.extend(guid(FOOTER));
        let at = SIZE - 0x20 - table.len();
        image[at..at + table.len()].copy_from_slice(&table);
        image
    }
}
