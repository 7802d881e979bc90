//! From a seed to a case: a policy of a class, made of rules near every boundary, and what it meets.
//!
//! A policy is a script (one verdict for each of the first calls) or a list of rules with conditions,
//! and mostly a last rule without any. What a rule may do depends on the class asked for; at least one
//! rule does what only that class may. Whether that shows is up to the guest, and what a case was in
//! the end is the judge's word.

use mapgpa_abi::params::{Layout, Plan};
use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Direction, PAGE_SIZE};

use crate::case::Case;
use crate::judge::Class;
use crate::policy::{
    AcceptAnswer, Action, Amount, Anchor, Conditions, Draw, Mix, NAMED_R11, R11, Rule, Say, Stall,
};

/// What a user has fixed; the rest is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fixed {
    /// Bytes converted each way.
    pub range: Option<u64>,
    /// Which way.
    pub plan: Option<Plan>,
    /// How the pages lie.
    pub layout: Option<Layout>,
}

/// The stream of draws that makes cases: no vCPU has this number.
const STREAM: u32 = u32::MAX;

/// Pages of a range: around a page, a chunk of 64 KiB, a 2 MiB leaf.
const PAGES: [u64; 16] = [1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33, 64, 511, 512, 513, 1024];
/// The most pages that lie apart from each other.
const SCATTERED_MAX: u64 = 17;
/// Replies without progress that are no longer legal, around the bounds that guests have.
const STALLS: [u64; 8] = [3, 4, 5, 8, 15, 16, 17, 18];
/// Replies in a conversation before an odd one.
const AFTERS: [u64; 8] = [0, 0, 0, 1, 2, 3, 15, 16];
/// Call numbers at which conditions begin.
const CALLS: [u64; 10] = [1, 2, 3, 4, 5, 8, 15, 16, 17, 33];
/// Error statuses that GHCI has for MapGPA.
const REFUSALS: [u64; 4] =
    [status::INVALID_OPERAND, status::GPA_INUSE, status::ALIGN_ERROR, status::SUBFUNC_UNSUPPORTED];
/// Statuses outside the protocol: next to those that it has, and with single bits.
const ODD_STATUSES: [u64; 7] =
    [2, 3, 1 << 62, 0x8000_0000_0000_0004, 0x8000_0000_0000_0010, 1 << 32, u64::MAX];
/// Distances from an anchor, in bytes.
const OFFSETS: [i64; 17] = [
    -(1 << 30),
    -(1 << 21),
    -8192,
    -4097,
    -4096,
    -4095,
    -2048,
    -1,
    0,
    1,
    2048,
    4095,
    4096,
    4097,
    8192,
    1 << 21,
    1 << 30,
];
const CONTENTIONS: [f64; 4] = [0.1, 0.5, 0.9, 1.0];

/// Makes a case of the class for `seed` out of `case`, whose guest, backend and limits stay.
pub(super) fn generate(seed: u64, class: Class, fixed: &Fixed, case: &mut Case) {
    let mut draw = Draw::for_call(seed, STREAM, 0);
    case.layout = fixed.layout.unwrap_or(match draw.below(16) {
        0 => Layout::Scattered,
        _ => Layout::Contiguous,
    });
    case.plan = fixed.plan.unwrap_or(match draw.below(4) {
        0 => Plan::One(Direction::ToShared),
        1 => Plan::One(Direction::ToPrivate),
        _ => Plan::RoundTrip,
    });
    let mut pages = one_of(&mut draw, &PAGES);
    if case.layout == Layout::Scattered {
        pages = pages.min(SCATTERED_MAX);
    }
    // Each vCPU has a page at least.
    pages = pages.max(case.vcpus as u64);
    case.range = fixed.range.unwrap_or(pages * PAGE_SIZE);
    case.seed = seed;
    let start = case.range_gpa();
    let mut maker =
        Maker { draw, class, pages: case.range / PAGE_SIZE, start, vcpus: case.vcpus as u64 };
    maker.rules(&mut case.policy.rules);
}

