//! Would a search that is guided by what guests do find more than draws, or sooner? `cargo bench --bench
//! guided` measures it; docs/fuzzing.md has the answer.
//!
//! Two searches, of equally many runs. One draws policies as `mapgpa fuzz` does. The other keeps those
//! under which a guest did something new, and mostly makes the next ones of them: new is a pair of events
//! in a row that no run before had, or had so often. What is looked for are the violations of the corpus
//! `fixtures/cases`, guest by guest, and the mutants of `reference`, each from several first seeds.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed call ends the benchmark")]

#[path = "../tests/support/vcpu.rs"]
mod vcpu;

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::mem::discriminant;
use std::time::{Duration, Instant};

use mapgpa::backend::hosted::{self, HostedMemory};
use mapgpa::case::{Backend, Case, GuestSource};
use mapgpa::engine::{Engine, Event, EventSink, Settings, Then};
use mapgpa::fuzz::{Fixed, Fuzz, Target};
use mapgpa::judge::{Check, Class, Judge, Judgement};
use mapgpa::policy::{Draw, Policy, Rule};
use mapgpa::replay::CaseFile;
use mapgpa_abi::{Direction, PAGE_SIZE};
use mapgpa_guests::{Guest, driver};
use mapgpa_mutants::{AnyTd, Convert, MUTANTS};
use vcpu::{Vcpu, until_it_ends};

/// Runs of a search.
const RUNS: u64 = 10_000;
/// Searches for each thing looked for; each has seeds of its own.
const SEARCHES: u64 = 5;
/// How many of the guided policies are drawn all the same.
const NEW: f64 = 0.5;
const CLASSES: [Class; 4] = [Class::Legal, Class::Stalling, Class::Refusing, Class::Hostile];
/// The stream of draws that guide a search: no vCPU has this number.
const STREAM: u32 = u32::MAX - 1;

/// The judge, and what the guest did: how often which kind of event came after which.
struct Watch {
    judge: Judge,
    pairs: Option<HashMap<u64, u32>>,
    last: u64,
}

impl EventSink for Watch {
    fn on(&mut self, event: &Event<'_>) -> Then {
        if let Some(pairs) = &mut self.pairs {
            let kind = kind(event);
            *pairs.entry(self.last.rotate_left(1) ^ kind).or_default() += 1;
            self.last = kind;
        }
        self.judge.on(event)
    }
}

/// An event without its numbers: how request, reply and pages relate.
fn kind(event: &Event<'_>) -> u64 {
    let mut hash = DefaultHasher::new();
    discriminant(event).hash(&mut hash);
    match event {
        Event::Call(call) => {
            let end = call.raw_gpa.wrapping_add(call.size);
            let reply = (call.status, call.r11.cmp(&call.raw_gpa), call.r11.cmp(&end));
            let odd =
                (call.malformed.map(|m| discriminant(&m)), call.stray.map(|s| discriminant(&s)));
            let pages = (call.converted == 0, call.converted * PAGE_SIZE == call.size);
            let aligned = call.r11.is_multiple_of(PAGE_SIZE);
            (call.to == Direction::ToShared, reply, aligned).hash(&mut hash);
            (odd, pages, discriminant(&call.truth)).hash(&mut hash);
        }
        Event::Accept(accept) => (accept.answer, accept.pages.count).hash(&mut hash),
        Event::Touch { alias, state, lied, .. } => {
            (discriminant(alias), discriminant(state), lied).hash(&mut hash);
        }
        Event::Closed { ending, missing, pending, .. } => {
            (discriminant(ending), missing.is_some(), pending.is_some()).hash(&mut hash);
        }
        _ => {}
    }
    hash.finish()
}

/// Who is run.
#[derive(Clone, Copy)]
enum Subject {
    BuiltIn(Guest),
    Mutant(Convert),
}

impl Subject {
    fn run(self, case: &Case, watched: bool) -> (Judgement, HashMap<u64, u32>) {
        let sink = Watch { judge: case.judge(), pairs: watched.then(HashMap::new), last: 0 };
        let settings = Settings {
            policy: case.policy.clone(),
            seed: case.seed,
            gpaw: case.gpaw,
            vcpus: 1,
            timing: false,
            front_end: case.front_end,
        };
        let setup = case.setup(16);
        let sink = match self {
            Self::BuiltIn(_) => hosted::run(&setup, settings, sink).expect("a run").sink,
            Self::Mutant(convert) => {
                let mut engine = Engine::new(settings, HostedMemory::default(), sink);
                if let Some(pages) = setup.shared {
                    engine.preset_shared(pages).expect("memory does not fail");
                }
                let mut td = Vcpu::new(engine, None);
                until_it_ends(|| {
                    driver::run_with(&mut td, &setup.params, 0, |td, c| convert(&mut AnyTd(td), c))
                });
                td.engine.end().1
            }
        };
        (sink.judge.finish(), sink.pairs.unwrap_or_default())
    }
}

