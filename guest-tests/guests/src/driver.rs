//! The guest test around a conversion function: what is converted in which order, what is touched,
//! and what is said on the channel.

use mapgpa_kit::abi::params::{Layout, Params, Plan};
use mapgpa_kit::abi::{Alias, Direction, PAGE_SIZE, shared_bit};
use mapgpa_kit::{Td, calls, report};

use crate::guest::{Bound, Conversion, Converted, GaveUp, Guest};
use crate::line::Line;

/// Runs the guest that `params` names on this vCPU, the `vcpu`-th from 0, to its end.
pub fn run<T: Td>(td: &mut T, params: &Params, vcpu: u64) -> ! {
    let success = test(td, params, vcpu);
    report::exit(td, success)
}

/// As [`run`], up to its exit: whether that is to be with success. For a caller in the same process,
/// which has no need to leave the guest's code from within.
pub fn test<T: Td>(td: &mut T, params: &Params, vcpu: u64) -> bool {
    match Guest::from_index(params.guest) {
        Some(guest) => test_with(td, params, vcpu, |td, c| guest.convert(td, c)),
        None => report::panic(td, "there is no guest of this index"),
    }
}

/// Runs a guest test around `convert` on this vCPU, the `vcpu`-th from 0, to its end.
///
/// Each vCPU says hello, takes its part of each step of the plan, waits for the others between two
/// steps, and exits: with failure as soon as a conversion fails.
pub fn run_with<T: Td>(
    td: &mut T,
    params: &Params,
    vcpu: u64,
    convert: impl FnMut(&mut T, &Conversion) -> Converted,
) -> ! {
    let success = test_with(td, params, vcpu, convert);
    report::exit(td, success)
}

fn test_with<T: Td>(
    td: &mut T,
    params: &Params,
    vcpu: u64,
    convert: impl FnMut(&mut T, &Conversion) -> Converted,
) -> bool {
    report::hello(td);
    let shared_bit = shared_bit(calls::vp_info(td).gpaw);
    VcpuTest { td, params, vcpu, shared_bit, convert }.run().is_ok()
}

/// A guest test on one vCPU.
struct VcpuTest<'a, T, F> {
    td: &'a mut T,
    params: &'a Params,
    vcpu: u64,
    shared_bit: u64,
    convert: F,
}

