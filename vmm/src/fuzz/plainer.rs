//! What is plainer than a rule: how much there is to understand in one, and what may be tried instead.

use mapgpa_abi::tdcall::status;

use crate::policy::{
    AcceptAnswer, Action, Amount, Anchor, Conditions, DEFAULT_CHUNK, NAMED_R11, R11, Say, Stall,
};

/// How much there is to understand in conditions.
pub(super) fn weight_of_conditions(when: &Conditions) -> u64 {
    let calls = |(first, last): (u64, u64)| 5 + u64::from(first != last) + (first - 1).min(8);
    when.direction.map_or(0, |_| 4)
        + when.vcpu.map_or(0, |_| 4)
        + when.gpa.map_or(0, |_| 20)
        + when.calls.map_or(0, calls)
}

/// How much there is to understand in an action.
pub(super) fn weight_of_action(action: &Action) -> u64 {
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
    let accept = match action.accept {
        AcceptAnswer::Truth => 0,
        // Where `stall=forever` shows the same, a reader is better served by that.
        AcceptAnswer::Stuck => 28,
        _ => 20,
    };
    amount
        + stall
        + odd
        + action.contention.map_or(0, |_| 60)
        + action.after.min(16) * 2
        + u64::from(action.overlap_inuse) * 20
        + accept
}

/// Whether a host that does so may say what is not true, or fails the call.
pub(super) fn lies(action: &Action) -> bool {
    action.mix.is_some()
        || action.odd.is_some_and(|odd| odd != Say::Truth)
        || action.accept != AcceptAnswer::Truth
}

const PLAIN_STATUSES: [u64; 5] = [
    status::INVALID_OPERAND,
    status::GPA_INUSE,
    status::ALIGN_ERROR,
    status::SUBFUNC_UNSUPPORTED,
    1 << 62,
];

/// All but the truth, what a class may do before what only a wider one may.
const ACCEPTS: [AcceptAnswer; 5] = [
    AcceptAnswer::Mismatch,
    AcceptAnswer::Busy,
    AcceptAnswer::Stuck,
    AcceptAnswer::Already,
    AcceptAnswer::Exit,
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
pub(super) fn plainer(action: &Action) -> Vec<Action> {
    let mut all = vec![Action::COMPLETE];
    let pages = |pages| (Amount::Pages(pages), true);
    let amounts = [(Amount::All, false), pages(1), pages(2), pages(3), pages(16), pages(64)];
    let odds = NAMED_R11.iter().map(|(_, r11, _)| Say::Retry(*r11));
    let near = [(Anchor::Start, 0), (Anchor::Next, -4096), (Anchor::Next, 4096), (Anchor::Zero, 0)];
    let odds = odds.chain(near.map(|(anchor, offset)| Say::Retry(R11::new(anchor, offset))));
    let mut odds: Vec<Say> =
        odds.chain([Say::Success]).chain(PLAIN_STATUSES.map(Say::Status)).collect();
    for at in 0..odds.len() {
        if let Say::Retry(r11) = odds[at] {
            odds.push(Say::StatusAt(PLAIN_STATUSES[0], r11));
        }
    }
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
        for accept in ACCEPTS {
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
    // A status without an R11 of its own.
    let plain_status = match action.odd {
        Some(Say::StatusAt(code, _)) => Some(Action { odd: Some(Say::Status(code)), ..*action }),
        _ => None,
    };
    for action in less.into_iter().chain(afters).chain(plain_status) {
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

/// What is worth a boot: a thing that `action` does, alone or without what goes with it.
pub(super) fn parts(action: &Action) -> Vec<Action> {
    let plain = Action::COMPLETE;
    let Action { stall, contention, odd, accept, overlap_inuse, .. } = *action;
    let mut all = vec![
        Action { odd, ..plain },
        Action { stall, ..plain },
        Action { contention, ..plain },
        Action { accept, ..plain },
        Action { overlap_inuse, ..plain },
    ];
    if let Some(Say::Retry(r11)) = odd {
        // The plainest that is as far from a page's start, or as wrong.
        let near = NAMED_R11.iter().map(|(_, near, _)| *near);
        let near = near.filter(|near| near.offset & 0xfff == r11.offset & 0xfff);
        all.extend(near.map(|near| Action { odd: Some(Say::Retry(near)), ..plain }));
    }
    for action in [*action, Action { after: 0, ..*action }] {
        all.push(action);
        all.push(Action { stall: None, ..action });
        all.push(Action { contention: None, ..action });
    }
    all.extend(all.clone().into_iter().map(without_amount));
    all.retain(|action| *action != plain && is_canonical(action));
    let mut seen: Vec<Action> = Vec::new();
    all.retain(|action| {
        !seen.contains(action) && {
            seen.push(*action);
            true
        }
    });
    all
}

/// Whether a spec string reads back as just this action.
fn is_canonical(action: &Action) -> bool {
    let delays = action.stall.is_some() || action.contention.is_some() || action.odd.is_some();
    let amount =
        action.amount_given || action.amount == Amount::All || *action == without_amount(*action);
    amount && (delays || action.after == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;

    fn action(spec: &str) -> Action {
        Policy::parse(spec).expect("a spec").rules[0].action
    }

    #[test]
    fn a_boot_is_only_for_what_is_a_part_of_the_action() {
        for (of, wanted) in [
            ("chunk=8K,r11=start+1,after=2", &["r11=start+1", "chunk=8K,r11=start+1"][..]),
            ("chunk=64K,stall=1,after=1", &["stall=1", "chunk=64K", "chunk=64K,stall=1"]),
            ("chunk=4K,contention=0.1,r11=flip", &["r11=flip", "contention=0.1"]),
            ("chunk=4K,accept=already", &["accept=already"]),
        ] {
            let parts = parts(&action(of));
            for spec in wanted {
                assert!(parts.contains(&action(spec)), "{of}: no {spec} in {parts:?}");
            }
            assert!(parts.len() <= 20 && !parts.contains(&Action::COMPLETE), "{of}: {parts:?}");
            // What is written into a case is what was run.
            for part in &parts {
                assert_eq!(action(&part.to_string()), *part, "{of}");
            }
        }
    }

    #[test]
    fn those_that_lie_come_first() {
        for spec in ["r11=flip", "status=0x4000000000000000", "accept=exit", "hostile-random"] {
            assert!(lies(&action(spec)), "{spec}");
        }
        for spec in ["complete", "chunk=4K", "stall=forever", "contention=0.5"] {
            assert!(!lies(&action(spec)), "{spec}");
        }
    }
}
