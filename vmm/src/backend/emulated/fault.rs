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
/// A touch that the page map allows gets its page; one that it forbids is an event first. From before
/// it is read until its page is filled the engine is held, so that no conversion comes in between: one
/// could end the touch otherwise (by unregistering what it waits for), and the guest could have the page
/// converted before anybody looks at what was legitimate then. Should the filling fail, everything is
/// unregistered, lest a vCPU waits for ever.
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
        loop {
            let mut engine = run.engine();
            let Some(address) = userfaultfd.read_fault()? else { break };
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use mapgpa_abi::shared_bit;

    use super::super::alias::AliasMemory;
    use super::super::memory::Ram;
    use super::*;
    use crate::engine::{Engine, Event, FrontEnd, Settings, Then};
    use crate::pagemap::Pages;
    use crate::platform::Bare;
    use crate::policy::Policy;

    /// Touches that were forbidden.
    #[derive(Debug, Default)]
    struct Touches(Vec<u64>);

    impl EventSink for Touches {
        fn on(&mut self, event: &Event<'_>) -> Then {
            if let Event::Touch { raw_gpa, .. } = event {
                self.0.push(*raw_gpa);
            }
            Then::GoOn
        }
    }

    const GPAW: u32 = 48;
    const M2: u64 = 2 << 20;

    /// A vCPU, played by a thread, waits in a touch of a shared page. `meanwhile` is done with the
    /// engine held; then nothing waits any more. Gives what was seen of it.
    fn touch_while(
        meanwhile: impl FnOnce(&mut Engine<AliasMemory<'_>, Touches>),
    ) -> Option<Vec<u64>> {
        let userfaultfd = Userfaultfd::of_test()?;
        let ram = Ram::new(2 * M2).unwrap();
        let memory = AliasMemory::new(&ram, Some(&userfaultfd)).unwrap();
        let settings = Settings {
            policy: Policy::parse("complete").unwrap(),
            seed: 1,
            gpaw: GPAW,
            vcpus: 2,
            timing: false,
            front_end: FrontEnd::Direct,
        };
        let mut engine = Engine::new(settings, memory, Touches::default());
        let bit = shared_bit(GPAW);
        // Of a block of 2 MiB a part is shared, so that its first touches are looked at.
        engine.map_gpa(0, M2 | bit, M2 / 2).unwrap();
        let run = Run::new(engine, &ram, &Bare, 2, Instant::now() + Duration::from_secs(60));
        let (done, end) = std::io::pipe().unwrap();
        std::thread::scope(|scope| {
            let mut engine = run.engine();
            scope.spawn(|| serve(&run, &userfaultfd, &done, bit));
            let toucher = scope.spawn(|| {
                ram.regions()[0].read(Alias::Shared, Pages::of_bytes(M2, PAGE_SIZE), &mut [0; 8])
            });
            // Long enough for it to wait, and for the fault thread to have seen that.
            std::thread::sleep(Duration::from_millis(100));
            assert!(!toucher.is_finished(), "it waits for the fault thread");
            meanwhile(&mut engine);
            drop(engine);
            toucher.join().unwrap().unwrap();
            drop(end);
        });
        let (engine, _, error) = run.into_parts();
        assert!(error.is_none(), "{error:?}");
        Some(engine.end().1.0)
    }

    #[test]
    fn a_touch_that_another_conversion_ended_is_not_judged_by_what_came_after() {
        let bit = shared_bit(GPAW);
        let touches = touch_while(|engine| {
            // All of the block is shared, so that the touch goes on unseen; then its page is converted.
            engine.map_gpa(1, (M2 + M2 / 2) | bit, M2 / 2).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            engine.map_gpa(0, M2, PAGE_SIZE).unwrap();
        });
        assert!(touches.is_none_or(|touches| touches.is_empty()));
    }

    #[test]
    fn a_touch_of_a_page_that_was_converted_before_it_went_on_is() {
        let touches = touch_while(|engine| {
            engine.map_gpa(0, M2, PAGE_SIZE).unwrap();
        });
        assert!(touches.is_none_or(|touches| touches == [M2 | shared_bit(GPAW)]));
    }
}
