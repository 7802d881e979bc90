//! What a case runs: the guest, and what it runs on.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use mapgpa_guests::Guest;

use crate::units::show_size;

/// The most bytes of a guest's ELF, with its debug information.
const ELF_MAX: u64 = 64 << 20;

/// What runs as the guest.
#[derive(Debug, Clone)]
pub enum GuestSource {
    /// A built-in guest test.
    BuiltIn(Guest),
    /// A user's ELF.
    Elf {
        /// Its file.
        path: PathBuf,
        /// The file's bytes.
        image: Vec<u8>,
    },
}

impl GuestSource {
    /// The guest's name in reports.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::BuiltIn(guest) => guest.info().name.to_owned(),
            Self::Elf { path, .. } => path.display().to_string(),
        }
    }

    /// The ELF in the file `path`.
    ///
    /// # Errors
    /// It cannot be read, or is larger than any guest test.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let Some(image) = read_at_most(path, ELF_MAX)? else {
            let why = format!("larger than {}, the most that a guest has", show_size(ELF_MAX));
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        };
        Ok(Self::Elf { path: path.to_owned(), image })
    }
}

/// The bytes of the file `path`, or nothing if there are more than `most`. A device has no end, and a file
/// may grow: a byte more than the limit tells enough.
pub(crate) fn read_at_most(path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes).filter(|bytes| bytes.len() as u64 <= most))
}

/// What a guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A plain KVM VM; the VMM plays the TDX module.
    Emulated,
    /// A real TD.
    Tdx,
    /// This process.
    Hosted,
}

impl Backend {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Emulated => "emulated",
            Self::Tdx => "tdx",
            Self::Hosted => "hosted",
        }
    }
}
