//! The reply to a request: R10 and R11 as the policy wants them, and whether that is true of the pages.

use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::status;

use super::event::Truth;
use crate::pagemap::Pages;
use crate::policy::{Decision, Request, Say};

/// R10, R11, their truth, and whether they show what the policy is about, when `next` is the first
/// page of the request that is not converted.
pub(super) fn reply(request: &Request, decision: &Decision, next: u64) -> (u64, u64, Truth, bool) {
    let pages = request.pages();
    let complete = next == pages.end();
    let bit = request.raw_gpa ^ request.gpa;
    let next_raw = (next * PAGE_SIZE) | bit;
    let (code, r11) = match decision.say {
        Say::Truth | Say::Retry(_) if complete => (status::SUCCESS, 0),
        Say::Truth => (status::RETRY, next_raw),
        Say::Retry(r11) => (status::RETRY, r11.value(request, next * PAGE_SIZE)),
        Say::Success => (status::SUCCESS, 0),
        Say::Status(code @ (status::INVALID_OPERAND | status::GPA_INUSE)) => {
            // What KVM's tdx_map_gpa() leaves there: the next GPA that is not converted.
            (code, if complete { request.raw_gpa } else { next_raw })
        }
        Say::Status(code @ status::ALIGN_ERROR) => (code, request.raw_gpa),
        Say::Status(code) => (code, 0),
        Say::StatusAt(code, r11) => (code, r11.value(request, next * PAGE_SIZE)),
    };
    let truth = truth(request, code, r11, next);
    let plain = match code {
        status::SUCCESS => complete,
        status::RETRY => matches!(decision.say, Say::Retry(_)) && r11 == next_raw,
        _ => false,
    };
    (code, r11, truth, decision.special && !plain)
}

/// How R10 `code` and R11 `r11` relate to the pages of a request of which `next` is the first not
/// converted.
pub(super) fn truth(request: &Request, code: u64, r11: u64, next: u64) -> Truth {
    let pages = request.pages();
    let complete = next == pages.end();
    let next_raw = (next * PAGE_SIZE) | (request.raw_gpa ^ request.gpa);
    let end_raw = request.raw_gpa + request.size;
    match code {
        status::SUCCESS if complete => Truth::True,
        status::SUCCESS => Truth::Undetectable(Pages { first: next, count: pages.end() - next }),
        status::RETRY
            if !r11.is_multiple_of(PAGE_SIZE) || r11 < request.raw_gpa || r11 >= end_raw =>
        {
            Truth::Detectable
        }
        status::RETRY if r11 <= next_raw => Truth::True,
        status::RETRY => {
            Truth::Undetectable(Pages { first: next, count: (r11 - next_raw) / PAGE_SIZE })
        }
        status::INVALID_OPERAND
        | status::GPA_INUSE
        | status::ALIGN_ERROR
        | status::SUBFUNC_UNSUPPORTED => Truth::Refusal,
        _ => Truth::Detectable,
    }
}