impl<T: Td, F: FnMut(&mut T, &Conversion) -> Converted> VcpuTest<'_, T, F> {
    fn run(&mut self) -> Result<(), GaveUp> {
        match self.params.plan {
            Plan::One(to) => self.step(0, to),
            Plan::RoundTrip => {
                self.step(0, Direction::ToShared)?;
                self.barrier();
                self.step(1, Direction::ToPrivate)
            }
        }
    }

    /// This vCPU's part of step number `step`.
    fn step(&mut self, step: u64, to: Direction) -> Result<(), GaveUp> {
        let Params { gpa, size, layout, .. } = *self.params;
        match layout {
            Layout::Contiguous => {
                let (first, pages) = self.share();
                let gpa = gpa.wrapping_add(first * PAGE_SIZE);
                self.touch_before(step, to, gpa, pages * PAGE_SIZE);
                self.convert(step, to, gpa, pages * PAGE_SIZE)
            }
            Layout::Scattered => {
                let (first, pages) = self.share();
                for page in first..first + pages {
                    let gpa = gpa.wrapping_add(page.wrapping_mul(2 * PAGE_SIZE));
                    self.touch_before(step, to, gpa, PAGE_SIZE);
                    self.convert(step, to, gpa, PAGE_SIZE)?;
                }
                Ok(())
            }
            Layout::Overlapping => {
                if self.vcpu == 0 {
                    self.touch_before(step, to, gpa, size);
                }
                if to == Direction::ToShared {
                    // The alias that vCPU 0 touches is valid only until the first vCPU converts.
                    self.barrier();
                } else if self.vcpu != 0 {
                    return Ok(());
                }
                self.convert(step, to, gpa, size)
            }
        }
    }

    /// Which pages of the range are this vCPU's: the first, and how many. All vCPUs have as many but
    /// for the last, which has the rest too.
    fn share(&self) -> (u64, u64) {
        let pages = self.params.size / PAGE_SIZE;
        let vcpus = self.params.vcpus.max(1);
        let each = pages / vcpus;
        let first = each * self.vcpu.min(vcpus - 1);
        (first, if self.vcpu + 1 >= vcpus { pages - first } else { each })
    }

    fn barrier(&mut self) {
        if self.params.vcpus > 1 {
            report::barrier(self.td);
        }
    }

    /// One conversation, in pieces of `guest_chunk`, and the use of what it converted.
    fn convert(&mut self, step: u64, to: Direction, gpa: u64, size: u64) -> Result<(), GaveUp> {
        if size == 0 {
            // More vCPUs than pages.
            return Ok(());
        }
        let chunk = match self.params.guest_chunk / PAGE_SIZE * PAGE_SIZE {
            0 if self.params.guest_chunk == 0 => size,
            chunk => chunk.max(PAGE_SIZE),
        };
        report::begin(self.td, to, gpa, size);
        let mut accepted = 0;
        let mut done = 0;
        while done < size {
            let piece = Conversion {
                gpa: gpa.wrapping_add(done),
                size: chunk.min(size - done),
                to,
                shared_bit: self.shared_bit,
                bound: Bound::from_param(self.params.bound),
            };
            match (self.convert)(self.td, &piece) {
                Ok(pages) => accepted += pages,
                Err(GaveUp) => {
                    report::end(self.td, false, accepted);
                    return Err(GaveUp);
                }
            }
            done += piece.size;
        }
        report::end(self.td, true, accepted);
        report::use_range(self.td, to.alias(), gpa, size);
        self.touch_after(step, to.alias(), gpa, size);
        Ok(())
    }

    /// Writes to the sampled pages through the alias that is valid until the conversion.
    fn touch_before(&mut self, step: u64, to: Direction, gpa: u64, size: u64) {
        for page in sampled(size / PAGE_SIZE, self.params.touch_before) {
            let gpa = gpa.wrapping_add(page * PAGE_SIZE);
            self.td.write(to.reverse().alias(), gpa, pattern(gpa, 2 * step));
        }
    }

    /// Writes to the sampled pages through the alias that is valid now, and reads it back. A
    /// difference is no fault of the guest's: it is said in a line, once.
    fn touch_after(&mut self, step: u64, alias: Alias, gpa: u64, size: u64) {
        let mut said = false;
        for page in sampled(size / PAGE_SIZE, self.params.touch) {
            let gpa = gpa.wrapping_add(page * PAGE_SIZE);
            let written = pattern(gpa, 2 * step + 1);
            self.td.write(alias, gpa, written);
            let read = self.td.read(alias, gpa);
            if read != written && !said {
                let text = format_args!("{alias:?} {gpa:#x}: wrote {written:#x}, read {read:#x}");
                report::text(self.td, Line::new(text).as_str());
                said = true;
            }
        }
    }
}

/// `count` of `pages` page numbers, evenly spread, with the first and the last; all of them if there
/// are no more. Of one, the first.
fn sampled(pages: u64, count: u64) -> impl Iterator<Item = u64> {
    // Keeps the products below within 64 bits.
    let count = count.min(pages).min(u64::from(u32::MAX));
    let gaps = count.saturating_sub(1).max(1);
    let (gap, rest) = (pages.saturating_sub(1) / gaps, pages.saturating_sub(1) % gaps);
    (0..count).map(move |n| n * gap + n * rest / gaps)
}

