//! Unmarked guests (kernels, firmware) at points where they have to be done with their conversions:
//! what they left pending or shared.

use super::event::{Event, EventSink, Phase};
use super::{Engine, Flow, nanos};
use crate::memory::Memory;
use crate::pagemap::{PageState, Pages};

impl<M: Memory, S: EventSink> Engine<M, S> {
    /// The phase that the guest has come to, if it is a firmware.
    pub const fn reached(&self) -> Option<Phase> {
        self.phase
    }

    /// The guest, whose RAM is `ram`, has come to `phase`, unless it is there or further already. When
    /// it has exited boot services, what it has not got through with by then it has given up, and
    /// whatever is not private and accepted is an event.
    pub fn phase(&mut self, phase: Phase, ram: Pages) -> Flow {
        if self.phase >= Some(phase) {
            return Flow::Continue;
        }
        self.phase = Some(phase);
        let at_ns = nanos(self.started.elapsed());
        let mut flow = self.emit(&Event::Phase { phase, at_ns });
        if phase != Phase::BootServicesExited {
            return flow;
        }
        for vcpu in (0..).take(self.settings.vcpus) {
            self.gave_up(vcpu);
        }
        self.check_accepts();
        let mut left: Vec<(Pages, PageState)> = Vec::new();
        self.map.scan(ram, |piece, state| {
            match left.last_mut() {
                Some((run, last)) if *last == state && run.end() == piece.first => {
                    run.count += piece.count;
                }
                _ if state == PageState::PrivateAccepted => {}
                _ => left.push((piece, state)),
            }
            true
        });
        for (pages, state) in left {
            if self.emit(&Event::Left { pages, state }) == Flow::Stop {
                flow = Flow::Stop;
            }
        }
        flow
    }

    /// The guest is done with the conversions to private that it took for done: what of them is
    /// still pending is an event.
    pub fn check_accepts(&mut self) {
        for range in std::mem::take(&mut self.returned) {
            self.check_accept(Pages { first: range.start, count: range.end - range.start });
        }
    }

    /// The guest has touched `page`, which is pending: its conversion to private, if it was one,
    /// lacks an accept.
    pub(super) fn touched_pending(&mut self, page: u64) {
        let Some(range) = self.returned.get(&page).cloned() else { return };
        self.returned.remove(range.clone());
        self.check_accept(Pages { first: range.start, count: range.end - range.start });
    }

    fn check_accept(&mut self, range: Pages) {
        if let Some(pending) = self.map.find(range, |state| state == PageState::PrivatePending) {
            self.emit(&Event::Unaccepted { range, pending });
        }
    }
}
