//! The fault thread: decides what becomes of a touch of a missing page in registered memory.

use std::io::{self, PipeReader};
use std::os::fd::AsFd;

use mapgpa_abi::{Alias, PAGE_SIZE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::EmulatedError;
use super::model::Model;
use super::userfaultfd::Userfaultfd;
use super::vcpu::Run;
use crate::engine::{EventSink, Flow};

/// Answers touches until the other end of `done` is closed, when all vCPUs have ended. To close it needs
/// nothing that the host could refuse.
///
/// A touch that the page map allows gets its page; one that it forbids is an event first. Either
/// way the page is filled while the engine is held, so that no conversion comes in between. Should
/// that fail, everything is unregistered, lest a vCPU waits for ever.
pub(super) fn serve<M: Model, S: EventSink, P>(
    run: &Run<'_, M, S, P>,
    userfaultfd: &Userfaultfd,
    done: &PipeReader,
    shared_bit: u64,
) {
    if let Err(error) = answer(run, userfaultfd, done, shared_bit) {
        run.fail(EmulatedError::Fault(error));
        for region in run.ram.regions() {
            for alias in [Alias::Private, Alias::Shared] {
                let (start, size) = region.host(alias, region.pages);
                // The run has failed already; there is nobody else to tell.
                let _ = userfaultfd.unregister(start, size);
            }
        }
    }
}

fn answer<M: Model, S: EventSink, P>(
    run: &Run<'_, M, S, P>,
    userfaultfd: &Userfaultfd,
    done: &PipeReader,
    shared_bit: u64,
) -> io::Result<()> {
    loop {
        let mut fds = [
            PollFd::new(userfaultfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(done.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_done = fds[1].any().unwrap_or(false);
        while let Some(address) = userfaultfd.read_fault()? {
            // Held until the page is there.
            let mut engine = run.engine();
            if let Some((alias, page)) = run.ram.find(address) {
                let bit = if alias == Alias::Shared { shared_bit } else { 0 };
                if let Err(flow) = engine.touch((page * PAGE_SIZE) | bit) {
                    engine.memory().books().tainted = true;
                    if flow == Flow::Stop {
                        run.meeting.stop();
                    }
                }
            }
            userfaultfd.fill(address)?;
        }
        if is_done {
            return Ok(());
        }
    }
}
