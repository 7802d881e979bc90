//! What a KVM lets a VMM say: which policies can be expressed on it, and what comes nearest to the
//! others.
//!
//! A VMM there answers chunks of 2 MiB ([`mapgpa_kvm_model`]); it chooses neither R11 nor how the TDX
//! module answers an accept. From Linux 7.2 on it can say "later" (RETRY at the start of a chunk) and
//! "no" (INVALID_OPERAND) to each. Before, "later" can only come of an event that is pending after a
//! whole chunk, so RETRY without progress cannot be had.

use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::status;
use mapgpa_kvm_model::{CHUNK, Kernel};

use crate::policy::{
    AcceptAnswer, Action, Amount, Conditions, Mix, Policy, PolicyError, Rule, Say, Stall,
};
use crate::units::show_size;

/// Pages of a chunk.
const PAGES: u64 = CHUNK / PAGE_SIZE;

/// A policy that a KVM cannot express.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[error("policy {policy} cannot be expressed on {}: {why}; {nearest} can be (--nearest takes it)", kernel.name())]
pub struct Inexpressible {
    /// The policy's name.
    pub policy: String,
    /// The kernel.
    pub kernel: Kernel,
    /// Why not.
    pub why: &'static str,
    /// What comes nearest.
    pub nearest: Policy,
}

impl Inexpressible {
    /// What a report says of a run of the nearest policy.
    #[must_use]
    pub fn note(&self) -> String {
        let Self { policy, kernel, why, nearest } = self;
        format!("{nearest} stands for {policy}, which {} cannot express: {why}", kernel.name())
    }
}

/// Says whether a VMM on `kernel` can do what `policy` does.
///
/// # Errors
/// It cannot: why not, and what comes nearest.
pub fn express(policy: &Policy, kernel: Kernel) -> Result<(), Inexpressible> {
    let mut first = None;
    let mut rules = Vec::with_capacity(policy.rules.len());
    for rule in &policy.rules {
        let (action, why) = nearest(&rule.action, kernel);
        first = first.or(why);
        rules.push(Rule { action, ..*rule });
    }
    let Some(why) = first else { return Ok(()) };
    let nearest = match rules.as_slice() {
        [Rule { when, action }] if *when == Conditions::default() => named(action),
        _ => None,
    };
    let name = format!("the nearest to {}", policy.name);
    let nearest = nearest.unwrap_or(Policy { name, rules, script: None });
    Err(Inexpressible { policy: policy.name.clone(), kernel, why, nearest })
}

/// The policy of one action by the spec string that means it, if one does.
fn named(action: &Action) -> Option<Policy> {
    let mut items = Vec::new();
    match action.amount {
        Amount::Pages(pages) if uses_amount(action) => {
            items.push(format!("chunk={}", show_size(pages * PAGE_SIZE)));
        }
        _ => {}
    }
    match action.stall {
        Some(Stall::Times(times)) => items.push(format!("stall={times}")),
        Some(Stall::Forever) => items.push("stall=forever".to_owned()),
        None => {}
    }
    if let Some(probability) = action.contention {
        items.push(format!("contention={probability}"));
    }
    match action.odd {
        Some(Say::Status(code)) => items.push(format!("status={code:#x}")),
        Some(Say::Success) => items.push("lie=success".to_owned()),
        _ => {}
    }
    if action.after > 0 {
        items.push(format!("after={}", action.after));
    }
    if items.is_empty() {
        items.push("complete".to_owned());
    }
    let policy: Result<Policy, PolicyError> = Policy::parse(&items.join(","));
    policy.ok()
}

