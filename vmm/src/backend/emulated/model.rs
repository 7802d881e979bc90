//! Memory models: how the memory behind both aliases is made, converted and watched.

use super::alias::AliasMemory;
use super::protected::ProtectedMemory;
use crate::memory::{HostWork, Memory};

/// What a run asks of guest memory beside conversions.
pub(super) trait Model: Memory {
    /// A forbidden access was let through: from now on a conversion clears what it may have left.
    fn taint(&mut self);

    /// What conversions and accepts cost the host since the last [`Model::reset_work`].
    fn work(&self) -> HostWork;

    /// Forgets what was done: it belongs to the setting up.
    fn reset_work(&mut self);

    /// The checks that cannot be made, by name.
    fn checks_off(&self) -> &'static [&'static str];
}

impl Model for AliasMemory<'_> {
    fn taint(&mut self) {
        self.tainted = true;
    }

    fn work(&self) -> HostWork {
        self.work
    }

    fn reset_work(&mut self) {
        self.work = HostWork::default();
    }

    fn checks_off(&self) -> &'static [&'static str] {
        match self.userfaultfd {
            Some(_) => &[],
            None => &["wrong-alias", "access-before-accept"],
        }
    }
}

impl Model for ProtectedMemory<'_> {
    fn taint(&mut self) {
        self.tainted = true;
    }

    fn work(&self) -> HostWork {
        self.work
    }

    fn reset_work(&mut self) {
        self.work = HostWork::default();
    }

    /// A pending page is private for KVM already, which gives the guest memory when it touches it.
    fn checks_off(&self) -> &'static [&'static str] {
        match self.userfaultfd {
            Some(_) => &["access-before-accept"],
            None => &["wrong-alias", "access-before-accept"],
        }
    }
}