/// A search through policies of one class.
struct Search {
    fuzz: Fuzz,
    /// Policies under which something new was done, and what was.
    kept: Vec<Case>,
    seen: HashSet<(u64, u32)>,
}

impl Search {
    fn new(class: Class, guest: Guest) -> Self {
        let case = Case::new(
            GuestSource::BuiltIn(guest),
            Policy { rules: Vec::new(), ..Policy::default() },
        );
        let target = Target::Test(Box::new(Case { backend: Backend::Hosted, ..case }));
        let fuzz = Fuzz {
            target,
            class,
            fixed: Fixed::default(),
            seed: 1,
            seeds: 1,
            shard: (1, 1),
            jobs: 1,
            time: None,
            stop: false,
            shrink_runs: 0,
        };
        Self { fuzz, kept: Vec::new(), seen: HashSet::new() }
    }

    fn drawn(&self, seed: u64) -> Case {
        let mut target = self.fuzz.target.clone();
        self.fuzz.make(seed, &mut target);
        let Target::Test(case) = target else { unreachable!("a guest test") };
        *case
    }

    /// The next policy: a new one, or a mixture of one that was kept and a new or another kept one.
    fn guided(&self, seed: u64) -> Case {
        let mut draw = Draw::for_call(seed, STREAM, 0);
        let new = self.drawn(seed);
        if self.kept.is_empty() || draw.chance(NEW) {
            return new;
        }
        let pick = |draw: &mut Draw, len: usize| usize::try_from(draw.below(len as u64)).unwrap();
        let mut case = self.kept[pick(&mut draw, self.kept.len())].clone();
        let other = if draw.chance(0.5) {
            new
        } else {
            self.kept[pick(&mut draw, self.kept.len())].clone()
        };
        for _ in 0..=draw.below(4) {
            let theirs = other.policy.rules[pick(&mut draw, other.policy.rules.len())];
            let rules = &mut case.policy.rules;
            let at = pick(&mut draw, rules.len());
            match draw.below(14) {
                0 if rules.len() < 6 => rules.insert(at, theirs),
                1 if rules.len() > 1 => drop(rules.remove(at)),
                2 => rules[at] = theirs,
                3 => rules[at].action = theirs.action,
                4 => rules[at].when = theirs.when,
                5 => mix(&mut rules[at], &theirs, &mut draw),
                6 => rules[at].action.after += draw.below(3),
                7 => rules[at].action.after = rules[at].action.after.saturating_sub(1),
                8 => {
                    if let Some((first, last)) = &mut rules[at].when.calls {
                        let by = draw.below(3);
                        (*first, *last) = (*first + by, *last + by);
                    }
                }
                9 => rules.swap(at, 0),
                10 => case.plan = other.plan,
                11 => (case.range, case.layout) = (other.range, other.layout),
                12 => case.seed = other.seed,
                _ => rules.push(theirs),
            }
        }
        case.policy.rules.truncate(6);
        case
    }

    /// Keeps the policy if something new was done under it.
    fn learn(&mut self, case: Case, pairs: HashMap<u64, u32>) {
        let mut new = false;
        for (pair, count) in pairs {
            new |= self.seen.insert((pair, count.ilog2().min(5)));
        }
        if new {
            self.kept.push(case);
        }
    }
}

/// Takes one thing that another rule does.
fn mix(rule: &mut Rule, theirs: &Rule, draw: &mut Draw) {
    let (ours, theirs) = (&mut rule.action, &theirs.action);
    match draw.below(4) {
        0 => ours.accept = theirs.accept,
        1 => ours.stall = theirs.stall,
        2 => (ours.odd, ours.after) = (theirs.odd, theirs.after),
        _ => (ours.amount, ours.amount_given) = (theirs.amount, theirs.amount_given),
    }
}

