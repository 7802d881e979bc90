//! The ABI between a guest and the VMM: what TDX fixes (leaves, sub-functions, status codes, the
//! register layout of TDCALL) and what this project adds (the parameter page and the guest channel).
//!
//! Both sides use this one crate, so that neither can drift from the other. It has no code that
//! touches hardware: only numbers, layouts, and pure conversions between them.
//!
//! Sources: "GHCI" is Intel's *Guest-Hypervisor Communication Interface for TDX* (348552),
//! "TDX module ABI" is Intel's *TDX Module ABI Reference* (348551).
#![no_std]
#![deny(missing_docs)]

pub mod channel;
pub mod layout;
pub mod params;
pub mod tdcall;

/// Bytes in a 4 KiB page, the unit in which MapGPA converts memory.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a 2 MiB page, the larger of the two sizes that TDG.MEM.PAGE.ACCEPT takes.
pub const PAGE_SIZE_2M: u64 = 2 << 20;
/// Bytes in a 1 GiB page.
pub const PAGE_SIZE_1G: u64 = 1 << 30;

/// Where a conversion leads: the value of the shared bit in MapGPA's R12.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Private to shared: the shared bit is set in R12.
    ToShared,
    /// Shared to private: the shared bit is clear in R12. The pages need an accept before use.
    ToPrivate,
}

impl Direction {
    /// The alias under which a page is used after a conversion in this direction.
    #[must_use]
    pub const fn alias(self) -> Alias {
        match self {
            Self::ToShared => Alias::Shared,
            Self::ToPrivate => Alias::Private,
        }
    }

    /// The opposite direction.
    #[must_use]
    pub const fn reverse(self) -> Self {
        match self {
            Self::ToShared => Self::ToPrivate,
            Self::ToPrivate => Self::ToShared,
        }
    }
}

/// One of the two addresses of a page: its private GPA, or the same with the shared bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Alias {
    /// The GPA with the shared bit clear.
    Private,
    /// The GPA with the shared bit set.
    Shared,
}

/// The shared bit of a guest whose guest-physical address width is `gpaw` bits.
///
/// `gpaw` is what TDG.VP.INFO reports in RCX\[5:0\]: 48 or 52 on hardware, any of 1 to 64 here;
/// others give 0 (TDX module ABI, TDG.VP.INFO; GHCI 2.1).
#[must_use]
pub const fn shared_bit(gpaw: u32) -> u64 {
    match gpaw {
        1..=64 => 1 << (gpaw - 1),
        _ => 0,
    }
}
