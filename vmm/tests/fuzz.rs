//! The fuzzer as a library: what it finds, that it finds the same, and that it makes what was asked.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

use std::collections::BTreeSet;

use mapgpa::case::{Case, GuestSource};
use mapgpa::fuzz::{Campaign, Finding, Fixed, Fuzz, Live, Target};
use mapgpa::judge::{Check, Class};
use mapgpa::policy::{AcceptAnswer, Action, Policy, Say};
use mapgpa_abi::tdcall::status;
use mapgpa_guests::{GUESTS, Guest};

const CLASSES: [Class; 4] = [Class::Legal, Class::Stalling, Class::Refusing, Class::Hostile];

fn fuzz(guest: Guest, class: Class, seeds: u64) -> Fuzz {
    let policy = Policy::of("fuzz", Action::COMPLETE);
    Fuzz {
        target: Target::Test(Box::new(Case::new(GuestSource::BuiltIn(guest), policy))),
        class,
        fixed: Fixed::default(),
        seed: 1,
        seeds,
        shard: (1, 1),
        jobs: 2,
        time: None,
        stop: false,
        shrink_runs: 20_000,
    }
}

fn run(fuzz: &Fuzz) -> Campaign {
    let live = Live::new(fuzz);
    fuzz.run(&live, |_| {});
    let campaign = live.into_campaign();
    assert!(campaign.error.is_none(), "{:?}", campaign.error);
    campaign
}

/// All of a finding that must not depend on workers and shards.
fn line(finding: &Finding) -> String {
    let Target::Test(case) = &finding.target else { panic!("a guest test") };
    let Case { range, plan, layout, seed, .. } = **case;
    let rules = &case.policy.rules;
    format!("{} {} {range} {plan:?} {layout:?} {seed} {rules:?}", finding.check, finding.seed)
}

fn lines(campaign: &Campaign) -> Vec<String> {
    campaign.findings.iter().map(line).collect()
}

fn checks(campaign: &Campaign) -> Vec<Check> {
    campaign.findings.iter().map(|finding| finding.check).collect()
}

#[test]
fn openvmm_under_hostile_policies() {
    let campaign = run(&fuzz(Guest::Openvmm, Class::Hostile, 5_000));
    let found = checks(&campaign);
    for check in [Check::FalseSuccess, Check::WildRequest, Check::Unbounded] {
        assert!(found.contains(&check), "{check}: {found:?}");
    }
    for finding in &campaign.findings {
        assert!(finding.target.rules().len() <= 3, "{}", line(finding));
        assert!(finding.outcome.checks().contains(&finding.check), "{}", line(finding));
        assert!(finding.rules >= finding.target.rules().len());
    }
}

#[test]
fn edk2_2023_under_legal_policies_accepts_only_the_tail() {
    let campaign = run(&fuzz(Guest::Edk2Y2023, Class::Legal, 1_000));
    assert_eq!(checks(&campaign), [Check::AccessBeforeAccept, Check::AcceptMissing]);
    assert!(campaign.findings.iter().all(|finding| finding.target.rules().len() == 1));
}

/// Nothing holds against `reference`, and every policy is of the class that was asked for: more than
/// that is an error of the campaign. What a class is about occurs, too.
#[test]
fn reference_under_every_class() {
    for class in CLASSES {
        let campaign = run(&fuzz(Guest::Reference, class, 20_000));
        assert_eq!(lines(&campaign), [""; 0], "{class:?}");
        assert_eq!(campaign.ran, 20_000);
        let most = if class == Class::Legal { 20_000 } else { 19_999 };
        assert!((4_000..=most).contains(&campaign.reached), "{class:?}: {}", campaign.reached);
    }
}

/// A guest that does odd things makes no policy look like one of a higher class.
#[test]
fn every_guest_under_every_class() {
    for info in GUESTS.iter().filter(|info| info.hosted) {
        for class in CLASSES {
            run(&fuzz(info.guest, class, 1_000));
        }
    }
}