/// Makes the rules of a policy for a kernel: nothing is known of the ranges that it converts.
pub(super) fn generate_rules(seed: u64, class: Class, vcpus: usize, rules: &mut Vec<Rule>) {
    let draw = Draw::for_call(seed, STREAM, 0);
    // 64 MiB of swiotlb is the largest that a kernel converts when it boots.
    Maker { draw, class, pages: 16384, start: 0, vcpus: vcpus as u64 }.rules(rules);
}

fn one_of<T: Copy>(draw: &mut Draw, values: &[T]) -> T {
    let pick = draw.below(values.len() as u64);
    values[usize::try_from(pick).unwrap_or(0)]
}

/// What rules are made from.
struct Maker {
    draw: Draw,
    class: Class,
    pages: u64,
    /// GPA of the range, or 0 if that is unknown.
    start: u64,
    vcpus: u64,
}

impl Maker {
    fn rules(&mut self, rules: &mut Vec<Rule>) {
        rules.clear();
        let count = 1 + self.draw.below(4);
        let script = self.draw.chance(0.5);
        let proper = self.draw.below(count);
        for index in 0..count {
            let when = if script {
                Conditions { calls: Some((index + 1, index + 1)), ..Conditions::default() }
            } else {
                self.conditions()
            };
            let action = if index == proper { self.proper() } else { self.action() };
            rules.push(Rule { when, action });
        }
        if self.draw.chance(0.75) {
            let action = self.action();
            rules.push(Rule { when: Conditions::default(), action });
        }
    }

    fn conditions(&mut self) -> Conditions {
        let mut when = Conditions::default();
        if self.draw.chance(0.25) {
            let either = [Direction::ToShared, Direction::ToPrivate];
            when.direction = Some(one_of(&mut self.draw, &either));
        }
        if self.draw.chance(0.35) {
            let first = one_of(&mut self.draw, &CALLS);
            let more = one_of(&mut self.draw, &[0, 0, 1, 2, 13, 1000]);
            when.calls = Some((first, first + more));
        }
        if self.start != 0 && self.draw.chance(0.25) {
            let first = self.near_page();
            let last = self.near_page().max(first);
            let gpa = |page| self.start + page * PAGE_SIZE;
            when.gpa = Some((gpa(first), gpa(last)));
        }
        if self.vcpus > 1 && self.draw.chance(0.5) {
            when.vcpu = u32::try_from(self.draw.below(self.vcpus)).ok();
        }
        when
    }

    /// A page of the range near one of its ends, its middle, or a boundary of 2 MiB.
    fn near_page(&mut self) -> u64 {
        let at = [0, self.pages / 2, self.pages, 16, 512];
        let at = one_of(&mut self.draw, &at) + self.draw.below(3);
        at.saturating_sub(1)
    }

    /// A number of pages, from 1, near what makes a difference.
    fn chunk(&mut self) -> Amount {
        if self.draw.chance(0.4) {
            return Amount::Pages(1 + self.draw.below(3));
        }
        Amount::Pages(self.near_page().max(1))
    }

    /// What any class up to the asked one may do.
    fn action(&mut self) -> Action {
        let class = match self.class {
            Class::Legal => 0,
            Class::Stalling => self.draw.below(2),
            Class::Refusing => self.draw.below(3),
            Class::Hostile => self.draw.below(4),
        };
        self.of(match class {
            0 => Class::Legal,
            1 => Class::Stalling,
            2 => Class::Refusing,
            _ => Class::Hostile,
        })
    }

    /// What the class asked for may do, and no lower one.
    fn proper(&mut self) -> Action {
        self.of(self.class)
    }

    fn of(&mut self, class: Class) -> Action {
        match class {
            Class::Legal => self.legal(),
            Class::Stalling => self.stalling(),
            Class::Refusing => self.status(&REFUSALS),
            Class::Hostile => self.hostile(),
        }
    }

