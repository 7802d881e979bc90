//! What user space can know of a vCPU's requests on KVM, which shows it chunks of 2 MiB: those that it
//! tells apart, the one that may go on, and on a real KVM what the guest has not been told yet.

use std::time::Instant;

use mapgpa_abi::Direction;

use super::Stray;
use crate::policy::{Decision, Request};

/// What user space knows of a vCPU's requests.
#[derive(Debug, Default)]
pub(super) struct UserSpace {
    /// Requests that it has told apart.
    pub(super) requests: u64,
    /// The one that may go on.
    pub(super) current: Option<Current>,
    /// Replies given in this conversation.
    pub(super) replies: u64,
    /// The last of them in a row that made no progress.
    pub(super) no_progress: u64,
    /// On a real KVM: the last RETRY was for a chunk after whole ones. If that was a request of its own,
    /// it made no progress, and so it counts: a guest is not accused on a guess.
    pub(super) unsure: bool,
    /// On a real KVM: what the guest was told is not known before the next exit.
    pub(super) observed: Option<Observed>,
}

/// A request whose next chunk may come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Current {
    /// Where that chunk would start, without the shared bit.
    pub(super) next: u64,
    pub(super) to: Direction,
    pub(super) decision: Decision,
    /// Pages that may be converted yet.
    pub(super) left: u64,
    /// Pages that were converted.
    pub(super) converted: u64,
}

/// A request on a real KVM, as far as its chunks tell.
#[derive(Debug, Clone, Copy)]
pub(super) struct Observed {
    pub(super) request: Request,
    pub(super) stray: Option<Stray>,
    pub(super) converted: u64,
    pub(super) special: bool,
    pub(super) begun: Option<Instant>,
    pub(super) took_ns: u64,
    /// An event was queued after its last chunk: the guest got RETRY, if the request went on for this
    /// many bytes, or else SUCCESS.
    pub(super) beyond: Option<u64>,
}

impl UserSpace {
    /// A conversation begins.
    pub(super) const fn begin(&mut self) {
        (self.replies, self.no_progress) = (0, 0);
    }

    /// The request is over: with progress or without.
    pub(super) const fn replied(&mut self, progress: bool) {
        self.current = None;
        self.replies += 1;
        self.no_progress = if progress { 0 } else { self.no_progress + 1 };
    }

    /// The vCPU does something else: a request that may have gone on was complete.
    pub(super) const fn complete(&mut self) {
        if self.current.is_some() {
            self.replied(true);
        }
    }
}
