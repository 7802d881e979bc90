//! From a case that fails to the smallest that fails in the same way: fewer rules, fewer conditions,
//! plainer actions, smaller ranges. Every step makes the case lighter, so it ends.

use std::time::Instant;

use mapgpa_abi::params::{Layout, Plan};
use mapgpa_abi::{Direction, PAGE_SIZE};

use super::campaign::Shrinking;
use super::plainer::{lies, parts, plainer, weight_of_action, weight_of_conditions};
use super::target::{Outcome, Target};
use crate::case::RunError;
use crate::interrupt;
use crate::judge::{Check, Class};
use crate::policy::{Action, Conditions, Rule};

/// A case being made smaller.
struct Shrink<F> {
    check: Check,
    class: Class,
    target: Target,
    outcome: Outcome,
    /// Runs that there may be, and that there were.
    most: u64,
    runs: u64,
    deadline: Option<Instant>,
    /// Why a run was not made.
    refused: Option<Shrinking>,
    watch: F,
}

/// A run that was made, and what it gave.
pub(super) struct Step<'a> {
    /// How many there were, with this one.
    pub(super) runs: u64,
    /// The smaller case that it showed, if it did.
    pub(super) smaller: Option<(&'a Target, &'a Outcome)>,
}

/// Makes `target`, which fails `check` with `outcome`, as small as at most `runs` runs until `deadline`
/// show: it still fails `check`, in a class that asks no less of the guest. `watch` is told of each run.
///
/// # Errors
/// A run could not be done.
pub(super) fn shrink(
    target: Target,
    outcome: Outcome,
    check: Check,
    runs: u64,
    deadline: Option<Instant>,
    watch: impl FnMut(Step<'_>),
) -> Result<Shrinking, RunError> {
    let slow = matches!(target, Target::Kernel(_));
    let mut shrink = Shrink {
        check,
        class: outcome.class,
        target,
        outcome,
        most: runs,
        runs: 0,
        deadline,
        refused: None,
        watch,
    };
    if slow {
        // Each run is a boot: what may take most away goes first.
        shrink.alone()?;
    }
    // A lighter case opens the way to others: until nothing is found any more.
    while shrink.rules()? | shrink.options()? | shrink.conditions()? | shrink.actions()? {}
    Ok(shrink.refused.unwrap_or(Shrinking::Done))
}

impl<F: FnMut(Step<'_>)> Shrink<F> {
    /// Takes what `change` makes of the case, if that still fails so.
    fn attempt(&mut self, change: impl FnOnce(&mut Target)) -> Result<bool, RunError> {
        if self.refused.is_some() {
            return Ok(false);
        }
        let mut target = self.target.clone();
        change(&mut target);
        if let Target::Test(case) = &target
            && case.check().is_err()
        {
            return Ok(false);
        }
        if self.runs == self.most {
            self.refused = Some(Shrinking::OutOfRuns);
            return Ok(false);
        }
        self.runs += 1;
        // The user's signal comes before any time of ours.
        let outcome =
            if interrupt::requested() { None } else { target.run_until(self.deadline)? };
        let Some(outcome) = outcome else {
            self.refused = Some(Shrinking::Unfinished);
            return Ok(false);
        };
        let same = outcome.class <= self.class
            && outcome.violations.iter().any(|violation| violation.check == self.check);
        if same {
            (self.target, self.outcome) = (target, outcome);
        }
        let smaller = same.then_some((&self.target, &self.outcome));
        (self.watch)(Step { runs: self.runs, smaller });
        Ok(same)
    }

    /// One rule and no other, those that lie first; without its conditions, if it can.
    fn alone(&mut self) -> Result<(), RunError> {
        let mut rules = self.target.rules().to_vec();
        if rules.len() < 2 {
            return Ok(());
        }
        rules.sort_by_key(|rule| !lies(&rule.action));
        for rule in rules {
            let plain = Rule { when: Conditions::default(), ..rule };
            let is_plain = plain.when == rule.when;
            if self.attempt(|target| *target.rules_mut() = vec![plain])?
                || !is_plain && self.attempt(|target| *target.rules_mut() = vec![rule])?
            {
                break;
            }
        }
        Ok(())
    }

    fn rules(&mut self) -> Result<bool, RunError> {
        let mut any = false;
        let mut at = 0;
        while at < self.target.rules().len() && self.target.rules().len() > 1 {
            let removed = self.attempt(|target| {
                target.rules_mut().remove(at);
            })?;
            if removed {
                any = true;
            } else {
                at += 1;
            }
        }
        Ok(any)
    }

    fn options(&mut self) -> Result<bool, RunError> {
        let Target::Test(case) = &self.target else { return Ok(false) };
        let mut any = false;
        let pages = case.range / PAGE_SIZE;
        let (plan, layout, vcpus, seed) = (case.plan, case.layout, case.vcpus, case.seed);
        let set = |change: fn(&mut crate::case::Case, u64), value: u64| {
            move |target: &mut Target| {
                if let Target::Test(case) = target {
                    change(case, value);
                }
            }
        };
        if plan == Plan::RoundTrip {
            any |= self.attempt(set(|case, _| case.plan = Plan::One(Direction::ToShared), 0))?
                || self.attempt(set(|case, _| case.plan = Plan::One(Direction::ToPrivate), 0))?;
        }
        if layout == Layout::Scattered {
            any |= self.attempt(set(|case, _| case.layout = Layout::Contiguous, 0))?;
        }
        if vcpus > 1 {
            any |= self.attempt(set(|case, _| case.vcpus = 1, 0))?;
        }
        if seed != 1 {
            any |= self.attempt(set(|case, seed| case.seed = seed, 1))?;
        }
        for fewer in (1..=8).chain([16, 17, 32, 64, 128, 256, 512]).take_while(|n| *n < pages) {
            if self.attempt(set(|case, pages| case.range = pages * PAGE_SIZE, fewer))? {
                any = true;
                break;
            }
        }
        Ok(any)
    }

    fn conditions(&mut self) -> Result<bool, RunError> {
        let mut any = false;
        for at in 0..self.target.rules().len() {
            let old = self.target.rules()[at].when;
            let mut plainer = vec![
                Conditions::default(),
                Conditions { calls: old.calls, ..Conditions::default() },
                Conditions { direction: old.direction, ..Conditions::default() },
                Conditions { gpa: None, ..old },
                Conditions { vcpu: None, ..old },
                Conditions { direction: None, ..old },
                Conditions { calls: None, ..old },
            ];
            if let Some((first, last)) = old.calls {
                let calls = (1..=3).chain([first]).map(|call| Some((call, call)));
                plainer.extend(calls.map(|calls| Conditions { calls, ..old }));
                plainer.push(Conditions { calls: Some((1, last)), ..old });
            }
            any |= self.lighter(at, &plainer, weight_of_conditions, |target, when| {
                target.rules_mut()[at].when = when;
            })?;
        }
        Ok(any)
    }

    fn actions(&mut self) -> Result<bool, RunError> {
        let mut any = false;
        for at in 0..self.target.rules().len() {
            let action = &self.target.rules()[at].action;
            let plainer = match &self.target {
                Target::Test(_) => plainer(action),
                Target::Kernel(_) => parts(action),
            };
            any |= self.lighter(at, &plainer, weight_of_action, |target, action| {
                target.rules_mut()[at].action = action;
            })?;
        }
        Ok(any)
    }

    /// Takes the lightest of `candidates` for a part of rule `at` that still fails, if it is lighter
    /// than what is there.
    fn lighter<T: Copy + PartialEq>(
        &mut self,
        at: usize,
        candidates: &[T],
        weight: impl Fn(&T) -> u64,
        put: impl Fn(&mut Target, T) + Copy,
    ) -> Result<bool, RunError>
    where
        Target: Part<T>,
    {
        let now = weight(&self.target.part(at));
        let mut candidates: Vec<T> = candidates.to_vec();
        candidates.sort_by_key(&weight);
        for candidate in candidates.into_iter().take_while(|candidate| weight(candidate) < now) {
            if self.attempt(|target| put(target, candidate))? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// A part of a rule that can be made lighter.
trait Part<T> {
    fn part(&self, at: usize) -> T;
}

impl Part<Conditions> for Target {
    fn part(&self, at: usize) -> Conditions {
        self.rules()[at].when
    }
}

impl Part<Action> for Target {
    fn part(&self, at: usize) -> Action {
        self.rules()[at].action
    }
}
