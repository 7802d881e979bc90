//! Tests: which guests meet which of the behaviours that a VMM may show, all guests in one table.

use std::string::String;
use std::vec::Vec;

use mapgpa_kit::abi::Direction::{self, ToPrivate, ToShared};
use mapgpa_kit::abi::PAGE_SIZE;
use mapgpa_kit::abi::tdcall::{module, status};

use crate::fake::{BIT, FakeTd, GPA, K4, M2, conversion, reply, stops};
use crate::{Converted, GUESTS, GaveUp, GuestInfo};

/// How a conversion ended: as the function returned, or failed by a panic.
fn outcome(info: &GuestInfo, td: &mut FakeTd, to: Direction, size: u64) -> Converted {
    let mut result = Err(GaveUp);
    if stops(|| result = info.guest.convert(td, &conversion(to, size))) {
        assert_eq!(td.panics().len(), 1, "{}", info.name);
    }
    result
}

/// The names of the guests for which `wanted` holds.
fn which(mut wanted: impl FnMut(&GuestInfo) -> bool) -> Vec<&'static str> {
    GUESTS.iter().filter(|info| info.hosted && wanted(info)).map(|info| info.name).collect()
}

/// A host that answers aligned requests by `reply`, and others with ALIGN_ERROR.
fn host(mut reply: impl FnMut(u64, u64) -> reply::Reply + 'static) -> FakeTd {
    let aligned = |value: u64| value.is_multiple_of(PAGE_SIZE);
    let host = move |gpa, size| {
        if aligned(gpa) && aligned(size) {
            reply(gpa, size)
        } else {
            reply::error(status::ALIGN_ERROR)
        }
    };
    FakeTd::new(host, |_| 0)
}

fn chunked(chunk: u64) -> FakeTd {
    host(move |gpa, size| if size <= chunk { reply::SUCCESS } else { reply::retry(gpa + chunk) })
}

#[test]
fn partial_progress_to_shared() {
    for chunk in [K4, 16 * K4, M2 / 2] {
        assert_eq!(
            which(|info| outcome(info, &mut chunked(chunk), ToShared, M2).is_ok()),
            [
                "linux-6.7",
                "edk2-2023",
                "asterinas-3845",
                "gramine-34",
                "openvmm",
                "svsm",
                "tdx-guest",
                "reference"
            ]
        );
    }
}

#[test]
fn partial_progress_to_private() {
    for chunk in [K4, 16 * K4, M2 / 2] {
        assert_eq!(
            which(|info| outcome(info, &mut chunked(chunk), ToPrivate, M2) == Ok(512)),
            [
                "linux-6.7",
                "asterinas-3339",
                "asterinas-3845",
                "gramine-pre34",
                "gramine-34",
                "openvmm",
                "svsm",
                "oak",
                "tdx-guest",
                "reference"
            ]
        );
        let tail_only = |info: &GuestInfo| {
            outcome(info, &mut chunked(chunk), ToPrivate, M2) == Ok(chunk / PAGE_SIZE)
        };
        assert_eq!(which(tail_only), ["edk2-2023"]);
    }
}

#[test]
fn two_replies_without_progress() {
    for to in [ToShared, ToPrivate] {
        let survivors = which(|info| {
            let mut stalls = 0;
            let mut td = host(move |gpa, _| {
                stalls += 1;
                if stalls <= 2 { reply::retry(gpa) } else { reply::SUCCESS }
            });
            outcome(info, &mut td, to, M2).is_ok()
        });
        let to_private_only = ["asterinas-3339", "gramine-pre34"];
        let no_retry = ["linux-5.19", "edk2-2022", "td-shim-2022", "mushroom"];
        let expected = which(|info| {
            !no_retry.contains(&info.name)
                && (to == ToPrivate || !to_private_only.contains(&info.name))
        });
        assert_eq!(survivors, expected);
    }
}

