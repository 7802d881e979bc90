//! The compressions in which distributions ship kernels and modules: told by their magic numbers,
//! undone within bounds, so that a hostile file costs no more memory than the limit says.

use std::io::{self, Read};

use lzma_rust2::{LzmaReader, XzReader};
use ruzstd::decoding::StreamingDecoder;

/// A compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878; kernels use windows of up to 128 MiB.
    Zstd,
    /// The xz container of LZMA2.
    Xz,
    /// The older container of LZMA, with its 13-byte header.
    Lzma,
    /// The legacy frame of LZ4, which is what kernels use.
    Lz4,
    /// bzip2.
    Bzip2,
}

/// Magic of LZ4's legacy frame.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// What a block of that frame holds at most, in bytes.
const LZ4_BLOCK: usize = 8 << 20;
/// The largest window that `zstd --ultra -22` uses, in bytes.
const ZSTD_WINDOW: u64 = 128 << 20;
/// Memory for an LZMA decoder in KiB: the kernel's 128 MiB dictionary and what is around it.
const LZMA_MEMORY: u32 = 160 << 10;

impl Compression {
    /// The compression that `bytes` begin with, if any.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            // Properties byte lc=3 lp=0 pb=2, and a dictionary below 16 MiB times 256.
            [0x5d, 0, 0, ..] => Some(Self::Lzma),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Some(Self::Bzip2),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
        }
    }

    /// Undoes it. What follows the compressed stream is ignored: the kernel's build appends the
    /// size.
    ///
    /// # Errors
    /// `InvalidData` or `UnexpectedEof` for a damaged stream, `FileTooLarge` for one that holds
    /// more than `limit` bytes, `OutOfMemory` for one whose window no kernel needs.
    pub fn decompress(self, bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
        match self {
            Self::Gzip => read(flate2::read::GzDecoder::new(bytes), limit),
            Self::Bzip2 => read(bzip2::read::BzDecoder::new(bytes), limit),
            Self::Xz => read(XzReader::new_mem_limit(bytes, false, LZMA_MEMORY), limit),
            Self::Lzma => read(LzmaReader::new_mem_limit(bytes, LZMA_MEMORY, None)?, limit),
            Self::Zstd => {
                let decoder = StreamingDecoder::new_with_max_window_size(bytes, ZSTD_WINDOW)
                    .map_err(io::Error::other)?;
                read(decoder, limit)
            }
            Self::Lz4 => lz4(bytes, limit),
        }
    }
}

fn read(stream: impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    stream.take(limit as u64 + 1).read_to_end(&mut out)?;
    if out.len() > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(out) }
}

/// LZ4's legacy frame: the magic, then blocks with their compressed size before each; at the end
/// the four bytes that the kernel's build appends.
fn lz4(bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    let mut rest = bytes.strip_prefix(&LZ4_LEGACY).unwrap_or(bytes);
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        if after.is_empty() {
            break;
        }
        let size = usize::try_from(u32::from_le_bytes(*size)).map_err(io::Error::other)?;
        let input = after.get(..size).ok_or(io::ErrorKind::UnexpectedEof)?;
        let written =
            lz4_flex::block::decompress_into(input, &mut block).map_err(io::Error::other)?;
        out.extend_from_slice(&block[..written]);
        if out.len() > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        rest = &after[size..];
    }
    Ok(out)
}
