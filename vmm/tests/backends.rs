//! The same events on both backends, and with both memory models: random guest, policy, seed and
//! options, run in a VM and in this process, have to give the same calls, replies, conversations and
//! violations.
#![allow(clippy::expect_used, reason = "test code")]

mod harness;

use std::time::Duration;

use harness::{Needs, harness};
use mapgpa::backend::emulated;
use mapgpa::case::{Backend, Case, GuestSource};
use mapgpa::engine::FrontEnd;
use mapgpa::judge::{Check, Rules};
use mapgpa::memory::MemoryModel;
use mapgpa::policy::{Draw, Policy};
use mapgpa::report::{RunReport, Verdict};
use mapgpa::suite::POLICIES;
use mapgpa_abi::params::{BOUND_NONE, BOUND_OWN, Layout, Plan};
use mapgpa_abi::{Direction, PAGE_SIZE};
use mapgpa_guests::{GUESTS, GuestInfo};

/// Random cases compared.
const CASES: u64 = 150;

fn pick<'a, T>(draw: &mut Draw, of: &'a [T]) -> &'a T {
    &of[usize::try_from(draw.below(of.len() as u64)).expect("small")]
}

/// The case of this number, on a backend.
fn case(number: u64, backend: Backend) -> Case {
    let mut draw = Draw::for_call(0x6d61_7067, 0, number);
    let hosted: Vec<&GuestInfo> = GUESTS.iter().filter(|guest| guest.hosted).collect();
    let guest = *pick(&mut draw, &hosted);
    let both = [Plan::RoundTrip, Plan::One(Direction::ToShared), Plan::One(Direction::ToPrivate)];
    let own = *pick(&mut draw, &[true, true, false]) || !guest.takes_bound();
    Case {
        guest: GuestSource::BuiltIn(guest.guest),
        policy: Policy::parse(pick::<&str>(&mut draw, POLICIES)).expect("a policy"),
        backend,
        front_end: FrontEnd::Direct,
        stands_for: None,
        seed: draw.below(u64::MAX),
        gpaw: emulated::default_gpaw().expect("checked before"),
        plan: *pick(&mut draw, &both),
        layout: *pick(&mut draw, &[Layout::Contiguous, Layout::Contiguous, Layout::Scattered]),
        range: PAGE_SIZE << draw.below(11),
        memory: None,
        memory_model: MemoryModel::default(),
        bound: if own { BOUND_OWN } else { *pick(&mut draw, &[1, 5, BOUND_NONE]) },
        guest_chunk: *pick(&mut draw, &[0, 0, 64 << 10]),
        vcpus: 1,
        timeout: Duration::from_secs(20),
        rules: Rules::default(),
        trace: None,
    }
}

/// A run: its report, and its trace without times.
struct Seen {
    report: RunReport,
    trace: Vec<String>,
}

impl Seen {
    /// All that has to be the same, in a form that shows a difference.
    fn shown(&self) -> String {
        let Self { report, trace } = self;
        format!(
            "{:?} {:?} {:?}\n{:#?}\n{:#?}\n{:#?}\n{}",
            report.class,
            report.verdict,
            report.guest_result,
            report.violations,
            report.notes,
            report.conversations,
            trace.join("\n")
        )
    }
}

fn run(mut case: Case, directory: &std::path::Path) -> Seen {
    let trace = directory.join(format!("{}.jsonl", case.backend.name()));
    case.trace = Some(trace.clone());
    let ran = case.run().expect("a run");
    assert!(ran.error.is_none(), "{:?}", ran.error);
    let mut report = ran.report;
    report.conversations.iter_mut().for_each(|row| row.ns = 0);
    let lines = std::fs::read_to_string(&trace).expect("a trace");
    let untimed = |line: &str| line.split(",\"t_ns\"").next().unwrap_or_default().to_owned();
    Seen { report, trace: lines.lines().map(untimed).collect() }
}

/// Fails with the first line that differs.
fn same(one: &str, other: &str, name: &str) {
    let differs = one.lines().zip(other.lines()).find(|(one, other)| one != other);
    assert_eq!(differs, None, "{name}");
    assert_eq!(one.len(), other.len(), "{name}: one goes on");
}