/// What only a class may do is drawn in it and in wider ones, and nowhere else.
#[test]
fn each_class_draws_what_it_may_do() {
    // The lowest class that may do it, if it is one of the things that are looked for.
    let lowest = |action: &Action| match (action.accept, action.odd) {
        (AcceptAnswer::Busy, _) => Some(Class::Legal),
        (AcceptAnswer::Stuck, _) => Some(Class::Stalling),
        (_, Some(Say::StatusAt(status::INVALID_OPERAND..=status::ALIGN_ERROR, _))) => {
            Some(Class::Refusing)
        }
        (_, Some(Say::StatusAt(..0x100, _))) => Some(Class::Hostile),
        _ => None,
    };
    for class in CLASSES {
        let fuzz = fuzz(Guest::Reference, class, 1);
        let mut drawn = BTreeSet::new();
        for seed in 1..=2_000 {
            let mut target = fuzz.target.clone();
            fuzz.make(seed, &mut target);
            drawn.extend(target.rules().iter().filter_map(|rule| lowest(&rule.action)));
        }
        let may: BTreeSet<_> = CLASSES.into_iter().filter(|lowest| *lowest <= class).collect();
        assert_eq!(drawn, may, "{class:?}");
    }
}

/// A busy accept is found and made small; what R11 an error status has is left out where it is not why.
#[test]
fn busy_accepts_and_statuses_with_an_r11_become_plain() {
    let small = |guest, class, check| {
        let campaign = run(&fuzz(guest, class, 2_000));
        let finding = campaign.findings.iter().find(|finding| finding.check == check);
        let rules = finding.expect("found").target.rules();
        rules.iter().map(|rule| rule.action.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(small(Guest::Linux67, Class::Legal, Check::GaveUp), ["accept=busy"]);
    assert_eq!(small(Guest::Svsm, Class::Stalling, Check::Unbounded).len(), 1);
    let swallowed = small(Guest::Gramine34, Class::Refusing, Check::FalseSuccess);
    assert_eq!(swallowed, ["status=0x8000000000000000"]);
}

#[test]
fn workers_and_shards_find_the_same() {
    let whole = fuzz(Guest::Gramine34, Class::Hostile, 3_001);
    let one = run(&Fuzz { jobs: 1, ..whole.clone() });
    assert_eq!(one.ran, 3_001);
    let many = run(&Fuzz { jobs: 7, ..whole.clone() });
    assert_eq!(lines(&one), lines(&many));
    let counts = |campaign: &Campaign| (campaign.ran, campaign.reached, campaign.requests);
    assert_eq!(counts(&one), counts(&many));

    let shards: Vec<_> =
        (1..=16).map(|index| run(&Fuzz { shard: (index, 16), ..whole.clone() })).collect();
    assert_eq!(shards.iter().map(|shard| shard.ran).sum::<u64>(), one.ran);
    assert_eq!(shards.iter().map(|shard| shard.requests).sum::<u64>(), one.requests);
    for finding in &one.findings {
        let of = |shard: &&Campaign| checks(shard).contains(&finding.check);
        let all = shards.iter().filter(of).flat_map(|shard| &shard.findings);
        let same: Vec<_> = all.filter(|other| other.check == finding.check).collect();
        assert_eq!(same.iter().map(|other| other.count).sum::<u64>(), finding.count);
        let lowest = same.iter().min_by_key(|other| other.seed).expect("found by one");
        assert_eq!(line(lowest), line(finding));
    }
}

#[test]
fn the_first_violation_is_that_of_the_lowest_seed() {
    let all = fuzz(Guest::Svsm, Class::Hostile, 3_000);
    let lowest = run(&all).findings.iter().map(|finding| finding.seed).min().expect("some");
    for jobs in [1, 5] {
        let campaign = run(&Fuzz { stop: true, jobs, ..all.clone() });
        assert!(campaign.findings.iter().all(|finding| finding.seed == lowest));
        assert_eq!(campaign.ran, lowest, "seeds from 1 to the lowest");
    }
}

#[test]
fn no_seed_is_begun_after_the_time() {
    let campaign = run(&Fuzz {
        time: Some(std::time::Duration::ZERO),
        ..fuzz(Guest::Svsm, Class::Legal, 1_000)
    });
    assert_eq!((campaign.ran, campaign.left_out), (0, 1_000));
}
