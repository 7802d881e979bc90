//! Memory models: how the memory behind both aliases is made, converted and watched.

use super::alias::AliasMemory;
use super::protected::ProtectedMemory;
use crate::memory::{HostWork, Memory};

/// What any model keeps beside the memory itself.
#[derive(Debug, Default)]
pub(super) struct Books {
    /// A forbidden access was let through: from now on a conversion clears what it may have left.
    pub(super) tainted: bool,
    /// What conversions and accepts cost the host, without setting up.
    pub(super) work: HostWork,
}

/// What a run asks of guest memory beside conversions.
pub(super) trait Model: Memory {
    /// Its books.
    fn books(&mut self) -> &mut Books;

    /// The checks that cannot be made, by name.
    fn checks_off(&self) -> &'static [&'static str];
}

impl Model for AliasMemory<'_> {
    fn books(&mut self) -> &mut Books {
        &mut self.books
    }

    fn checks_off(&self) -> &'static [&'static str] {
        match self.userfaultfd {
            Some(_) => &[],
            None => &["wrong-alias", "access-before-accept"],
        }
    }
}

impl Model for ProtectedMemory<'_> {
    fn books(&mut self) -> &mut Books {
        &mut self.books
    }

    /// A pending page is private for KVM already, which gives the guest memory when it touches it.
    fn checks_off(&self) -> &'static [&'static str] {
        match self.userfaultfd {
            Some(_) => &["access-before-accept"],
            None => &["wrong-alias", "access-before-accept"],
        }
    }
}
