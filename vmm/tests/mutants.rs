//! The judge is judged: guest `reference` with each of its guards taken out or turned round
//! (guest-tests/mutants) has to be caught, and `reference` itself not.
//!
//! docs/mutants.md shows which check caught which mutant; MAPGPA_BLESS=1 writes it.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;
#[path = "support/vcpu.rs"]
mod vcpu;

use std::fmt::Write;

use mapgpa::backend::hosted::HostedMemory;
use mapgpa::case::Case;
use mapgpa::engine::{Engine, FrontEnd, Settings};
use mapgpa::fuzz::{Fixed, Fuzz, Target};
use mapgpa::judge::{Check, Class};
use mapgpa::pagemap::Pages;
use mapgpa::report::Recorder;
use mapgpa::suite::POLICIES;
use mapgpa::units::show_size;
use mapgpa_abi::Direction;
use mapgpa_guests::{Bound, Conversion, Guest, driver};
use mapgpa_kit::report;
use mapgpa_mutants::{AnyTd, Convert, MUTANTS, Mutant, ORIGINAL};
use support::{BIT, GPA, GPAW, K4, M2, hosted};
use vcpu::{Vcpu, until_it_ends};

/// What is done with a guest.
#[derive(Debug, Clone, Copy)]
enum Trial {
    /// The guest test of a case; the TDX module may refuse a MapGPA call.
    Test { refused: Option<u64> },
    /// One conversion, of a range that its caller may or may not ask for.
    Asked(Asked, Direction),
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    gpa: u64,
    size: u64,
    valid: bool,
}

/// The first check that the guest fails.
fn caught(guest: Convert, case: &Case, trial: Trial) -> Option<&'static str> {
    let setup = case.setup(16);
    let settings = Settings {
        policy: case.policy.clone(),
        seed: case.seed,
        gpaw: GPAW,
        vcpus: 1,
        timing: false,
        front_end: FrontEnd::Direct,
    };
    let recorder = Recorder::new(case.judge(), None);
    let mut engine = Engine::new(settings, HostedMemory::default(), recorder);
    if let Some(pages) = setup.shared {
        engine.preset_shared(pages).expect("memory does not fail");
    }
    let refused = if let Trial::Test { refused } = trial { refused } else { None };
    let mut td = Vcpu::new(engine, refused);
    until_it_ends(|| match trial {
        Trial::Test { .. } => {
            driver::run_with(&mut td, &setup.params, 0, |td, c| guest(&mut AnyTd(td), c))
        }
        Trial::Asked(asked, to) => ask(&mut td, guest, asked, to),
    });
    let record = td.engine.end().1.finish().expect("no trace");
    let mut checks = record.judgement.violations.iter().map(|violation| violation.check);
    // The judge sees the replies of the VMM only: to fail is right where the TDX module refuses.
    let check = checks.find(|check| refused.is_none() || *check != Check::GaveUp);
    check.map(|check| check.info().name)
}

/// A caller that wants a range converted, which is in the other state. Where it is no range, what it
/// names is in the wanted state already: right is to leave it so.
fn ask(td: &mut Vcpu<Recorder>, guest: Convert, asked: Asked, to: Direction) -> ! {
    let Asked { gpa, size, valid } = asked;
    let inside = gpa & (BIT - 1);
    let pages = Pages::of_bytes(inside, size.min(BIT - inside));
    if valid != (to == Direction::ToShared) {
        let around = if valid { M2 / K4 } else { 0 };
        let (first, end) = (pages.first - around, (pages.end() + around).min(BIT / K4));
        let pages = Pages { first, count: end - first };
        td.engine.preset_shared(pages).expect("memory does not fail");
    }
    report::hello(td);
    report::begin(td, to, pages.gpa(), pages.count * K4);
    let conversion = Conversion { gpa, size, to, shared_bit: BIT, bound: Bound::Own };
    let converted = guest(&mut AnyTd(td), &conversion);
    report::end(td, !valid || converted.is_ok(), 0);
    report::exit(td, true)
}

/// Ranges of the guest test: the usual one; two large pages and a tail; less than a large page.
const RANGES: [u64; 3] = [M2, 2 * M2 + M2 / 2, 16 * K4];
/// What the fuzzer's legal, stalling and refusing policies do, and the suite's do not.
const BEYOND: [&str; 3] = [
    "accept=busy,chunk=4K",
    "chunk=4K,stall=15",
    concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/policies/refusal-with-r11.toml"),
];
/// Seeds that are tried at most.
const SEEDS: u64 = 10_000;

