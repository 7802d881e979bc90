//! A script: recorded decisions, to be given again call by call.

use super::{Amount, Anchor, Decision, R11, Request, Say};
use mapgpa_abi::tdcall::status;

/// What was decided in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// Pages that changed state.
    pub converted: u64,
    /// R10.
    pub status: u64,
    /// R11, of a RETRY.
    pub r11: u64,
}

/// The decisions of a run, by vCPU and call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Script {
    vcpus: Vec<Vec<Said>>,
}

impl Script {
    /// That of the calls of each vCPU, in order.
    #[must_use]
    pub const fn new(vcpus: Vec<Vec<Said>>) -> Self {
        Self { vcpus }
    }

    /// The recorded decision about `request` instead of `decision`; past the end of the recording, that.
    /// Whether private pages are kept is not in what was said: it stays as the rules have it.
    pub(super) fn decide(&self, request: &Request, decision: Decision) -> Decision {
        let call = usize::try_from(request.call).unwrap_or(usize::MAX).wrapping_sub(1);
        let said = self.vcpus.get(request.vcpu as usize).and_then(|calls| calls.get(call));
        let Some(said) = said else { return decision };
        let say = match said.status {
            status::SUCCESS => Say::Success,
            status::RETRY => Say::Retry(R11::new(Anchor::Zero, said.r11.cast_signed())),
            code => Say::Status(code),
        };
        Decision { convert: Amount::Pages(said.converted), say, special: true, ..decision }
    }
}
