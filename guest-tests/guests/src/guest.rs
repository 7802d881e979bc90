//! The list of guests, and what each is called with.

use mapgpa_kit::abi::Direction;
use mapgpa_kit::abi::params::{BOUND_NONE, BOUND_OWN};
use mapgpa_kit::{Td, report};

use crate::{
    asterinas, edk2, gramine, linux, mushroom, oak, openvmm, reference, svsm, td_shim, tdx_guest,
};

/// One conversion that a guest's caller wants done.
#[derive(Debug, Clone, Copy)]
pub struct Conversion {
    /// Start, GPA in bytes without the shared bit, 4 KiB aligned.
    pub gpa: u64,
    /// Size in bytes, a multiple of 4 KiB, not 0.
    pub size: u64,
    /// Direction.
    pub to: Direction,
    /// The guest's shared bit, from TDG.VP.INFO.
    pub shared_bit: u64,
    /// When to stop retrying without progress.
    pub bound: Bound,
}

impl Conversion {
    /// R12 of the first request: the start, with the shared bit as the direction wants it.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.gpa | self.mask()
    }

    /// The shared bit to-shared, 0 to-private.
    #[must_use]
    pub const fn mask(&self) -> u64 {
        match self.to {
            Direction::ToShared => self.shared_bit,
            Direction::ToPrivate => 0,
        }
    }
}

/// When a guest stops retrying without progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// As the guest's own code does.
    Own,
    /// At this many replies in a row without progress; 0 acts as 1.
    At(u64),
    /// Never.
    None,
}

impl Bound {
    /// From the parameter page's field.
    #[must_use]
    pub const fn from_param(bound: u64) -> Self {
        match bound {
            BOUND_OWN => Self::Own,
            BOUND_NONE => Self::None,
            n => Self::At(n),
        }
    }

    /// The bound in force in a guest whose own is `own`: how many replies in a row without progress
    /// make it give up, at least 1. `u64::MAX` where it never does: no run of replies is so long.
    #[must_use]
    pub const fn or(self, own: Option<u64>) -> u64 {
        match (self, own) {
            (Self::At(0), _) => 1,
            (Self::At(n), _) | (Self::Own, Some(n)) => n,
            (Self::None, _) | (Self::Own, None) => u64::MAX,
        }
    }
}

/// The guest's conversion function failed, and its caller saw that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GaveUp;

/// What a conversion function returns: 4 KiB pages accepted, or failure, of which it is not said how
/// many pages were accepted before it.
pub type Converted = Result<u64, GaveUp>;

/// A guest that is built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "`info` describes each")]
pub enum Guest {
    Linux519,
    Linux67,
    Edk2Y2022,
    Edk2Y2023,
    TdShim2022,
    TdxTdcall,
    Asterinas3339,
    Asterinas3845,
    GraminePre34,
    Gramine34,
    Openvmm,
    Svsm,
    Oak,
    Mushroom,
    TdxGuest,
    Reference,
}

/// What there is to say of a guest without running it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestInfo {
    /// Which guest this is; its position in [`GUESTS`].
    pub guest: Guest,
    /// The name on the command line.
    pub name: &'static str,
    /// Software and version that the guest models.
    pub models: &'static str,
    /// What it does with a reply, in a line.
    pub summary: &'static str,
    /// Whether it retries at all.
    pub retries: bool,
    /// Replies in a row without progress at which its own code gives up; `None`: never, or it does
    /// not retry.
    pub own_bound: Option<u64>,
    /// Whether it also runs on backend `hosted`; false for one that has its own TDCALL instruction.
    pub hosted: bool,
}

impl GuestInfo {
    /// Whether `--bound` has an effect: on a retry loop that is ours, not a crate's.
    #[must_use]
    pub const fn takes_bound(&self) -> bool {
        self.retries && self.hosted
    }

    /// Whether it runs where guest-physical addresses are `gpaw` bits wide: the crate `tdx-tdcall`
    /// knows the widths of TDX hardware only, and panics with others.
    #[must_use]
    pub const fn runs_with_gpaw(&self, gpaw: u32) -> bool {
        self.hosted || matches!(gpaw, 48 | 52)
    }
}

