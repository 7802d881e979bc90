//! The form of a MapGPA request: what GHCI demands of R12 and R13, checked in KVM's order.

use mapgpa_abi::{Direction, PAGE_SIZE, shared_bit};

use super::event::Malformed;
use crate::policy::Request;

/// Makes a request of R12 and R13, or says what is wrong with them.
///
/// The order is that of tdx_map_gpa() in arch/x86/kvm/vmx/tdx.c: first what gives INVALID_OPERAND,
/// then alignment.
pub(super) fn check(
    vcpu: u32,
    call: u64,
    raw_gpa: u64,
    size: u64,
    gpaw: u32,
) -> Result<Request, Malformed> {
    let shared_bit = shared_bit(gpaw);
    if size == 0 {
        return Err(Malformed::Empty);
    }
    let last = raw_gpa.checked_add(size - 1).ok_or(Malformed::Wraps)?;
    let illegal = !(shared_bit | (shared_bit - 1));
    if raw_gpa & illegal != 0 {
        return Err(Malformed::IllegalGpa);
    }
    if (raw_gpa ^ last) & (shared_bit | illegal) != 0 {
        return Err(Malformed::MixedSharedBit);
    }
    if !raw_gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(Malformed::Unaligned);
    }
    let shared = raw_gpa & shared_bit != 0;
    Ok(Request {
        vcpu,
        call,
        raw_gpa,
        gpa: raw_gpa & !shared_bit,
        size,
        to: if shared { Direction::ToShared } else { Direction::ToPrivate },
        shared_bit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BIT: u64 = 1 << 47;

    fn check(raw_gpa: u64, size: u64) -> Result<Request, Malformed> {
        super::check(0, 1, raw_gpa, size, 48)
    }

    #[test]
    fn well_formed() {
        let request = check(0x1000 | BIT, 0x2000).expect("well formed");
        assert_eq!((request.gpa, request.to), (0x1000, Direction::ToShared));
        assert_eq!(check(0x1000, 0x1000).map(|request| request.to), Ok(Direction::ToPrivate));
        assert!(check(BIT - 0x1000, 0x1000).is_ok(), "up to the last private page");
        assert!(check(2 * BIT - 0x1000, 0x1000).is_ok(), "up to the last shared page");
        assert!(check(0, BIT).is_ok(), "all of one alias");
    }

    #[test]
    fn malformed() {
        for (gpa, size, malformed) in [
            (0x1000, 0, Malformed::Empty),
            (u64::MAX - 0xfff, 0x2000, Malformed::Wraps),
            (0x1000, u64::MAX, Malformed::Wraps),
            (2 * BIT, 0x1000, Malformed::IllegalGpa),
            (BIT - 0x1000, 0x2000, Malformed::MixedSharedBit),
            (2 * BIT - 0x1000, 0x2000, Malformed::MixedSharedBit),
            (0x1800, 0x1000, Malformed::Unaligned),
            (0x1000, 0x1001, Malformed::Unaligned),
        ] {
            assert_eq!(check(gpa, size), Err(malformed), "{gpa:#x}+{size:#x}");
        }
    }
}
