//! The R11 of a RETRY that is not the truth: an anchor, an offset, and the shared bit.

use mapgpa_abi::PAGE_SIZE;

use super::Request;

/// What an R11 is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// The request's start.
    Start,
    /// The first page that is not converted yet: the truth.
    Next,
    /// The request's end.
    End,
    /// Zero: the offset is the value itself.
    Zero,
}

/// What happens to the shared bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedBit {
    /// As in the request.
    Keep,
    /// Clear.
    Strip,
    /// The opposite of the request's.
    Flip,
}

/// A RETRY's R11.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct R11 {
    /// What it is counted from.
    pub anchor: Anchor,
    /// Bytes from there; wraps as a register does.
    pub offset: i64,
    /// The shared bit.
    pub bit: SharedBit,
    /// Stay on the pages of the request, so that only the page state tells it from the truth.
    pub in_range: bool,
}

/// The named ones: name, value, sentence.
pub const NAMED: &[(&str, R11, &str)] = &[
    ("end", at(Anchor::End, 0), "the end of the request"),
    ("past-end", at(Anchor::End, 1 << 30), "1 GiB past the end"),
    ("below", at(Anchor::Start, -4096), "one page below the start"),
    ("start-1", at(Anchor::Start, -1), "one byte below the start"),
    ("unaligned", at(Anchor::Next, 0x800), "the truth plus 2 KiB"),
    (
        "strip-shared",
        R11 { bit: SharedBit::Strip, ..at(Anchor::Next, 0) },
        "the truth without the shared bit",
    ),
    ("flip", R11 { bit: SharedBit::Flip, ..at(Anchor::Next, 0) }, "the truth, shared bit flipped"),
    (
        "skip",
        R11 { in_range: true, ..at(Anchor::Next, 64 << 10) },
        "64 KiB past the truth, over pages that are not converted",
    ),
];

const fn at(anchor: Anchor, offset: i64) -> R11 {
    R11 { anchor, offset, bit: SharedBit::Keep, in_range: false }
}

impl R11 {
    /// `anchor` plus `offset` bytes, shared bit kept.
    #[must_use]
    pub const fn new(anchor: Anchor, offset: i64) -> Self {
        at(anchor, offset)
    }

    /// The register's value for `request` of which `next` (GPA in bytes, no shared bit) is the
    /// first page not converted.
    #[must_use]
    pub fn value(&self, request: &Request, next: u64) -> u64 {
        let bit = request.raw_gpa ^ request.gpa;
        let base = match self.anchor {
            Anchor::Start => request.raw_gpa,
            Anchor::Next => next | bit,
            Anchor::End => request.raw_gpa.wrapping_add(request.size),
            Anchor::Zero => 0,
        };
        let mut value = base.wrapping_add_signed(self.offset);
        if self.in_range {
            let last = request.raw_gpa.wrapping_add(request.size).wrapping_sub(PAGE_SIZE);
            value = value.min(last);
        }
        match self.bit {
            SharedBit::Keep => value,
            SharedBit::Strip => value & !request.shared_bit,
            SharedBit::Flip => value ^ request.shared_bit,
        }
    }
}
