//! The parameter page: what the command line asks of a guest test.
//!
//! One private page at [`GPA`], written by the VMM before the guest starts. Integers are
//! little-endian; [`Params::to_bytes`] and [`Params::from_bytes`] are the layout.

use crate::Direction;

/// Guest-physical address of the parameter page, in bytes.
pub const GPA: u64 = 0x1000;
/// First field of the page: "MAPGPA" and the layout's version.
pub const MAGIC: u64 = u64::from_le_bytes(*b"MAPGPA\x01\x00");
/// Size of the encoded parameters in bytes; the rest of the page belongs to the guest test.
pub const SIZE: usize = 8 * 12;
/// `bound` when the guest's own bound is to be used.
pub const BOUND_OWN: u64 = u64::MAX;
/// `bound` when the guest is to retry without a bound.
pub const BOUND_NONE: u64 = u64::MAX - 1;

/// Which way the guest test converts its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Once, in this direction.
    One(Direction),
    /// To shared, then back to private.
    RoundTrip,
}

/// How the pages of the range lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One run of pages; several vCPUs convert one equal part each.
    Contiguous,
    /// Every other page of twice the range, as the pages of a vmalloc'ed buffer: one conversation a
    /// page.
    Scattered,
    /// One run of pages that all vCPUs make shared at the same time; vCPU 0 alone takes it back.
    Overlapping,
}

/// The parameters of a guest test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// Which of the image's guests runs: an index into `mapgpa_guests::GUESTS`; users' ELFs ignore
    /// it.
    pub guest: u64,
    /// Start of the range, GPA in bytes without the shared bit, 4 KiB aligned.
    pub gpa: u64,
    /// Size of the range in bytes, a multiple of 4 KiB, not 0.
    pub size: u64,
    /// Direction.
    pub plan: Plan,
    /// Layout.
    pub layout: Layout,
    /// Replies without progress after which the guest gives up, or [`BOUND_OWN`], [`BOUND_NONE`].
    pub bound: u64,
    /// The most bytes that the guest asks for in one conversion; 0 for no limit.
    pub guest_chunk: u64,
    /// Number of vCPUs, 1 or more.
    pub vcpus: u64,
    /// How many pages of a range are touched after a conversion, evenly spread with the first and
    /// the last; 0 for none.
    pub touch: u64,
    /// How many pages of a range are written before a conversion, spread alike.
    pub touch_before: u64,
    /// After each MapGPA call the guest says on the channel what it was told (`tag::REPLY`): for a VMM
    /// that cannot see it.
    pub mark_replies: bool,
}

impl Params {
    /// The page's first bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; SIZE] {
        let plan = match self.plan {
            Plan::One(Direction::ToShared) => 0,
            Plan::One(Direction::ToPrivate) => 1,
            Plan::RoundTrip => 2,
        };
        let layout = match self.layout {
            Layout::Contiguous => 0,
            Layout::Scattered => 1,
            Layout::Overlapping => 2,
        };
        let fields = [
            MAGIC,
            self.guest,
            self.gpa,
            self.size,
            plan,
            layout,
            self.bound,
            self.guest_chunk,
            self.vcpus,
            self.touch,
            self.touch_before,
            u64::from(self.mark_replies),
        ];
        let mut bytes = [0; SIZE];
        for (slot, field) in bytes.chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`Params::to_bytes`] wrote; `None` if it is not that.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; SIZE]) -> Option<Self> {
        let mut fields = [0u64; SIZE / 8];
        for (field, slot) in fields.iter_mut().zip(bytes.chunks_exact(8)) {
            *field = u64::from_le_bytes(slot.try_into().ok()?);
        }
        let [
            magic,
            guest,
            gpa,
            size,
            plan,
            layout,
            bound,
            guest_chunk,
            vcpus,
            touch,
            touch_before,
            mark_replies,
        ] = fields;
        if magic != MAGIC {
            return None;
        }
        let plan = match plan {
            0 => Plan::One(Direction::ToShared),
            1 => Plan::One(Direction::ToPrivate),
            2 => Plan::RoundTrip,
            _ => return None,
        };
        let layout = match layout {
            0 => Layout::Contiguous,
            1 => Layout::Scattered,
            2 => Layout::Overlapping,
            _ => return None,
        };
        Some(Self {
            guest,
            gpa,
            size,
            plan,
            layout,
            bound,
            guest_chunk,
            vcpus,
            touch,
            touch_before,
            mark_replies: mark_replies != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for plan in
            [Plan::RoundTrip, Plan::One(Direction::ToShared), Plan::One(Direction::ToPrivate)]
        {
            for layout in [Layout::Contiguous, Layout::Scattered, Layout::Overlapping] {
                let params = Params {
                    guest: 3,
                    gpa: 0x100_0000,
                    size: 0x20_0000,
                    plan,
                    layout,
                    bound: BOUND_NONE,
                    guest_chunk: 4096,
                    vcpus: 2,
                    touch: 16,
                    touch_before: 8,
                    mark_replies: true,
                };
                assert_eq!(Params::from_bytes(&params.to_bytes()), Some(params));
            }
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        assert_eq!(Params::from_bytes(&[0; SIZE]), None);
    }
}
