//! What the engine costs beside the bare work, measured in turns in one run, as ratios: machines are
//! noisy, and a ratio of neighbours is not. Exits with 1 if a ratio is over its limit.
//!
//! `make bench`, or `cargo bench --bench ratios`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed call ends the benchmark")]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use mapgpa::backend::emulated::floor::Answer;
use mapgpa::backend::hosted::{self, HostedMemory};
use mapgpa::backend::{Setup, emulated};
use mapgpa::case::{Backend, Case, GuestSource, TOUCHED};
use mapgpa::engine::{Engine, Event, EventSink, FrontEnd, Settings, Then};
use mapgpa::fuzz::{Fixed, Fuzz, Live, Target};
use mapgpa::judge::{Class, Judge, Rules};
use mapgpa::policy::Policy;
use mapgpa::report::Recorder;
use mapgpa::suite::POLICIES;
use mapgpa_abi::params::{BOUND_OWN, Layout, Params, Plan};
use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Direction, PAGE_SIZE, shared_bit};
use mapgpa_guests::{GUESTS, Guest};

const ROUNDS: usize = 9;
const RAM_GPA: u64 = 16 << 20;
/// Where no memory is: a conversion there changes the page map only.
const HOLE_GPA: u64 = 1 << 33;

/// Takes the times of the first and the last call.
struct Stopwatch {
    recorder: Recorder,
    calls: u64,
    first: Instant,
    last: Instant,
}

impl EventSink for Stopwatch {
    fn on(&mut self, event: &Event<'_>) -> Then {
        if let Event::Call(_) = event {
            self.last = Instant::now();
            if self.calls == 0 {
                self.first = self.last;
            }
            self.calls += 1;
        }
        self.recorder.on(event)
    }
}

fn settings(policy: &str, gpaw: u32, timing: bool) -> Settings {
    let policy = Policy::parse(policy).expect("a policy");
    Settings { policy, seed: 1, gpaw, vcpus: 1, timing, front_end: FrontEnd::Direct }
}

fn recorder() -> Recorder {
    Recorder::new(Judge::new(Rules::default(), false), None)
}

fn setup(gpa: u64, size: u64, touch: u64) -> Setup<'static> {
    Setup {
        image: emulated::GUESTS_IMAGE,
        params: Params {
            guest: Guest::Linux67.index(),
            gpa,
            size,
            plan: Plan::One(Direction::ToShared),
            layout: Layout::Contiguous,
            bound: BOUND_OWN,
            guest_chunk: 0,
            vcpus: 1,
            touch,
            touch_before: touch,
            mark_replies: false,
        },
        memory: RAM_GPA + (512 << 20),
        memory_model: mapgpa::memory::MemoryModel::Alias,
        shared: None,
        timeout: Duration::from_secs(60),
    }
}

/// Time of a call, in nanoseconds, of the real thing.
fn real(setup: &Setup<'_>, gpaw: u32, chunk: u64) -> f64 {
    let now = Instant::now();
    let sink = Stopwatch { recorder: recorder(), calls: 0, first: now, last: now };
    let policy = format!("chunk={}K", chunk >> 10);
    let end = emulated::run(setup, settings(&policy, gpaw, true), sink).expect("a VM");
    assert!(end.error.is_none(), "{:?}", end.error);
    per_call(end.sink.calls, end.sink.last - end.sink.first)
}

