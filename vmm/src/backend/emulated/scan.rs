//! TDCALLs in what a guest itself has written to its memory: code that it unpacked.

use mapgpa_abi::Alias;
use mapgpa_abi::tdcall::TRAP;

use super::alias::AliasMemory;
use super::memory::{Region, memory_error};
use crate::memory::MemoryError;
use crate::pagemap::Pages;
use crate::patch::{self, Patched};

/// The most pages that are looked at in one piece; pieces overlap by one page, so that a TDCALL at
/// a border is seen whole, with the code before it.
const PIECE: u64 = 4096;

impl AliasMemory<'_> {
    /// Replaces the TDCALLs in `run` behind the private alias, in pages that are there.
    pub(super) fn patch_present(&self, run: Pages) -> Result<Patched, MemoryError> {
        let mut patched = Patched::default();
        self.each_piece(run, |region, piece, code| {
            let (sites, lookalikes) = patch::find(code);
            for at in &sites {
                region
                    .write(piece.gpa() + *at as u64, &TRAP)
                    .map_err(|error| memory_error("writing", piece, error))?;
            }
            patched = patched.and(Patched { sites: sites.len() as u64, lookalikes });
            Ok(true)
        })?;
        Ok(patched)
    }

    /// The first TDCALL in `run` behind the private alias, in pages that are there.
    pub(super) fn first_tdcall(&self, run: Pages) -> Result<Option<u64>, MemoryError> {
        let mut found = None;
        self.each_piece(run, |_, piece, code| {
            found = patch::find(code).0.first().map(|at| piece.gpa() + *at as u64);
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    /// Calls `look` with pieces of `run` that are there and their bytes, until it returns false.
    fn each_piece(
        &self,
        run: Pages,
        mut look: impl FnMut(&Region, Pages, &[u8]) -> Result<bool, MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut bytes = Vec::new();
        for region in self.ram.regions() {
            let Some(part) = region.clip(run) else { continue };
            for present in runs(&region.present(Alias::Private, part)?) {
                let mut first = present.first;
                loop {
                    let piece = Pages { first, count: PIECE.min(present.end() - first) };
                    bytes.resize(region.host(Alias::Private, piece).1, 0);
                    region
                        .read(Alias::Private, piece, &mut bytes)
                        .map_err(|error| memory_error("reading", piece, error))?;
                    if !look(region, piece, &bytes)? {
                        return Ok(());
                    }
                    if piece.end() == present.end() {
                        break;
                    }
                    first = piece.end() - 1;
                }
            }
        }
        Ok(())
    }
}

/// Pages in order, as runs.
fn runs(pages: &[u64]) -> Vec<Pages> {
    let mut runs: Vec<Pages> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some(run) if run.end() == page => run.count += 1,
            _ => runs.push(Pages { first: page, count: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use mapgpa_abi::tdcall::INSTRUCTION;

    use super::super::memory::{HOST_PAGE, Ram};
    use super::*;

    #[test]
    fn what_was_written_is_found_whole_even_across_pieces() {
        let ram = Ram::new(64 << 20).unwrap();
        let all = Pages::of_bytes(0, 64 << 20);
        let border = 2 * PIECE * HOST_PAGE as u64 - 2;
        let filler = [0x48, 0x89, 0xc8, 0xc3, 0x90, 0x90].repeat(3000);
        for at in [border, 40 << 20] {
            ram.write(at - 12_000, &filler).unwrap();
        }
        ram.populate(Pages { first: PIECE, count: 2 * PIECE });
        for at in [border, 40 << 20] {
            ram.write(at, &INSTRUCTION).unwrap();
        }
        let memory = AliasMemory::new(&ram, None).unwrap();
        assert_eq!(memory.first_tdcall(all).unwrap(), Some(border));
        assert_eq!(memory.patch_present(all).unwrap(), Patched { sites: 2, lookalikes: 0 });
        assert_eq!(memory.patch_present(all).unwrap(), Patched::default());
        assert_eq!(memory.first_tdcall(all).unwrap(), None);
    }

    #[test]
    fn runs_of_pages() {
        let run = |first, count| Pages { first, count };
        assert_eq!(runs(&[1, 2, 3, 7, 9, 10]), [run(1, 3), run(7, 1), run(9, 2)]);
        assert_eq!(runs(&[]), []);
    }
}