    /// True replies, at most two in a row without progress.
    fn legal(&mut self) -> Action {
        let mut action = match self.draw.below(16) {
            0 => Action::COMPLETE,
            1 => Action { mix: Some(Mix::Legal), ..Action::COMPLETE },
            2 => {
                let cost = 100;
                let budget_ns = cost * (1 + self.draw.below(self.pages));
                let amount = Amount::Budget { budget_ns, cost_ns: Some(cost) };
                Action { amount, amount_given: true, ..Action::COMPLETE }
            }
            3..8 => {
                let stall = Some(Stall::Times(1 + self.draw.below(2)));
                let after = one_of(&mut self.draw, &AFTERS);
                Action { stall, after, ..self.chunked() }
            }
            _ => self.chunked(),
        };
        if action.mix.is_none() && self.draw.chance(0.15) {
            let answers = [AcceptAnswer::Mismatch, AcceptAnswer::Busy];
            action.accept = one_of(&mut self.draw, &answers);
        }
        action
    }

    fn chunked(&mut self) -> Action {
        Action { amount: self.chunk(), amount_given: true, ..Action::COMPLETE }
    }

    /// True replies, three and more in a row without progress; or with progress that R11 hides; or
    /// accepts that find the page busy.
    fn stalling(&mut self) -> Action {
        let action = Action { after: one_of(&mut self.draw, &AFTERS), ..self.chunked() };
        match self.draw.below(8) {
            0 => Action { stall: Some(Stall::Forever), ..action },
            1 => Action { odd: Some(Say::Retry(R11::new(Anchor::Start, 0))), ..action },
            2 => Action { accept: AcceptAnswer::Stuck, after: 0, ..action },
            3..5 => Action { contention: Some(one_of(&mut self.draw, &CONTENTIONS)), ..action },
            _ => Action { stall: Some(Stall::Times(one_of(&mut self.draw, &STALLS))), ..action },
        }
    }

    fn odd(&mut self, say: Say) -> Action {
        Action { odd: Some(say), after: one_of(&mut self.draw, &AFTERS), ..self.chunked() }
    }

    /// One of the statuses, half of them with an R11 that has no meaning there.
    fn status(&mut self, codes: &[u64]) -> Action {
        let code = one_of(&mut self.draw, codes);
        let say =
            if self.draw.chance(0.5) { Say::StatusAt(code, self.r11()) } else { Say::Status(code) };
        self.odd(say)
    }

    fn hostile(&mut self) -> Action {
        match self.draw.below(16) {
            0 => Action { mix: Some(Mix::Hostile), ..Action::COMPLETE },
            1 => Action { accept: AcceptAnswer::Already, ..self.chunked() },
            2 => Action { accept: AcceptAnswer::Exit, ..self.chunked() },
            3 => self.odd(Say::Success),
            4..6 => self.status(&ODD_STATUSES),
            _ => {
                let r11 = self.r11();
                self.odd(Say::Retry(r11))
            }
        }
    }

    /// An R11: a named one, one at a distance from an anchor, a page of the range in either alias, or a
    /// value near one that registers have.
    fn r11(&mut self) -> R11 {
        let bit = 1 << 47;
        match self.draw.below(8) {
            0..3 => {
                let named = NAMED_R11.len() as u64;
                let pick = usize::try_from(self.draw.below(named)).unwrap_or(0);
                NAMED_R11[pick].1
            }
            3..6 => {
                let anchor = [Anchor::Start, Anchor::Next, Anchor::End];
                let anchor = one_of(&mut self.draw, &anchor);
                R11::new(anchor, one_of(&mut self.draw, &OFFSETS))
            }
            6 => {
                let page = self.start + self.near_page() * PAGE_SIZE;
                R11::new(Anchor::Zero, one_of(&mut self.draw, &[page, page | bit]).cast_signed())
            }
            _ => {
                let values = [
                    0,
                    1,
                    PAGE_SIZE,
                    bit,
                    bit << 1,
                    bit << 4,
                    1 << 63,
                    u64::MAX,
                    u64::MAX - 0xfff,
                    i64::MAX.cast_unsigned(),
                ];
                R11::new(Anchor::Zero, one_of(&mut self.draw, &values).cast_signed())
            }
        }
    }
}
