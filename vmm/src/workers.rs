//! Work that is done by several threads: this one and, as far as the host has them, others.

use std::thread::{Builder, scope};

/// Does `work` on `jobs` threads, each until it returns. A thread that cannot be started is done without:
/// the others do its part.
pub(crate) fn work(jobs: usize, work: impl Fn() + Sync) {
    scope(|scope| {
        for _ in 1..jobs {
            if Builder::new().spawn_scoped(scope, &work).is_err() {
                break;
            }
        }
        work();
    });
}