/// How a guest is caught.
#[derive(Debug, PartialEq, Eq)]
struct Catch {
    how: String,
    check: &'static str,
}

/// What catches a guest first; nothing: it survives.
fn hunt(guest: Convert, seeds: u64) -> Option<Catch> {
    policies(guest, POLICIES)
        .or_else(|| policies(guest, &BEYOND))
        .or_else(|| callers(guest))
        .or_else(|| refusals(guest))
        .or_else(|| fuzz(guest, seeds))
}

/// The guest test under each policy.
fn policies(guest: Convert, policies: &[&str]) -> Option<Catch> {
    policies.iter().find_map(|policy| {
        RANGES.iter().find_map(|range| {
            let case = Case { range: *range, ..hosted(Guest::Reference, policy) };
            let check = caught(guest, &case, Trial::Test { refused: None })?;
            let policy = &case.policy.name;
            Some(Catch { how: format!("`{policy}`, range {}", show_size(*range)), check })
        })
    })
}

/// Callers that ask for what is no range; one that asks for the last page there can be; two whose range
/// is no large page, with the other state all around.
fn callers(guest: Convert) -> Option<Catch> {
    let case = hosted(Guest::Reference, "complete");
    let top = u64::MAX - K4 + 1;
    let bad = [
        (GPA, 0),
        (GPA + 1, K4),
        (GPA, K4 - 1),
        (top, K4),
        (top, 2 * K4),
        (BIT, K4),
        (BIT - K4, 2 * K4),
        (GPA | BIT, K4),
    ];
    let good = [(BIT - K4, K4), (GPA, M2 / 2), (GPA + K4, 2 * M2)];
    let bad = bad.into_iter().map(|(gpa, size)| Asked { gpa, size, valid: false });
    let good = good.into_iter().map(|(gpa, size)| Asked { gpa, size, valid: true });
    bad.chain(good).find_map(|asked| {
        [Direction::ToShared, Direction::ToPrivate].into_iter().find_map(|to| {
            let check = caught(guest, &case, Trial::Asked(asked, to))?;
            let how = format!("a caller asks for {:#x} bytes at {:#x}", asked.size, asked.gpa);
            Some(Catch { how, check })
        })
    })
}

/// A TDX module that refuses one of the calls.
fn refusals(guest: Convert) -> Option<Catch> {
    let case = Case { range: 16 * K4, ..hosted(Guest::Reference, "chunk=4K") };
    (1..=20).find_map(|call| {
        let check = caught(guest, &case, Trial::Test { refused: Some(call) })?;
        Some(Catch { how: format!("`chunk=4K`, the TDX module refuses call {call}"), check })
    })
}

/// Policies that the fuzzer draws from seeds, of each class in turn.
fn fuzz(guest: Convert, seeds: u64) -> Option<Catch> {
    let case = hosted(Guest::Reference, "complete");
    let mut fuzz = Fuzz {
        target: Target::Test(Box::new(case)),
        class: Class::Legal,
        fixed: Fixed::default(),
        seed: 1,
        seeds,
        shard: (1, 1),
        jobs: 1,
        time: None,
        stop: true,
        shrink_runs: 0,
    };
    (1..=seeds).find_map(|seed| {
        fuzz.class = match seed % 4 {
            0 => Class::Legal,
            1 => Class::Stalling,
            2 => Class::Refusing,
            _ => Class::Hostile,
        };
        let mut target = fuzz.target.clone();
        fuzz.make(seed, &mut target);
        let Target::Test(case) = target else { return None };
        let check = caught(guest, &case, Trial::Test { refused: None })?;
        Some(Catch { how: "policies that the fuzzer draws".to_owned(), check })
    })
}

/// Why a mutant that survives is no worse than `reference`.
const REASON_ONLY: &str = "it fails all the same, and only tells another reason";
const LARGE_ONLY: &str = "the TDX module answers so a 2 MiB accept only";
const SMALL: &str = "pages are accepted all the same, more of them by 4 KiB";
const MODULE: &str =
    "a call that the TDX module refused leaves R10 as it was set, 0, which is not RETRY";
const BOUNDED: &str = "what failed is asked again, within the bound, and then fails";
const EARLIER: &str = "an arm before it has taken that value";

