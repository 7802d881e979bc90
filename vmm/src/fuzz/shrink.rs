//! From a case that fails to the smallest that fails in the same way: fewer rules, fewer conditions,
//! plainer actions, smaller ranges. Every step makes the case lighter, so it ends.

use mapgpa_abi::params::{Layout, Plan};
use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Direction, PAGE_SIZE};

use super::target::{Outcome, Target};
use crate::case::RunError;
use crate::interrupt;
use crate::judge::{Check, Class};
use crate::policy::{
    AcceptAnswer, Action, Amount, Anchor, Conditions, DEFAULT_CHUNK, NAMED_R11, R11, Say, Stall,
};

/// A case being made smaller.
pub(super) struct Shrink {
    check: Check,
    class: Class,
    target: Target,
    outcome: Outcome,
    /// Runs that are left.
    left: u64,
}

/// Makes `target`, which fails `check` with `outcome`, as small as at most `runs` runs show: it still
/// fails `check`, in a class that asks no less of the guest.
///
/// # Errors
/// A run could not be done.
pub(super) fn shrink(
    target: Target,
    outcome: Outcome,
    check: Check,
    runs: u64,
) -> Result<(Target, Outcome), RunError> {
    let class = outcome.class;
    let mut shrink = Shrink { check, class, target, outcome, left: runs };
    // A lighter case opens the way to others: until nothing is found any more.
    while shrink.rules()? | shrink.options()? | shrink.conditions()? | shrink.actions()? {}
    Ok((shrink.target, shrink.outcome))
}

