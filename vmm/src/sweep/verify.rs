//! Cells of a sweep that are run in VMs too, with the sweep's first seed: by the same guest test, and
//! by a real kernel that the first guest models. Verdict and number of calls have to be the same.
//!
//! A kernel's first conversion is swiotlb, whose size is set to the sweep's range; it begins with the
//! first call of the boot, as the guest test's does. So both meet the same draws.

use std::collections::BTreeMap;

use mapgpa_abi::params::BOUND_OWN;

use super::{Sums, Sweep, Tally, Verified, one};
use crate::backend::emulated;
use crate::case::{Backend, Case};
use crate::interrupt;
use crate::judge::Check;
use crate::linux::case::LinuxCase;
use crate::one_line;
use crate::policy::Policy;
use crate::report::Outcome;
use crate::units::show_size;

/// The most calls of a conversion that is run in a VM too: a second or two.
const CALLS: u64 = 50_000;
/// The most of one that is run with a kernel, whose exits may be slow.
const KERNEL_CALLS: u64 = 20_000;

/// What a run in a VM gave: whether the conversion survived, and its calls.
type Found = Result<(bool, u64), String>;

impl Sweep {
    /// Runs cells in VMs, and calls `found` with each; if none, why.
    pub(super) fn verify(
        &self,
        cases: &[Case],
        sums: &BTreeMap<usize, Sums>,
        kernel: Option<LinuxCase>,
        mut found: impl FnMut(Verified),
    ) -> Option<String> {
        if self.verify == 0 {
            return Some("not asked for".to_owned());
        }
        if let Err(error) = emulated::default_gpaw() {
            return Some(one_line(&error));
        }
        for (at, first) in self.sample(sums, CALLS, |_| true) {
            if interrupt::requested() {
                break;
            }
            let case = Case { backend: Backend::Emulated, ..cases[at].clone() };
            let vm = one(&case).map(|tally| (tally.survived(), tally.calls));
            let vm = vm.map_err(|error| one_line(&error));
            found(self.compared(at, &sums[&at], first, None, vm));
        }
        let mut kernel = kernel?;
        let is_its = |at| self.specs(at).0.is_as_modelled() && at < self.hosts.len();
        for (at, first) in self.sample(sums, KERNEL_CALLS, is_its) {
            if interrupt::requested() {
                break;
            }
            let vm = self.boot(&mut kernel, &cases[at].policy);
            let failed = vm.is_err();
            found(self.compared(at, &sums[&at], first, Some(kernel.name()), vm));
            if failed {
                // So would the others.
                break;
            }
        }
        None
    }

    /// Cells spread over all that `is_wanted` and that a VM does soon, and their runs with the first
    /// seed.
    fn sample(
        &self,
        sums: &BTreeMap<usize, Sums>,
        most_calls: u64,
        is_wanted: impl Fn(usize) -> bool,
    ) -> Vec<(usize, Tally)> {
        let candidates: Vec<(usize, Tally)> = sums
            .iter()
            .filter_map(|(at, sums)| Some((*at, sums.first?)))
            .filter(|(at, first)| first.calls <= most_calls && !first.timed_out && is_wanted(*at))
            .collect();
        let wanted = self.verify.min(candidates.len());
        (0..wanted).map(|n| candidates[n * candidates.len() / wanted]).collect()
    }

    /// Boots the kernel until its first conversion has ended.
    fn boot(&self, kernel: &mut LinuxCase, policy: &Policy) -> Found {
        kernel.run.policy = policy.clone();
        let ran = kernel.run(None).map_err(|error| one_line(&error))?;
        if let Some(error) = ran.error {
            return Err(one_line(&error));
        }
        let first = ran.report.conversations.first();
        let first = first.ok_or_else(|| "the kernel made no conversion".to_owned())?;
        if first.size != self.range {
            let (size, range) = (show_size(first.size), show_size(self.range));
            return Err(format!("the kernel's first conversion is of {size}, not of {range}"));
        }
        let lost = |check| check == Check::FalseSuccess;
        let missing = ran.report.violations.iter().any(|violation| lost(violation.check));
        Ok((first.outcome == Outcome::Completed && !missing, first.requests))
    }

    /// What was found in a VM beside what was found here.
    fn compared(
        &self,
        at: usize,
        sums: &Sums,
        first: Tally,
        kernel: Option<&str>,
        vm: Found,
    ) -> Verified {
        let cell = self.cell(at, sums);
        Verified {
            guest: cell.guest,
            kernel: kernel.map(str::to_owned),
            policy: cell.policy,
            bound: cell.bound,
            guest_chunk: cell.guest_chunk,
            seed: self.seed,
            survived: first.survived(),
            calls: first.calls,
            vm_survived: vm.as_ref().ok().map(|(survived, _)| *survived),
            vm_calls: vm.as_ref().ok().map(|(_, calls)| *calls),
            error: vm.err(),
        }
    }
}

impl super::GuestSpec {
    /// Whether it is as its model: with its own bound, and asking for all.
    #[must_use]
    pub const fn is_as_modelled(&self) -> bool {
        self.bound == BOUND_OWN && self.guest_chunk == 0
    }
}
