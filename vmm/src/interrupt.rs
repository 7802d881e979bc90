//! Ctrl-C: a flag that every loop of a run looks at, so that what was measured is kept.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

fn flag() -> &'static Arc<AtomicBool> {
    FLAG.get_or_init(Arc::default)
}

/// From now on SIGINT and SIGTERM set the flag; a second one kills the process as usual.
///
/// # Errors
/// The host refuses to install a signal handler.
pub fn install() -> std::io::Result<()> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The order matters: the first signal finds the flag unset, sets it, and goes on.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(flag()))?;
        signal_hook::flag::register(signal, Arc::clone(flag()))?;
    }
    Ok(())
}

/// Whether the user wants the process to end.
pub fn requested() -> bool {
    flag().load(Ordering::Relaxed)
}
