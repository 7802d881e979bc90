//! Private contents of pages that the host only pretends to remove (policy `accept=already`): kept
//! aside while the page is shared, so that its private alias is as empty as it has to be for a
//! touch to be caught.

use std::collections::BTreeMap;

use mapgpa_abi::{Alias, PAGE_SIZE};

use super::memory::{HOST_PAGE, Region, memory_error};
use super::userfaultfd::Userfaultfd;
use crate::memory::MemoryError;
use crate::pagemap::Pages;

/// The contents kept, by page frame number; a page that is not here was zero.
#[derive(Debug, Default)]
pub(super) struct Stash {
    pages: BTreeMap<u64, Box<[u8; HOST_PAGE]>>,
}

impl Stash {
    /// Keeps the private contents of `part`, which lies in `region`.
    pub(super) fn keep(&mut self, region: &Region, part: Pages) -> Result<(), MemoryError> {
        for page in region.present(Alias::Private, part)? {
            let mut bytes = Box::new([0; HOST_PAGE]);
            let at = Pages { first: page, count: 1 };
            region
                .read(Alias::Private, at, &mut *bytes)
                .map_err(|error| memory_error("reading", at, error))?;
            if bytes.iter().any(|byte| *byte != 0) {
                self.pages.insert(page, bytes);
            }
        }
        Ok(())
    }

    /// Puts the contents of `part` back behind the private alias, where the pages are missing.
    pub(super) fn restore(
        &mut self,
        region: &Region,
        part: Pages,
        userfaultfd: Option<&Userfaultfd>,
    ) -> Result<(), MemoryError> {
        while let Some((page, bytes)) = self.take(part) {
            let at = Pages { first: page, count: 1 };
            match userfaultfd {
                // The page's block is registered, as the page is not accepted yet.
                Some(userfaultfd) => userfaultfd
                    .copy(region.host(Alias::Private, at).0, &bytes)
                    .map_err(|error| memory_error("UFFDIO_COPY", at, error))?,
                None => region
                    .write(page * PAGE_SIZE, &*bytes)
                    .map_err(|error| memory_error("writing", at, error))?,
            }
        }
        Ok(())
    }

    /// Loses the contents of `part`.
    pub(super) fn forget(&mut self, part: Pages) {
        while self.take(part).is_some() {}
    }

    fn take(&mut self, part: Pages) -> Option<(u64, Box<[u8; HOST_PAGE]>)> {
        let page = *self.pages.range(part.first..part.end()).next()?.0;
        Some((page, self.pages.remove(&page)?))
    }
}