/// The mutants that survive: the line, what was replaced by what, and why that is right.
const EQUIVALENT: &[(&str, &str, &str, &str)] = &[
    (AT_START, "module::SUCCESS", "_", MODULE),
    (AT_START, "status::RETRY", "_", BOUNDED),
    ("(module::SUCCESS, status::RETRY)", "module::SUCCESS", "_", MODULE),
    (AHEAD, ">", ">=", EARLIER),
    (ELSEWHERE, ELSEWHERE, "", REASON_ONLY),
    (ELSEWHERE, "module::SUCCESS", "_", REASON_ONLY),
    (ELSEWHERE, "status::RETRY", "_", REASON_ONLY),
    (REFUSED, REFUSED, "", REASON_ONLY),
    (REFUSED, "module::SUCCESS", "_", REASON_ONLY),
    (LARGE, "next >= small_until", "!(next >= small_until)", SMALL),
    (LARGE, ">=", ">", SMALL),
    (
        "if large { (PAGE_SIZE_2M, level::L2M) } else { (PAGE_SIZE, level::L4K) };",
        "large",
        "false",
        SMALL,
    ),
    (
        "module::PAGE_SIZE_MISMATCH if large => small_until = next + PAGE_SIZE_2M,",
        "large",
        "true",
        LARGE_ONLY,
    ),
    (
        "module::OPERAND_BUSY if busy + 1 < STALLS => busy += 1,",
        "module::OPERAND_BUSY",
        "_",
        BOUNDED,
    ),
];
const AT_START: &str = "(module::SUCCESS, status::RETRY) if restart == next => {";
const AHEAD: &str = "if restart > next && restart < end && restart.is_multiple_of(PAGE_SIZE) =>";
const ELSEWHERE: &str = "(module::SUCCESS, status::RETRY) => Reason::Restart(restart),";
const REFUSED: &str = "(module::SUCCESS, refusal) => Reason::Status(refusal),";
const LARGE: &str =
    "next >= small_until && next.is_multiple_of(PAGE_SIZE_2M) && end - next >= PAGE_SIZE_2M;";

const HEAD: &str = "\
# The mutants of `reference`

Each guard of the retry loop in `guest-tests/guests/src/reference.rs` is taken out, or turned round, one
at a time; this is which check catches the result, and where. First the suite's policies are tried, then
some beyond them, callers that ask for what is no range, a TDX module that refuses a call, and policies
drawn from 10,000 seeds. Written by `MAPGPA_BLESS=1 cargo test --test mutants`.

| line | was | is | check | where, or why not |
|---|---|---|---|---|
";

/// A row of the table.
fn row(line: &str, was: &str, is: &str, check: &str, why: &str) -> String {
    let code =
        |text: &str| if text.is_empty() { "nothing".to_owned() } else { format!("`{text}`") };
    let was = if was == line { "all of it".to_owned() } else { code(was) };
    let cells = [code(line), was, code(is), check.to_owned(), why.to_owned()];
    format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
}

/// Holds docs/mutants.md against `text`, or writes it.
fn blessed(text: &str) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/mutants.md");
    if std::env::var_os("MAPGPA_BLESS").is_some() {
        std::fs::write(path, text).expect("written");
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        there == text,
        "docs/mutants.md is out of date: MAPGPA_BLESS=1 cargo test --test mutants"
    );
}

#[test]
fn every_mutant_of_reference_is_caught_and_reference_is_not() {
    assert_eq!(hunt(ORIGINAL, SEEDS), None, "reference itself");
    let mut table = String::new();
    let mut survivors = String::new();
    for mutant in MUTANTS {
        let Mutant { line, was, is, convert } = *mutant;
        let why = EQUIVALENT.iter().find(|known| (known.0, known.1, known.2) == (line, was, is));
        // Of those that are known to survive, a part shows that they do.
        let seeds = if why.is_some() { SEEDS / 20 } else { SEEDS };
        match (hunt(convert, seeds), why) {
            (Some(Catch { how, check }), None) => {
                table += &row(line, was, is, &format!("`{check}`"), &how);
            }
            (None, Some((.., why))) => {
                table += &row(line, was, is, "none", why);
            }
            (Some(catch), Some(_)) => panic!("{line}: {was} -> {is} is caught: {catch:?}"),
            (None, None) => {
                let _ = writeln!(survivors, "{line}: {was} -> {is}");
            }
        }
    }
    assert!(survivors.is_empty(), "not caught:\n{survivors}");
    blessed(&format!("{HEAD}{table}"));
}
