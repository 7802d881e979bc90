//! Tests of [`super`]: made-up kernels in every wrapping, and what is no kernel.

use std::io::Write;

use super::*;

/// A 64-bit ELF executable with one executable segment of `code` at 16 MiB.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes());
    elf.extend(62u16.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    elf.extend((16u64 << 20).to_le_bytes()); // Entry.
    elf.extend(64u64.to_le_bytes()); // Program headers.
    elf.extend(0u64.to_le_bytes());
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes()); // PT_LOAD, readable and executable.
    elf.extend(5u32.to_le_bytes());
    let size = code.len() as u64;
    for word in [120, 0xffff_ffff_8100_0000, 16 << 20, size, size + 4096, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Code with one TDCALL, and a banner.
fn code() -> Vec<u8> {
    let mut code = [0x48, 0x89, 0xc8, 0xc3, 0xcc, 0x90].repeat(20);
    code.extend(mapgpa_abi::tdcall::INSTRUCTION);
    code.push(0xc3);
    code.extend(b"Linux version %s\0Linux version 6.12.1-test (a@b) #1\0");
    code
}

fn compress(compression: Option<Compression>, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).expect("small").to_le_bytes();
    let mut out = match compression {
        None => return bytes.to_vec(),
        Some(Compression::Gzip) => {
            let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            to.write_all(bytes).expect("written");
            return to.finish().expect("finished");
        }
        Some(Compression::Bzip2) => {
            let mut to = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            to.write_all(bytes).expect("written");
            to.finish().expect("finished")
        }
        Some(Compression::Xz) => {
            let options = lzma_rust2::XzOptions::with_preset(1);
            let mut to = lzma_rust2::XzWriter::new(Vec::new(), options).expect("options");
            to.write_all(bytes).expect("written");
            to.finish().expect("finished")
        }
        Some(Compression::Lzma) => {
            let options = lzma_rust2::LzmaOptions::with_preset(1);
            let mut to = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None)
                .expect("options");
            to.write_all(bytes).expect("written");
            to.finish().expect("finished")
        }
        Some(Compression::Lz4) => {
            let block = lz4_flex::block::compress(bytes);
            let size = u32::try_from(block.len()).expect("small").to_le_bytes();
            [&[0x02, 0x21, 0x4c, 0x18][..], &size, &block].concat()
        }
        Some(Compression::Zstd) => {
            ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
        }
    };
    // As the kernel's build does with all but gzip.
    out.extend(size);
    out
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 2 * 512 + 0x100];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x236] = 1;
    image[0x248..0x24c].copy_from_slice(&0x100u32.to_le_bytes());
    let size = u32::try_from(payload.len()).expect("small");
    image[0x24c..0x250].copy_from_slice(&size.to_le_bytes());
    image.extend(payload);
    image.extend(b"what follows");
    image
}

const ALL: [Option<Compression>; 7] = [
    None,
    Some(Compression::Gzip),
    Some(Compression::Zstd),
    Some(Compression::Xz),
    Some(Compression::Lzma),
    Some(Compression::Lz4),
    Some(Compression::Bzip2),
];

#[test]
fn every_wrapping_gives_the_same_kernel() {
    let elf = elf(&code());
    for compression in ALL {
        let payload = compress(compression, &elf);
        let mut files = vec![bzimage(&payload)];
        if compression != Some(Compression::Lz4) {
            files.push(payload);
        }
        for file in files {
            let mut kernel =
                Kernel::of_file(file).unwrap_or_else(|e| panic!("{compression:?}: {e:?}"));
            assert_eq!(kernel.elf, elf, "{compression:?}");
            assert_eq!(kernel.version.as_deref(), Some("6.12.1-test"));
            assert_eq!((kernel.entry, kernel.segments.len()), (16 << 20, 1));
            assert_eq!(kernel.patch().sites, 1);
        }
    }
}

#[test]
fn truncated_anywhere_it_is_refused_or_says_so() {
    for compression in ALL {
        let image = bzimage(&compress(compression, &elf(&code())));
        let end = image.len() - b"what follows".len();
        for size in (0..end).step_by(7).chain([end - 1]) {
            assert!(Kernel::of_file(image[..size].to_vec()).is_err(), "{compression:?} {size}");
        }
        let error = Kernel::of_file(image[..end - 1].to_vec()).expect_err("truncated");
        assert!(matches!(error, KernelError::Truncated { .. }), "{error:?}");
    }
}

#[test]
fn a_damaged_payload_is_corrupt() {
    for compression in ALL.into_iter().flatten() {
        let mut payload = compress(Some(compression), &elf(&code()));
        let middle = payload.len() / 2;
        payload.truncate(middle);
        let error = Kernel::of_file(bzimage(&payload));
        // LZ4's legacy frame has no end of its own: what is left of it is no ELF file, or damaged.
        assert!(error.is_err(), "{compression:?}");
        if compression != Compression::Lz4 {
            assert!(
                matches!(error, Err(KernelError::Corrupt { .. })),
                "{compression:?}: {error:?}"
            );
        }
    }
}

#[test]
fn what_is_no_kernel_says_what_it_is() {
    let text = |bytes: Vec<u8>| Kernel::of_file(bytes).expect_err("no kernel").to_string();
    assert!(text(b"hello".to_vec()).starts_with("not a Linux kernel"));
    assert!(text(Vec::new()).starts_with("not a Linux kernel"));
    let mut arm64 = vec![0; 64];
    arm64[56..60].copy_from_slice(b"ARM\x64");
    assert!(text(arm64).starts_with("a kernel for arm64"));
    let mut elf32 = elf(&code());
    elf32[4] = 1;
    assert!(text(elf32).starts_with("a 32-bit kernel"));
    let mut arm_elf = elf(&code());
    arm_elf[18] = 183;
    assert!(text(arm_elf).starts_with("a kernel for arm64"));
    let mut bz32 = bzimage(&[]);
    bz32[0x236] = 0;
    assert!(text(bz32).starts_with("a 32-bit kernel"));
    let mut old = bzimage(&[]);
    old[0x206] = 6;
    assert!(text(old).contains("boot protocol 0x206"));
    assert!(text(bzimage(b"garbage")).contains("no compression that kernels use"));
    let gzip_text = compress(Some(Compression::Gzip), b"text");
    assert!(text(bzimage(&gzip_text)).starts_with("not a Linux kernel"));
}

#[test]
fn hostile_elf_headers_are_refused() {
    let good = elf(&code());
    // The entry point, each field of the program header.
    for (at, value) in [
        (24, u64::MAX),
        (24, 0),
        (32, u64::MAX),
        (72, u64::MAX),
        (72, 1 << 40),
        (88, u64::MAX - 100),
        (96, u64::MAX),
        (104, 1),
        (104, u64::MAX),
    ] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
        assert!(Kernel::of_file(bad).is_err(), "{at} = {value:#x}");
    }
}

#[test]
fn a_bomb_is_refused_without_being_unpacked() {
    let error = Compression::Gzip
        .decompress(&compress(Some(Compression::Gzip), &vec![0; 1 << 20]), 1000)
        .expect_err("too large");
    assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
}
