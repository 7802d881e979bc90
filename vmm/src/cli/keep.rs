//! What is known while a command runs, written now and then, so that a process that is killed leaves it.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{Builder, scope};
use std::time::{Duration, Instant};

/// The pause between two looks for news: what is written soon is 100 ms old at most.
const PAUSE: Duration = Duration::from_millis(40);
/// The pause, to what writing took: much takes its time, but not all the time of a processor.
const PAUSE_TO_WRITE: u32 = 2;

/// Does `run`; meanwhile a thread of its own calls `write` again and again, to write what is new.
pub(super) fn keeping<T>(mut write: impl FnMut() + Send, run: impl FnOnce() -> T) -> T {
    let (over, ended) = channel::<()>();
    scope(|scope| {
        let keep = move || {
            let mut pause = PAUSE;
            while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let began = Instant::now();
                write();
                pause = PAUSE.max(began.elapsed() * PAUSE_TO_WRITE);
            }
        };
        // Where no thread can be had, the run is as good without.
        drop(Builder::new().spawn_scoped(scope, keep));
        let result = run();
        drop(over);
        result
    })
}
