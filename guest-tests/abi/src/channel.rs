//! The guest channel: how a guest test tells the VMM what it does.
//!
//! A stream of 32-bit words a vCPU, each written to [`PORT`] by one 4-byte port write:
//! TDVMCALL\<Instruction.IO\>, or a plain `out` where the guest is no real TD. Nothing is read from
//! registers or memory behind the guest's back, so the same stream works in a TD.
//!
//! A message is a header word, its tag in bits 31:24 and a small field in bits 23:0, followed by
//! the payload words that the tag fixes (docs/guest-kit.md lists them byte by byte).

/// The channel's I/O port; no PC device's.
pub const PORT: u16 = 0x1d70;
/// The version that [`tag::HELLO`] carries.
pub const VERSION: u32 = 1;
/// The longest text, in bytes, of a [`tag::PANIC`] or [`tag::TEXT`] message.
pub const TEXT_MAX: usize = 256;
/// Payload words of [`tag::CRASH`]: error code, RIP, RFLAGS, RSP, RAX, RBX, RCX, RDX, RSI, RDI,
/// RBP, R8 to R15, each low word first.
pub const CRASH_WORDS: usize = 2 * 19;

/// Message tags.
pub mod tag {
    /// The guest runs. Field: [`super::VERSION`]. No payload.
    pub const HELLO: u8 = 1;
    /// A conversation begins. Field: bit 0 set for to-shared. Payload: page frame number (low word,
    /// high word) without the shared bit, and the number of 4 KiB pages.
    pub const BEGIN: u8 = 2;
    /// The conversation ends. Field: 0 success, 1 failure, as the guest's caller sees it.
    /// Payload: how many pages the guest accepted in it, in 4 KiB pages.
    pub const END: u8 = 3;
    /// The guest goes on to use a range. Field: bit 0 set for the shared alias. Payload as BEGIN.
    pub const USE: u8 = 4;
    /// A deliberate panic. Field: length in bytes of the UTF-8 text that follows, padded to words.
    pub const PANIC: u8 = 5;
    /// An unhandled exception. Field: vector. Payload: [`super::CRASH_WORDS`].
    pub const CRASH: u8 = 6;
    /// This vCPU is done. Field: 0 success, 1 failure. No payload.
    pub const EXIT: u8 = 7;
    /// Wait here until every vCPU that has not ended waits too. No field, no payload.
    pub const BARRIER: u8 = 8;
    /// Values for whoever drives the guest. Field: how many 64-bit values follow, low word first.
    pub const DATA: u8 = 9;
    /// A line of text, kept in the report. Field and payload as PANIC.
    pub const TEXT: u8 = 10;
    /// What the MapGPA call before it was told. Field: 0 SUCCESS, 1 RETRY, 2 any other status. No
    /// payload. Only where the parameter page asks for it (`mark_replies`).
    pub const REPLY: u8 = 11;
}

/// A header word.
#[must_use]
pub const fn header(tag: u8, field: u32) -> u32 {
    (tag as u32) << 24 | (field & 0x00ff_ffff)
}

/// The payload of BEGIN and USE: page frame number in two words, then the number of pages.
///
/// `gpa` and `size` are in bytes; what is below a page is cut, and more than `u32::MAX` pages
/// (16 TiB) are reported as `u32::MAX`.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the two halves of a 64-bit number")]
pub const fn range_words(gpa: u64, size: u64) -> [u32; 3] {
    let pfn = gpa / crate::PAGE_SIZE;
    let pages = size / crate::PAGE_SIZE;
    let pages = if pages > u32::MAX as u64 { u32::MAX } else { pages as u32 };
    [pfn as u32, (pfn >> 32) as u32, pages]
}