/// The nearest action that `kernel` can express, and why it is another one, if it is.
fn nearest(action: &Action, kernel: Kernel) -> (Action, Option<&'static str>) {
    let mut near = *action;
    let mut why = None;
    let mut because = |reason| {
        why.get_or_insert(reason);
    };
    if let Some(mix) = near.mix.take() {
        because("it draws replies that KVM does not pass on");
        match (mix, kernel) {
            (Mix::Hostile, _) => near.odd = Some(Say::Success),
            (Mix::Legal, Kernel::V7_2) => {
                (near.amount, near.contention) = (Amount::Pages(PAGES), Some(0.1));
            }
            (Mix::Legal, Kernel::V6_16) => near.amount = Amount::Pages(PAGES),
        }
        near.amount_given = near.amount != Amount::All;
    }
    if near.accept != AcceptAnswer::Truth {
        because("the TDX module answers accepts, not the VMM");
        near.accept = AcceptAnswer::Truth;
    }
    if near.overlap_inuse {
        because("KVM has no GPA_INUSE");
        near.overlap_inuse = false;
    }
    match near.odd {
        Some(Say::Retry(_) | Say::Truth) => {
            because("R11 is KVM's to choose");
            near.odd = None;
        }
        Some(Say::Status(code)) if code != status::INVALID_OPERAND => {
            because("INVALID_OPERAND is the only error status that a VMM can cause");
            near.odd = Some(Say::Status(status::INVALID_OPERAND));
        }
        Some(Say::StatusAt(..)) => {
            because("R11 is KVM's to choose");
            near.odd = Some(Say::Status(status::INVALID_OPERAND));
        }
        _ => {}
    }
    if kernel == Kernel::V6_16 && (near.stall.is_some() || near.contention.is_some()) {
        because("before Linux 7.2 KVM has no RETRY without progress");
        (near.stall, near.contention) = (None, None);
    }
    let delayed = near.stall.is_some() || near.contention.is_some() || near.odd.is_some();
    if !delayed {
        near.after = 0;
    }
    if uses_amount(&near) {
        let whole = match near.amount {
            Amount::All => None,
            Amount::Pages(pages) => Some(pages),
            Amount::Budget { budget_ns, cost_ns: Some(cost) } => Some(budget_ns / cost.max(1)),
            Amount::Budget { cost_ns: None, .. } => Some(1),
        };
        if let Some(pages) = whole.filter(|pages| !pages.is_multiple_of(PAGES) || *pages == 0) {
            because("KVM hands on chunks of 2M, so that it can stop at multiples of 2M only");
            near.amount = Amount::Pages(pages.next_multiple_of(PAGES).max(PAGES));
            near.amount_given = true;
        }
    }
    (near, why)
}

/// Whether a request is ever converted in part by this action's amount, truly.
fn uses_amount(action: &Action) -> bool {
    let never = matches!(action.stall, Some(Stall::Forever)) || action.odd.is_some();
    action.after > 0 || !never
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(spec: &str, kernel: Kernel) -> Result<(), Inexpressible> {
        express(&Policy::parse(spec).expect(spec), kernel)
    }

    #[test]
    fn what_each_kernel_expresses() {
        for (spec, old, new) in [
            ("complete", None, None),
            ("chunk=2M", None, None),
            ("qemu-tdx", None, None),
            ("status=0x8000000000000000", None, None),
            ("chunk=4M,status=0x8000000000000000,after=3", None, None),
            ("lie=success", None, None),
            ("chunk=64K,lie=success", None, None),
            ("chunk=2M,stall=2", Some("chunk=2M"), None),
            ("stall=forever", Some("chunk=2M"), None),
            ("chunk=2M,contention=0.5", Some("chunk=2M"), None),
            ("chunk=64K", Some("chunk=2M"), Some("chunk=2M")),
            ("chunk=3M", Some("chunk=4M"), Some("chunk=4M")),
            ("hyperv", Some("chunk=2M"), Some("chunk=2M")),
            ("budget=50us", Some("chunk=2M"), Some("chunk=2M")),
            ("stall=2", Some("chunk=2M"), Some("chunk=2M,stall=2")),
            ("contention=0.1", Some("chunk=2M"), Some("chunk=2M,contention=0.1")),
            ("r11=end", Some("chunk=2M"), Some("chunk=2M")),
            (
                "status=0x8000000000000001",
                Some("status=0x8000000000000000"),
                Some("status=0x8000000000000000"),
            ),
            (
                "status=0x8000000000000000,after=3",
                Some("chunk=2M,status=0x8000000000000000,after=3"),
                Some("chunk=2M,status=0x8000000000000000,after=3"),
            ),
            (
                "lie=success,after=3",
                Some("chunk=2M,lie=success,after=3"),
                Some("chunk=2M,lie=success,after=3"),
            ),
            ("accept=already", Some("complete"), Some("complete")),
            ("overlap=inuse", Some("chunk=2M"), Some("chunk=2M")),
            ("random", Some("chunk=2M"), Some("chunk=2M,contention=0.1")),
            ("hostile-random", Some("lie=success"), Some("lie=success")),
        ] {
            for (kernel, expected) in [(Kernel::V6_16, old), (Kernel::V7_2, new)] {
                let found = of(spec, kernel).err().map(|error| error.nearest.name);
                assert_eq!(found.as_deref(), expected, "{spec} on {}", kernel.name());
            }
        }
    }

    #[test]
    fn the_nearest_is_expressible_and_the_message_says_it() {
        for spec in crate::suite::POLICIES {
            for kernel in Kernel::ALL {
                if let Err(error) = of(spec, kernel) {
                    assert_eq!(express(&error.nearest, kernel), Ok(()), "{spec}");
                }
            }
        }
        let error = of("chunk=64K", Kernel::V7_2).expect_err("too small");
        assert_eq!(
            error.to_string(),
            "policy chunk=64K cannot be expressed on kvm-7.2: KVM hands on chunks of 2M, so that it \
             can stop at multiples of 2M only; chunk=2M can be (--nearest takes it)"
        );
    }
}