fn both_backends_see_the_same() {
    let directory = std::env::temp_dir().join(format!("mapgpa-backends-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    for number in 0..CASES {
        let emulated = case(number, Backend::Emulated);
        let name = format!("{number}: {} under {}", emulated.guest.name(), emulated.policy);
        let vm = run(emulated, &directory).shown();
        let here = run(case(number, Backend::Hosted), &directory).shown();
        same(&vm, &here, &name);
    }
    std::fs::remove_dir_all(&directory).expect("removed");
}

/// With guest_memfd the same happens, but that an access before its accept goes unseen. Few cases, and
/// small ones: where this can run it mostly runs in the lab, which is slow.
fn guest_memfd_sees_the_same_as_alias() {
    let directory = std::env::temp_dir().join(format!("mapgpa-models-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let mut early = 0;
    for number in 0..CASES / 3 {
        let mut alias = case(number, Backend::Emulated);
        (alias.range, alias.timeout) = (alias.range.min(256 << 10), Duration::from_secs(120));
        if number == 0 {
            // It accepts only the tail of a conversion, and uses all of it.
            alias.guest = GuestSource::BuiltIn(mapgpa_guests::Guest::Edk2Y2023);
            alias.policy = Policy::parse("chunk=1M").expect("a policy");
            (alias.range, alias.plan) = (2 << 20, Plan::RoundTrip);
            (alias.layout, alias.bound, alias.guest_chunk) = (Layout::Contiguous, BOUND_OWN, 0);
        }
        let memfd = Case { memory_model: MemoryModel::GuestMemfd, ..alias.clone() };
        let name = format!("{number}: {} under {}", alias.guest.name(), alias.policy);
        let (alias, unseen) = without_early_accesses(run(alias, &directory));
        let (memfd, none) = without_early_accesses(run(memfd, &directory));
        assert_eq!(
            (&*alias.report.memory_model, &*memfd.report.memory_model),
            ("alias", "guest-memfd")
        );
        assert_eq!(alias.report.checks_off, [""; 0]);
        assert_eq!(memfd.report.checks_off, ["access-before-accept"]);
        assert_eq!(none, 0, "{name}");
        early += unseen;
        same(&alias.shown(), &memfd.shown(), &name);
    }
    assert!(early > 0, "no access before its accept in the first case");
    std::fs::remove_dir_all(&directory).expect("removed");
}

/// A run without its violations `access-before-accept`, and how many those were.
fn without_early_accesses(mut seen: Seen) -> (Seen, usize) {
    let before = seen.report.violations.len();
    seen.report.violations.retain(|violation| violation.check != Check::AccessBeforeAccept);
    let early = before - seen.report.violations.len();
    if early > 0 {
        let failed = !seen.report.violations.is_empty();
        seen.report.verdict = if failed { Verdict::Fail } else { Verdict::Pass };
    }
    (seen, early)
}

/// The same seed gives byte-identical traces, but for times, in VM after VM.
fn traces_repeat() {
    let directory = std::env::temp_dir().join(format!("mapgpa-repeat-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let again = || {
        let mut case = case(0, Backend::Emulated);
        case.guest = GuestSource::BuiltIn(mapgpa_guests::Guest::Reference);
        case.policy = Policy::parse("random").expect("a policy");
        (case.bound, case.range, case.plan) = (BOUND_OWN, 1 << 20, Plan::RoundTrip);
        run(case, &directory).shown()
    };
    let first = again();
    assert!(first.lines().count() > 20, "{first}");
    for _ in 1..100 {
        same(&again(), &first, "the same seed");
    }
    std::fs::remove_dir_all(&directory).expect("removed");
}

fn main() -> std::process::ExitCode {
    harness(vec![
        ("both_backends_see_the_same", Needs::Userfaultfd, both_backends_see_the_same),
        (
            "guest_memfd_sees_the_same_as_alias",
            Needs::GuestMemfd,
            guest_memfd_sees_the_same_as_alias,
        ),
        ("traces_repeat", Needs::Userfaultfd, traces_repeat),
    ])
}
