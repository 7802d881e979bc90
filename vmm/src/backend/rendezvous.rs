//! Where the vCPUs of a run meet: the guest's barrier, and the end of the run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::interrupt;

/// Why a run ended, seen from its vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// All are here: the vCPU runs on.
    Met,
    /// The run is over.
    Over,
    /// The deadline has passed.
    Timeout,
    /// The user wants to end.
    Interrupted,
}

/// How often a waiting vCPU looks at the clock and at Ctrl-C.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct State {
    alive: usize,
    waiting: usize,
    generation: u64,
}

/// The meeting point of the vCPUs of one run.
#[derive(Debug)]
pub struct Rendezvous {
    over: AtomicBool,
    state: Mutex<State>,
    met: Condvar,
}

impl Rendezvous {
    /// One for `vcpus` vCPUs.
    #[must_use]
    pub const fn new(vcpus: usize) -> Self {
        Self {
            over: AtomicBool::new(false),
            state: Mutex::new(State { alive: vcpus, waiting: 0, generation: 0 }),
            met: Condvar::new(),
        }
    }

    /// Ends the run for all vCPUs.
    pub fn stop(&self) {
        self.over.store(true, Ordering::Release);
        self.met.notify_all();
    }

    /// Whether the run is over.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// A vCPU has ended; the others no longer wait for it.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.alive = state.alive.saturating_sub(1);
        self.open_if_all_wait(&mut state);
    }

    /// Waits until all vCPUs that have not left wait, or the run ends.
    pub fn wait(&self, deadline: Instant) -> Wake {
        let mut state = self.lock();
        let generation = state.generation;
        state.waiting += 1;
        self.open_if_all_wait(&mut state);
        while state.generation == generation {
            if self.is_over() {
                return Wake::Over;
            }
            if interrupt::requested() {
                return Wake::Interrupted;
            }
            if Instant::now() >= deadline {
                return Wake::Timeout;
            }
            state =
                self.met.wait_timeout(state, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        Wake::Met
    }

    fn open_if_all_wait(&self, state: &mut State) {
        if state.waiting >= state.alive && state.waiting > 0 {
            state.waiting = 0;
            state.generation += 1;
            self.met.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn all_meet_and_a_leaver_is_not_waited_for() {
        let point = Rendezvous::new(3);
        std::thread::scope(|scope| {
            let waits: Vec<_> = (0..2).map(|_| scope.spawn(|| point.wait(far()))).collect();
            std::thread::sleep(Duration::from_millis(10));
            point.leave();
            for wait in waits {
                assert_eq!(wait.join().expect("no panic"), Wake::Met);
            }
        });
    }

    #[test]
    fn stop_and_deadline_wake() {
        let point = Rendezvous::new(2);
        assert_eq!(point.wait(Instant::now()), Wake::Timeout);
        let point = Rendezvous::new(2);
        std::thread::scope(|scope| {
            let wait = scope.spawn(|| point.wait(far()));
            point.stop();
            assert_eq!(wait.join().expect("no panic"), Wake::Over);
        });
    }
}