#[test]
fn replies_without_progress_until_the_guest_gives_up() {
    const LONG: usize = 1000;
    for info in GUESTS.iter().filter(|info| info.hosted && info.retries) {
        let mut replies = 0;
        let mut td = host(move |gpa, _| {
            replies += 1;
            if replies < LONG { reply::retry(gpa) } else { reply::error(status::INVALID_OPERAND) }
        });
        let result = outcome(info, &mut td, ToPrivate, M2);
        match info.own_bound {
            Some(bound) => assert_eq!(td.requests.len() as u64, bound, "{}", info.name),
            None => assert_eq!(td.requests.len(), LONG, "{}", info.name),
        }
        assert_eq!(result.is_ok(), info.name.starts_with("gramine"), "{}", info.name);
    }
}

#[test]
fn a_busy_accept_is_tried_again_by_few() {
    let survivors = |busy: u64| {
        which(|info| {
            let mut accepts = 0;
            let mut td = FakeTd::new(
                |_, _| reply::SUCCESS,
                move |_| {
                    accepts += 1;
                    let answer = module::OPERAND_BUSY | module::OPERAND_RCX;
                    if accepts <= busy { answer } else { 0 }
                },
            );
            outcome(info, &mut td, ToPrivate, 2 * K4).is_ok()
        })
    };
    let again = ["edk2-2022", "edk2-2023", "svsm", "reference"];
    assert_eq!(survivors(1), again);
    assert_eq!(survivors(3), again);
    assert_eq!(survivors(15), ["svsm", "reference"]);
    assert_eq!(survivors(16), ["svsm"]);
}

#[test]
fn an_error_status_is_taken_for_success_by_gramine_only() {
    for to in [ToShared, ToPrivate] {
        let swallow = |info: &GuestInfo| {
            let mut td = host(|_, _| reply::error(status::GPA_INUSE));
            outcome(info, &mut td, to, M2).is_ok()
        };
        assert_eq!(which(swallow), ["gramine-pre34", "gramine-34"]);
    }
}

#[test]
fn an_r11_that_is_no_restart_is_forwarded_by_some() {
    // The R11 and the guests whose next request is there.
    let forwarded = |r11: u64| {
        which(|info| {
            let mut replies = 0;
            let mut td = FakeTd::new(
                move |_, _| {
                    replies += 1;
                    if replies == 1 { reply::retry(r11) } else { reply::SUCCESS }
                },
                |_| 0,
            );
            let _ = outcome(info, &mut td, ToShared, M2);
            td.requests.len() > 1 && info.name != "mushroom"
        })
    };
    // Without the shared bit: Asterinas and gramine put it back, the others flip the direction.
    assert_eq!(
        forwarded(GPA + K4),
        ["asterinas-3339", "gramine-pre34", "gramine-34", "openvmm", "svsm", "tdx-guest"]
    );
    // The end, and past it; OpenVMM takes these for success.
    assert_eq!(forwarded(BIT | (GPA + M2)), ["svsm", "tdx-guest"]);
    assert_eq!(forwarded(BIT | (GPA + 2 * M2)), ["svsm", "tdx-guest"]);
    // Below the start.
    assert_eq!(forwarded(BIT | (GPA - K4)), ["openvmm", "svsm", "tdx-guest"]);
    // Not aligned.
    assert_eq!(
        forwarded(BIT | (GPA + 1)),
        ["linux-6.7", "edk2-2023", "gramine-34", "openvmm", "svsm", "tdx-guest"]
    );
}

#[test]
fn each_guest_passes_the_registers_that_its_original_does() {
    let masks: Vec<(String, u64)> = GUESTS
        .iter()
        .filter(|info| info.hosted)
        .map(|info| {
            let mut td = FakeTd::always(reply::SUCCESS);
            assert!(outcome(info, &mut td, ToShared, M2).is_ok());
            (info.name.into(), td.masks[0])
        })
        .collect();
    let with = |mask| -> Vec<&str> {
        masks.iter().filter(|entry| entry.1 == mask).map(|entry| entry.0.as_str()).collect()
    };
    assert_eq!(with(0x3c00), ["gramine-pre34", "gramine-34", "openvmm", "svsm", "oak", "mushroom"]);
    assert_eq!(with(0xffcc), ["linux-6.7", "edk2-2022", "edk2-2023"]);
    assert_eq!(masks.iter().filter(|entry| entry.1 == 0xfc00).count(), masks.len() - 9);
}
