//! Backends: what a guest runs on. Each takes a [`Setup`] and the engine's settings, runs the guest
//! to its end, and gives back the consumer of its events in an [`End`].

pub mod emulated;
pub mod guest_memfd;
pub mod hosted;
mod rendezvous;
pub mod tdx;

use std::time::Duration;

use mapgpa_abi::params::Params;

pub use rendezvous::{Rendezvous, Wake};

use crate::memory::{HostWork, MemoryModel};
use crate::pagemap::Pages;

/// A guest test and the machine that it gets.
#[derive(Debug, Clone)]
pub struct Setup<'a> {
    /// The guest's ELF image; backend `hosted` runs the built-in guest that `params` names instead.
    pub image: &'a [u8],
    /// What the parameter page says.
    pub params: Params,
    /// Size of guest memory in bytes.
    pub memory: u64,
    /// How it is made, in a VM.
    pub memory_model: MemoryModel,
    /// Pages that are shared from the start.
    pub shared: Option<Pages>,
    /// When the guest is ended at the latest, from its first instruction on.
    pub timeout: Duration,
}

/// How a run ended, beside what its events say.
#[derive(Debug)]
pub struct End<S, E> {
    /// The consumer of the events.
    pub sink: S,
    /// Exits to the VMM.
    pub exits: u64,
    /// What its conversions cost the host, without those that set the run up.
    pub work: HostWork,
    /// The user interrupted the run.
    pub interrupted: bool,
    /// Checks that could not be made, by name.
    pub checks_off: &'static [&'static str],
    /// What ended the run early, if it was no doing of the guest.
    pub error: Option<E>,
}