impl Shrink {
    /// Takes what `change` makes of the case, if that still fails so.
    fn attempt(&mut self, change: impl FnOnce(&mut Target)) -> Result<bool, RunError> {
        if self.left == 0 || interrupt::requested() {
            return Ok(false);
        }
        self.left -= 1;
        let mut target = self.target.clone();
        change(&mut target);
        if let Target::Test(case) = &target
            && case.check().is_err()
        {
            return Ok(false);
        }
        let outcome = target.run()?;
        let same = !outcome.interrupted
            && outcome.class <= self.class
            && outcome.violations.iter().any(|violation| violation.check == self.check);
        if same {
            (self.target, self.outcome) = (target, outcome);
        }
        Ok(same)
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
            let plainer = plainer(&self.target.rules()[at].action);
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
        Self: Part<T>,
    {
        let now = weight(&self.part(at));
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

impl Part<Conditions> for Shrink {
    fn part(&self, at: usize) -> Conditions {
        self.target.rules()[at].when
    }
}

impl Part<Action> for Shrink {
    fn part(&self, at: usize) -> Action {
        self.target.rules()[at].action
    }
}

fn weight_of_conditions(when: &Conditions) -> u64 {
    let calls = |(first, last): (u64, u64)| 5 + u64::from(first != last) + (first - 1).min(8);
    when.direction.map_or(0, |_| 4)
        + when.vcpu.map_or(0, |_| 4)
        + when.gpa.map_or(0, |_| 20)
        + when.calls.map_or(0, calls)
}

/// How much there is to understand in an action.
fn weight_of_action(action: &Action) -> u64 {
    if action.mix.is_some() {
        return 1000;
    }
    let amount = match action.amount {
        _ if !action.amount_given => u64::from(action.amount == Amount::All && needs_chunk(action)),
        Amount::All => 2,
        Amount::Pages(pages) => 3 + pages.min(64),
        Amount::Budget { .. } => 100,
    };
    let stall = match action.stall {
        None => 0,
        Some(Stall::Times(times)) => 20 + times.min(8),
        // As plain as any that is long enough for every guest.
        Some(Stall::Forever) => 26,
    };
    let odd = match action.odd {
        None | Some(Say::Truth) => 0,
        Some(Say::Retry(r11)) => 20 + weight_of_r11(&r11),
        Some(Say::Success) => 20,
        Some(Say::Status(code)) => 20 + rank(&PLAIN_STATUSES, &code, 30),
        Some(Say::StatusAt(code, r11)) => {
            40 + rank(&PLAIN_STATUSES, &code, 30) + weight_of_r11(&r11)
        }
    };
    amount
        + stall
        + odd
        + action.contention.map_or(0, |_| 60)
        + action.after.min(16) * 2
        + u64::from(action.overlap_inuse) * 20
        + u64::from(action.accept != AcceptAnswer::Truth) * 20
}

const PLAIN_STATUSES: [u64; 5] = [
    status::INVALID_OPERAND,
    status::GPA_INUSE,
    status::ALIGN_ERROR,
    status::SUBFUNC_UNSUPPORTED,
    1 << 62,
];

fn rank<T: PartialEq>(of: &[T], value: &T, other: u64) -> u64 {
    of.iter().position(|listed| listed == value).map_or(other, |at| at as u64)
}

fn weight_of_r11(r11: &R11) -> u64 {
    if let Some(at) = NAMED_R11.iter().position(|(_, named, _)| named == r11) {
        return 1 + at as u64;
    }
    let anchor = match r11.anchor {
        Anchor::Start => 0,
        Anchor::Next => 1,
        Anchor::End => 2,
        Anchor::Zero => return if r11.offset == 0 { 14 } else { 60 },
    };
    let bits = 64 - u64::from(r11.offset.unsigned_abs().leading_zeros());
    10 + anchor + bits / 4
}

fn needs_chunk(action: &Action) -> bool {
    action.stall.is_some()
        || action.contention.is_some()
        || action.odd.is_some()
        || action.overlap_inuse
}

/// `action` as a spec string without an amount has it.
fn without_amount(action: Action) -> Action {
    let amount = if needs_chunk(&action) { Amount::Pages(DEFAULT_CHUNK) } else { Amount::All };
    Action { amount, amount_given: false, ..action }
}

/// Every action that may be tried instead of `action`.
fn plainer(action: &Action) -> Vec<Action> {
    let mut all = vec![Action::COMPLETE];
    let pages = |pages| (Amount::Pages(pages), true);
    let amounts = [(Amount::All, false), pages(1), pages(2), pages(3), pages(16), pages(64)];
    let odds = NAMED_R11.iter().map(|(_, r11, _)| Say::Retry(*r11));
    let near = [(Anchor::Start, 0), (Anchor::Next, -4096), (Anchor::Next, 4096), (Anchor::Zero, 0)];
    let odds = odds.chain(near.map(|(anchor, offset)| Say::Retry(R11::new(anchor, offset))));
    let odds: Vec<Say> =
        odds.chain([Say::Success]).chain(PLAIN_STATUSES.map(Say::Status)).collect();
    let stalls: Vec<Stall> = (1..=3).map(Stall::Times).chain([Stall::Forever]).collect();

    // One thing only, whatever it was before: what draws had in them, too.
    let plain = Action::COMPLETE;
    for (amount, amount_given) in amounts {
        let with = |action: Action| Action { amount, amount_given, ..action };
        let mut put = |action: Action| {
            all.push(if amount_given { with(action) } else { without_amount(action) });
        };
        put(plain);
        stalls.iter().for_each(|stall| put(Action { stall: Some(*stall), ..plain }));
        odds.iter().for_each(|odd| put(Action { odd: Some(*odd), ..plain }));
        for accept in [AcceptAnswer::Mismatch, AcceptAnswer::Already, AcceptAnswer::Exit] {
            put(Action { accept, ..plain });
        }
    }
    if action.mix.is_some() {
        return all;
    }
    // The same with less.
    let afters = [0, 1, 2, 3].map(|after| Action { after, ..*action });
    let less = [
        without_amount(*action),
        Action { stall: None, ..*action },
        Action { contention: None, ..*action },
        Action { odd: None, ..*action },
        Action { accept: AcceptAnswer::Truth, ..*action },
        Action { overlap_inuse: false, ..*action },
    ];
    for action in less.into_iter().chain(afters) {
        all.push(action);
        all.push(Action { after: 0, ..action });
    }
    for action in all.clone() {
        // `after` needs something that it delays, and an amount not given follows from the rest.
        if !(action.stall.is_some() || action.contention.is_some() || action.odd.is_some()) {
            all.push(Action { after: 0, ..action });
        }
    }
    all.retain(is_canonical);
    all
}

/// Whether a spec string reads back as just this action.
fn is_canonical(action: &Action) -> bool {
    let delays = action.stall.is_some() || action.contention.is_some() || action.odd.is_some();
    let amount =
        action.amount_given || action.amount == Amount::All || *action == without_amount(*action);
    amount && (delays || action.after == 0)
}