/// All guests; `Params::guest` is an index into it.
pub const GUESTS: &[GuestInfo] = &[
    linux::LINUX_5_19,
    linux::LINUX_6_7,
    edk2::EDK2_2022,
    edk2::EDK2_2023,
    td_shim::TD_SHIM_2022,
    // Here only so that it has a name and an index: guest-tests/images calls the crate itself.
    GuestInfo {
        guest: Guest::TdxTdcall,
        name: "tdx-tdcall",
        models: "crate tdx-tdcall 0.2.1 (td-shim since 3f18d9f), the crate itself",
        summary: "retries, checks that R11 is in range, not its alignment",
        retries: true,
        own_bound: Some(3),
        hosted: false,
    },
    asterinas::ASTERINAS_3339,
    asterinas::ASTERINAS_3845,
    gramine::GRAMINE_PRE34,
    gramine::GRAMINE_34,
    openvmm::OPENVMM,
    svsm::SVSM,
    oak::OAK,
    mushroom::MUSHROOM,
    tdx_guest::TDX_GUEST,
    reference::REFERENCE,
];

// `Guest::info` relies on it.
const _: () = {
    let mut index = 0;
    while index < GUESTS.len() {
        assert!(GUESTS[index].guest as usize == index, "GUESTS is out of the order of Guest");
        index += 1;
    }
    assert!(GUESTS.len() == Guest::Reference as usize + 1, "GUESTS lacks a guest");
};

impl Guest {
    /// The guest at this index of [`GUESTS`].
    #[must_use]
    pub fn from_index(index: u64) -> Option<Self> {
        GUESTS.get(usize::try_from(index).ok()?).map(|info| info.guest)
    }

    /// The guest of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        GUESTS.iter().find(|info| info.name == name).map(|info| info.guest)
    }

    /// The index in [`GUESTS`].
    #[must_use]
    pub const fn index(self) -> u64 {
        self as u64
    }

    /// The entry in [`GUESTS`].
    #[must_use]
    pub const fn info(self) -> &'static GuestInfo {
        &GUESTS[self as usize]
    }

    /// Does one conversion as this guest does it.
    ///
    /// # Errors
    /// [`GaveUp`] when the guest's own function reports failure to its caller. A guest that panics
    /// instead says so on the channel and does not return, and neither does one that is not
    /// `hosted`: its code is not here.
    pub fn convert<T: Td>(self, td: &mut T, c: &Conversion) -> Converted {
        match self {
            Self::Linux519 => linux::convert_5_19(td, c),
            Self::Linux67 => linux::convert_6_7(td, c),
            Self::Edk2Y2022 => edk2::convert_2022(td, c),
            Self::Edk2Y2023 => edk2::convert_2023(td, c),
            Self::TdShim2022 => td_shim::convert(td, c),
            Self::TdxTdcall => report::panic(td, "this guest is in the VM image only"),
            Self::Asterinas3339 => asterinas::convert_3339(td, c),
            Self::Asterinas3845 => asterinas::convert_3845(td, c),
            Self::GraminePre34 => gramine::convert_pre34(td, c),
            Self::Gramine34 => gramine::convert_34(td, c),
            Self::Openvmm => openvmm::convert(td, c),
            Self::Svsm => svsm::convert(td, c),
            Self::Oak => oak::convert(td, c),
            Self::Mushroom => mushroom::convert(td, c),
            Self::TdxGuest => tdx_guest::convert(td, c),
            Self::Reference => reference::convert(td, c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_is_found_by_name_and_index() {
        for info in GUESTS {
            assert_eq!(Guest::by_name(info.name), Some(info.guest));
            assert_eq!(Guest::from_index(info.guest.index()), Some(info.guest));
            assert_eq!(info.guest.info(), info);
            assert!(info.own_bound.is_none() || info.retries, "{}", info.name);
        }
        assert_eq!(Guest::by_name("linux"), None);
        assert_eq!(Guest::from_index(u64::MAX), None);
    }

    #[test]
    fn the_command_line_overrides_a_guests_own_bound() {
        assert_eq!(Bound::from_param(BOUND_OWN).or(Some(3)), 3);
        assert_eq!(Bound::from_param(BOUND_OWN).or(None), u64::MAX);
        assert_eq!(Bound::from_param(5).or(Some(3)), 5);
        assert_eq!(Bound::from_param(5).or(None), 5);
        assert_eq!(Bound::from_param(BOUND_NONE).or(Some(3)), u64::MAX);
        // A reply with progress, which resets the count to 0, is never one to give up at.
        assert_eq!(Bound::from_param(0).or(None), 1);
    }
}