/// What is written to the page at `gpa` by the `nth` touch; another value for each.
fn pattern(gpa: u64, nth: u64) -> u64 {
    gpa.wrapping_add(nth + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GUESTS;
    use crate::fake::{BIT, FakeTd, GPA, K4, M2, reply, stops};
    use mapgpa_kit::abi::Direction::{ToPrivate, ToShared};
    use mapgpa_kit::abi::channel::{VERSION, range_words, tag};
    use mapgpa_kit::abi::params::BOUND_OWN;
    use std::vec;
    use std::vec::Vec;

    const PARAMS: Params = Params {
        guest: Guest::Reference as u64,
        gpa: GPA,
        size: M2,
        plan: Plan::RoundTrip,
        layout: Layout::Contiguous,
        bound: BOUND_OWN,
        guest_chunk: 0,
        vcpus: 1,
        touch: 4,
        touch_before: 4,
        mark_replies: false,
    };

    fn range(tag: u8, field: u32, gpa: u64, size: u64) -> (u8, u32, Vec<u32>) {
        (tag, field, range_words(gpa, size).to_vec())
    }

    fn tags(td: &FakeTd) -> Vec<u8> {
        td.messages().into_iter().map(|(tag, ..)| tag).collect()
    }

    #[test]
    fn a_round_trip_is_said_in_order() {
        let mut td = FakeTd::chunked(64 * K4);
        assert!(stops(|| run(&mut td, &PARAMS, 0)));
        assert_eq!(
            td.messages(),
            [
                (tag::HELLO, VERSION, vec![]),
                range(tag::BEGIN, 1, GPA, M2),
                (tag::END, 0, vec![0]),
                range(tag::USE, 1, GPA, M2),
                range(tag::BEGIN, 0, GPA, M2),
                (tag::END, 0, vec![512]),
                range(tag::USE, 0, GPA, M2),
                (tag::EXIT, 0, vec![]),
            ]
        );
        assert_eq!(td.requests.len(), 16);
    }

    #[test]
    fn sampled_pages_are_touched_before_and_after_through_the_valid_alias() {
        let mut td = FakeTd::always(reply::SUCCESS);
        assert!(stops(|| run(&mut td, &PARAMS, 0)));
        let pages = [0, 170, 340, 511].map(|page| GPA + page * K4);
        let expected: Vec<_> = [Alias::Private, Alias::Shared, Alias::Shared, Alias::Private]
            .into_iter()
            .flat_map(|alias| pages.map(|gpa| (alias, gpa)))
            .collect();
        let written: Vec<_> = td.writes.iter().map(|&(alias, gpa, _)| (alias, gpa)).collect();
        assert_eq!(written, expected);
        assert_eq!(td.reads, [&expected[4..8], &expected[12..]].concat());
        assert_eq!(td.texts(tag::TEXT), [""; 0]);
    }

    #[test]
    fn memory_that_forgets_is_told_once_a_conversation() {
        let mut td = FakeTd::always(reply::SUCCESS);
        td.forgetful = true;
        assert!(stops(|| run(&mut td, &PARAMS, 0)));
        let texts = td.texts(tag::TEXT);
        assert_eq!(texts.len(), 2);
        assert!(texts[0].starts_with("Shared 0x40200000: wrote 0x"), "{}", texts[0]);
        assert!(texts[0].ends_with(", read 0x0"), "{}", texts[0]);
    }

    #[test]
    fn a_failure_ends_the_vcpu() {
        let mut td = FakeTd::replies([(1 << 63, 0)]);
        let params = Params { guest: Guest::Linux67.index(), ..PARAMS };
        assert!(stops(|| run(&mut td, &params, 0)));
        assert_eq!(
            td.messages()[1..],
            [range(tag::BEGIN, 1, GPA, M2), (tag::END, 1, vec![0]), (tag::EXIT, 1, vec![])]
        );
        assert_eq!(td.reads, [], "a range that was not converted is not used");
    }

    #[test]
    fn the_guest_asks_in_pieces_within_one_conversation() {
        for (guest_chunk, pieces) in
            [(M2 / 4, 4), (M2 / 4 * 3, 2), (K4, 512), (1, 512), (2 * M2, 1)]
        {
            let params = Params { guest_chunk, plan: Plan::One(ToPrivate), ..PARAMS };
            let mut td = FakeTd::always(reply::SUCCESS);
            assert!(stops(|| run(&mut td, &params, 0)));
            assert_eq!(td.requests.len(), pieces);
            let asked: u64 = td.requests.iter().map(|(_, size)| size).sum();
            assert_eq!(asked, M2);
            assert_eq!(td.messages()[2], (tag::END, 0, vec![512]));
        }
    }

    #[test]
    fn scattered_pages_are_a_conversation_each() {
        let params = Params { layout: Layout::Scattered, plan: Plan::One(ToShared), ..PARAMS };
        let mut td = FakeTd::always(reply::SUCCESS);
        assert!(stops(|| run(&mut td, &params, 0)));
        assert_eq!(td.requests.len(), 512);
        assert_eq!(td.requests[511], (BIT | (GPA + 1022 * K4), K4));
        assert_eq!(tags(&td)[..4], [tag::HELLO, tag::BEGIN, tag::END, tag::USE]);
        assert_eq!(tags(&td).len(), 1 + 3 * 512 + 1);
        assert_eq!(td.writes.len(), 2 * 512, "one page each, before and after");
    }

    #[test]
    fn vcpus_share_the_range_and_wait_between_the_steps() {
        let params = Params { vcpus: 3, size: 8 * K4, ..PARAMS };
        for (vcpu, first, pages) in [(0, 0, 2), (1, 2, 2), (2, 4, 4)] {
            for layout in [Layout::Contiguous, Layout::Scattered] {
                let params = Params { layout, ..params };
                let mut td = FakeTd::always(reply::SUCCESS);
                assert!(stops(|| run(&mut td, &params, vcpu)));
                let spread = if layout == Layout::Scattered { 2 } else { 1 };
                assert_eq!(td.requests[0].0, BIT | (GPA + first * spread * K4));
                let asked: u64 = td.requests.iter().map(|(_, size)| size).sum();
                assert_eq!(asked, 2 * pages * K4, "both steps");
                assert_eq!(tags(&td).iter().filter(|&&tag| tag == tag::BARRIER).count(), 1);
            }
        }
    }

    #[test]
    fn a_vcpu_without_pages_only_waits() {
        let params = Params { vcpus: 3, size: 2 * K4, ..PARAMS };
        let mut td = FakeTd::replies([]);
        assert!(stops(|| run(&mut td, &params, 0)));
        assert_eq!(tags(&td), [tag::HELLO, tag::BARRIER, tag::EXIT]);
    }

    #[test]
    fn overlapping_vcpus_convert_the_same_range_and_the_first_takes_it_back() {
        let params = Params { vcpus: 2, layout: Layout::Overlapping, ..PARAMS };
        let mut td = FakeTd::always(reply::SUCCESS);
        assert!(stops(|| run(&mut td, &params, 0)));
        assert_eq!(td.requests, [(BIT | GPA, M2), (GPA, M2)]);
        let to_shared = [tag::HELLO, tag::BARRIER, tag::BEGIN, tag::END, tag::USE, tag::BARRIER];
        let rest = [tag::BEGIN, tag::END, tag::USE, tag::EXIT];
        assert_eq!(tags(&td), [&to_shared[..], &rest].concat());

        let mut td = FakeTd::always(reply::SUCCESS);
        assert!(stops(|| run(&mut td, &params, 1)));
        assert_eq!(td.requests, [(BIT | GPA, M2)]);
        assert_eq!(tags(&td), [&to_shared[..], &[tag::EXIT]].concat());
        assert!(td.writes.iter().all(|(alias, ..)| *alias == Alias::Shared));
    }

    #[test]
    fn every_hosted_guest_passes_where_nothing_goes_wrong() {
        for info in GUESTS {
            let mut td = FakeTd::always(reply::SUCCESS);
            let params = Params { guest: info.guest.index(), ..PARAMS };
            assert!(stops(|| run(&mut td, &params, 0)));
            let last = td.messages().pop().unwrap();
            if info.hosted {
                assert_eq!(last, (tag::EXIT, 0, vec![]), "{}", info.name);
            } else {
                assert_eq!(last.0, tag::PANIC, "{}", info.name);
            }
        }
        let mut td = FakeTd::replies([]);
        assert!(stops(|| run(&mut td, &Params { guest: 99, ..PARAMS }, 0)));
        assert_eq!(tags(&td), [tag::PANIC]);
    }

    #[test]
    fn samples_are_spread_and_unique() {
        let pages = |pages, count| sampled(pages, count).collect::<Vec<_>>();
        assert_eq!(pages(512, 4), [0, 170, 340, 511]);
        assert_eq!(pages(3, 16), [0, 1, 2]);
        assert_eq!(pages(512, 1), [0]);
        assert_eq!(pages(1, 2), [0]);
        assert_eq!(pages(512, 0), []);
        assert_eq!(pages(0, 4), []);
        for count in 2..100 {
            let got = pages(1000, count);
            assert_eq!((got[0], got[got.len() - 1]), (0, 999));
            assert!(got.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