fn floor(setup: &Setup<'_>, gpaw: u32, chunk: u64, punch: bool) -> f64 {
    let answer = |r12, r13| Answer::chunk(r12, r13, chunk, punch);
    let floor = emulated::floor::calls(setup, gpaw, answer).expect("a VM");
    per_call(floor.calls, floor.time)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn per_call(calls: u64, time: Duration) -> f64 {
    assert!(calls > 1, "{calls} calls");
    time.as_nanos() as f64 / (calls - 1) as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Bench {
    over: bool,
}

impl Bench {
    /// Runs both in turns, and prints the medians and the median of the ratios of neighbours.
    fn compare(&mut self, what: &str, limit: f64, real: impl Fn() -> f64, floor: impl Fn() -> f64) {
        let (mut reals, mut floors, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (one, other) = (real(), floor());
            reals.push(one);
            floors.push(other);
            ratios.push(one / other);
        }
        let ratio = median(ratios);
        let (real, floor) = (median(reals) / 1e3, median(floors) / 1e3);
        self.line(
            what,
            &format!("{real:9.2} us  floor {floor:9.2} us"),
            ratio,
            limit,
            ratio <= limit,
        );
    }

    fn line(&mut self, what: &str, measured: &str, ratio: f64, limit: f64, good: bool) {
        let verdict = if good { "ok" } else { "OVER" };
        println!("{what:<44} {measured}  ratio {ratio:5.2}  limit {limit:5.2}  {verdict}");
        self.over |= !good;
    }
}

fn main() -> ExitCode {
    let mut bench = Bench { over: false };
    match emulated::default_gpaw() {
        Ok(gpaw) => vms(&mut bench, gpaw),
        Err(error) if std::env::var_os("MAPGPA_REQUIRE_KVM").is_some() => {
            println!("KVM is required: {error}");
            bench.over = true;
        }
        Err(error) => println!("skipped what needs KVM: {error}"),
    }
    engine(&mut bench);
    fuzzer(&mut bench);
    ExitCode::from(u8::from(bench.over))
}

fn vms(bench: &mut Bench, gpaw: u32) {
    let calls = 2000;
    let hole = setup(HOLE_GPA, calls * PAGE_SIZE, 0);
    bench.compare(
        "a call without memory work, to a bare exit",
        1.10,
        || real(&hole, gpaw, PAGE_SIZE),
        || floor(&hole, gpaw, PAGE_SIZE, false),
    );
    for (chunk, chunks, limit) in [(4 << 10, 2048, 2.0), (64 << 10, 512, 1.4), (2 << 20, 128, 1.15)]
    {
        let size = chunk * chunks;
        let ram = setup(RAM_GPA, size, size / PAGE_SIZE);
        bench.compare(
            &format!("a conversion of {}K, to exit + hole punch", chunk >> 10),
            limit,
            || real(&ram, gpaw, chunk),
            || floor(&ram, gpaw, chunk, true),
        );
    }
    suite(bench, gpaw);
}

/// The median case of the suite, to the bare making and destroying of a VM.
fn suite(bench: &mut Bench, gpaw: u32) {
    let bare = setup(RAM_GPA, 2 << 20, 0);
    let (mut cases, mut floors) = (Vec::new(), Vec::new());
    for guest in GUESTS {
        for policy in POLICIES {
            let policy = Policy::parse(policy).expect("a policy");
            let guest = GuestSource::BuiltIn(guest.guest);
            let case = Case { backend: Backend::Emulated, gpaw, ..Case::new(guest, policy) };
            let began = Instant::now();
            case.run().expect("a run");
            cases.push(began.elapsed().as_secs_f64() * 1e9);
            let bare = Setup { memory: 32 << 20, ..bare.clone() };
            let floor = emulated::floor::bare_vm(&bare, gpaw).expect("a VM");
            floors.push(floor.as_secs_f64() * 1e9);
        }
    }
    let (case, floor) = (median(cases) / 1e3, median(floors) / 1e3);
    let (ratio, limit) = (case / floor, 4.0);
    let measured = format!("{case:9.2} us  floor {floor:9.2} us");
    bench.line("the suite's median case, to a bare VM", &measured, ratio, limit, ratio <= limit);
}

/// The engine alone, 4 KiB chunks, without trace and timing.
fn engine(bench: &mut Bench) {
    const SIZE: u64 = 1 << 30;
    const MILLIONS: f64 = 5.0;
    let rates = (0..ROUNDS).map(|_| {
        let mut engine =
            Engine::new(settings("chunk=4K", 48, false), HostedMemory::default(), recorder());
        let end = (RAM_GPA + SIZE) | shared_bit(48);
        let mut start = RAM_GPA | shared_bit(48);
        let began = Instant::now();
        let mut calls = 0u32;
        loop {
            let reply = engine.map_gpa(0, start, end - start).expect("no memory to fail");
            calls += 1;
            if reply.status != status::RETRY {
                break;
            }
            start = reply.r11;
        }
        f64::from(calls) / began.elapsed().as_secs_f64() / 1e6
    });
    let rate = median(rates.collect());
    let measured = format!("{rate:9.2} million requests a second");
    bench.line("the engine alone", &measured, rate / MILLIONS, 1.0, rate >= MILLIONS);
}

/// Counts requests, and does nothing else.
struct Count(u64);

impl EventSink for Count {
    fn on(&mut self, event: &Event<'_>) -> Then {
        self.0 += u64::from(matches!(event, Event::Call(_)));
        Then::GoOn
    }
}

/// A campaign of the fuzzer in one thread, to the engine on the same cases, which have been made before,
/// without judge and bookkeeping. Both have the same guest, with all of its TDCALLs.
fn fuzzer(bench: &mut Bench) {
    const SEEDS: u64 = 4000;
    let guest = GuestSource::BuiltIn(Guest::Reference);
    let fuzz = Fuzz {
        target: Target::Test(Box::new(Case::new(guest, settings("complete", 48, false).policy))),
        class: Class::Hostile,
        fixed: Fixed::default(),
        seed: 1,
        seeds: SEEDS,
        shard: (1, 1),
        jobs: 1,
        time: None,
        stop: false,
        shrink_runs: 0,
    };
    let cases: Vec<Case> = (1..=SEEDS)
        .map(|seed| {
            let mut target = fuzz.target.clone();
            fuzz.make(seed, &mut target);
            let Target::Test(case) = target else { unreachable!("a guest test") };
            *case
        })
        .collect();
    let bare = || {
        let runs: Vec<_> = cases
            .iter()
            .map(|case| {
                let Case { seed, gpaw, vcpus, front_end, .. } = *case;
                let policy = case.policy.clone();
                (case, Settings { policy, seed, gpaw, vcpus, timing: false, front_end })
            })
            .collect();
        let mut requests = 0;
        let began = Instant::now();
        for (case, settings) in runs {
            let end = hosted::run(&case.setup(TOUCHED), settings, Count(0)).expect("a run");
            requests += end.sink.0;
        }
        (requests, began.elapsed())
    };
    let whole = || {
        let live = Live::new(&fuzz);
        fuzz.run(&live, |_| ());
        let campaign = live.into_campaign();
        assert!(campaign.error.is_none() && campaign.findings.is_empty(), "{campaign:?}");
        (campaign.requests, campaign.search)
    };
    assert_eq!(whole().0, bare().0, "not the same cases");
    let each = |(requests, time)| per_call(requests, time);
    let what = "a request of the fuzzer, to the bare engine";
    bench.compare(what, 2.0, || each(whole()), || each(bare()));
}