/// The run, from 1, in which the subject first fails so, if it does; classes take turns.
fn search(
    subject: Subject,
    classes: &[Class],
    check: Option<Check>,
    first: u64,
    guided: bool,
) -> Option<u64> {
    let guest = if let Subject::BuiltIn(guest) = subject { guest } else { Guest::Reference };
    let mut searches: Vec<Search> =
        classes.iter().map(|class| Search::new(*class, guest)).collect();
    (1..=RUNS).find(|run| {
        let turn = usize::try_from(run % classes.len() as u64).unwrap();
        let search = &mut searches[turn];
        let seed = first + run;
        let case = if guided { search.guided(seed) } else { search.drawn(seed) };
        let (judgement, pairs) = subject.run(&case, guided);
        if guided {
            search.learn(case, pairs);
        }
        judgement.class <= search.fuzz.class
            && judgement
                .violations
                .iter()
                .any(|found| check.is_none_or(|check| check == found.check))
    })
}

/// What is looked for.
struct Wanted {
    name: String,
    subject: Subject,
    classes: Vec<Class>,
    check: Option<Check>,
}

fn corpus() -> Vec<Wanted> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/cases");
    let mut files: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    let wanted = files.iter().filter_map(|path| {
        let name = path.file_stem().unwrap().display().to_string();
        let case = CaseFile::parse(&name, &std::fs::read_to_string(path).unwrap(), None).unwrap();
        let guest = Guest::by_name(&case.guest).filter(|guest| guest.info().hosted)?;
        let subject = Subject::BuiltIn(guest);
        Some(Wanted {
            name,
            subject,
            classes: vec![case.expected.class],
            check: case.expected.check,
        })
    });
    wanted.collect()
}

fn mutants() -> Vec<Wanted> {
    let wanted = MUTANTS.iter().map(|mutant| Wanted {
        name: format!("{}: {} -> {}", mutant.line, mutant.was, mutant.is),
        subject: Subject::Mutant(mutant.convert),
        classes: CLASSES.to_vec(),
        check: None,
    });
    wanted.collect()
}

/// Searches for one thing; one that found nothing counts as all its runs.
fn searches(wanted: &Wanted, guided: bool) -> Sum {
    let began = Instant::now();
    let found: Vec<_> = (0..SEARCHES)
        .map(|number| {
            let first = number * 1_000_000;
            search(wanted.subject, &wanted.classes, wanted.check, first, guided)
        })
        .collect();
    let missed = found.iter().filter(|found| found.is_none()).count();
    let mut runs: Vec<u64> = found.into_iter().map(|found| found.unwrap_or(RUNS)).collect();
    runs.sort_unstable();
    Sum { runs, missed, time: began.elapsed() }
}

/// What a search has to show for itself.
#[derive(Default)]
struct Sum {
    runs: Vec<u64>,
    missed: usize,
    time: Duration,
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn show(how: &str, Sum { runs, missed, time }: &mut Sum) {
    runs.sort_unstable();
    let at = |share: usize| runs[(runs.len() - 1) * share / 100];
    let seconds = time.as_secs_f64();
    println!(
        "  {how:6}  median {:3}  90% {:5}  most {:5} runs, {missed} of {} not found; {:.1} us a run, {seconds:.1} s",
        at(50),
        at(90),
        at(100),
        runs.len(),
        seconds * 1e6 / runs.iter().sum::<u64>() as f64,
    );
}

fn main() {
    for (what, wanted) in [("corpus", corpus()), ("mutants", mutants())] {
        let mut sums = [Sum::default(), Sum::default()];
        let mut never = 0;
        for wanted in &wanted {
            let found = [false, true].map(|guided| searches(wanted, guided));
            if found.iter().all(|found| found.missed == found.runs.len()) {
                never += 1;
                continue;
            }
            let medians = found.each_ref().map(|found| found.runs[found.runs.len() / 2]);
            if medians[0].max(medians[1]) > 1000 {
                println!(
                    "  median {:5} runs, guided {:5}: {}",
                    medians[0], medians[1], wanted.name
                );
            }
            for (sum, found) in sums.iter_mut().zip(found) {
                sum.runs.extend(found.runs);
                sum.missed += found.missed;
                sum.time += found.time;
            }
        }
        println!("{what}: {} looked for, {never} more found by neither", wanted.len() - never);
        show("drawn", &mut sums[0]);
        show("guided", &mut sums[1]);
    }
}
