//! What the engine asks of guest memory when pages change state.

use mapgpa_abi::{Alias, Direction};

use crate::pagemap::{PageMap, Pages};
use crate::patch::Patched;

/// A failed host call for a range of guest memory.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed for {} KiB of guest memory at GPA {gpa:#x}", size / 1024)]
pub struct MemoryError {
    /// The host call, by name.
    pub call: &'static str,
    /// Start of the range, GPA in bytes without the shared bit.
    pub gpa: u64,
    /// Size of the range in bytes.
    pub size: u64,
    /// The host's error.
    pub source: std::io::Error,
}

/// How guest memory in a VM is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryModel {
    /// A mapping for each alias; a conversion is a hole punch.
    #[default]
    Alias,
    /// Private memory in a guest_memfd; a conversion sets memory attributes, too.
    GuestMemfd,
}

impl MemoryModel {
    /// Its name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alias => "alias",
            Self::GuestMemfd => "guest-memfd",
        }
    }

    /// The model of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        [Self::Alias, Self::GuestMemfd].into_iter().find(|model| model.name() == name)
    }
}

/// What conversions cost the host in system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostWork {
    /// System calls that changed guest memory or what is caught of it.
    pub calls: u64,
    /// 4 KiB pages whose contents they dropped.
    pub pages: u64,
}

impl HostWork {
    /// Books a system call, and the pages that it dropped.
    pub(crate) const fn book(&mut self, pages: u64) {
        self.calls += 1;
        self.pages += pages;
    }
}

/// The backing of both aliases of guest memory. The page map has changed already when it is called.
pub trait Memory {
    /// The pages of `run` have been converted in direction `to`: contents are lost, and access
    /// through the alias that is no longer valid is caught from now on. With `keep` the private
    /// contents stay as they are (the host only pretends to remove the page).
    ///
    /// # Errors
    /// A host call failed.
    fn convert(
        &mut self,
        run: Pages,
        to: Direction,
        keep: bool,
        map: &PageMap,
    ) -> Result<(), MemoryError>;

    /// The pages of `run` have been accepted: they read as zero, and may be used.
    ///
    /// # Errors
    /// A host call failed.
    fn accept(&mut self, run: Pages, map: &PageMap) -> Result<(), MemoryError>;
}

/// Guest memory whose contents the VMM can reach, as the TDX module and the host do for a guest.
pub trait Contents: Memory {
    /// Reads what is behind `alias` at `gpa` (bytes, without the shared bit); false if that is not
    /// all RAM. The page map is not asked.
    ///
    /// # Errors
    /// A host call failed.
    fn read(&mut self, gpa: u64, alias: Alias, bytes: &mut [u8]) -> Result<bool, MemoryError>;

    /// Writes it.
    ///
    /// # Errors
    /// A host call failed.
    fn write(&mut self, gpa: u64, alias: Alias, bytes: &[u8]) -> Result<bool, MemoryError>;

    /// Replaces the TDCALLs in what the guest has written of `run` behind the private alias.
    ///
    /// # Errors
    /// A host call failed.
    fn patch(&mut self, run: Pages) -> Result<Patched, MemoryError>;

    /// The first TDCALL in what the guest has written of `run` that was not replaced, by GPA.
    ///
    /// # Errors
    /// A host call failed.
    fn find_tdcall(&mut self, run: Pages) -> Result<Option<u64>, MemoryError>;
}
