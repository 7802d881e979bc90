//! Instructions of the hot paths, counted by callgrind and held against a stored file, so that the
//! check holds on any machine and under any load. Exits with 1 if one has grown beyond the tolerance.
//!
//! `make bench-check`, or `cargo bench --bench instructions`; with `-- --update` what is counted is
//! stored. Without valgrind it is skipped; with MAPGPA_REQUIRE_VALGRIND=1 in the environment that
//! fails.
//!
//! It runs itself under callgrind, each workload twice, with N and 2N requests: the difference is
//! without start and end.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed call ends the benchmark")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::{Command, ExitCode};

use mapgpa::backend::hosted::HostedMemory;
use mapgpa::case::{Case, GuestSource};
use mapgpa::engine::{Engine, FrontEnd, Settings};
use mapgpa::fuzz::{Fixed, Fuzz, Target};
use mapgpa::judge::{Class, Judge, Rules};
use mapgpa::pagemap::{Change, PageMap, Pages};
use mapgpa::platform::{Bare, NoCpu};
use mapgpa::policy::Policy;
use mapgpa::report::Recorder;
use mapgpa::tdcall;
use mapgpa_abi::tdcall::{Regs, leaf, status, sub};
use mapgpa_abi::{PAGE_SIZE, shared_bit};
use mapgpa_guests::Guest;
use serde::{Deserialize, Serialize};

const STORED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/bench/instructions.toml");
/// Where that file says how it comes about.
const HEADER: &str = "# Instructions of a request on each hot path, counted by callgrind (`make \
                      bench-check`).\n# `cargo bench --bench instructions -- --update` stores them \
                      anew: say in the change why they grew.\n\n";
const GPAW: u32 = 48;
const RAM_GPA: u64 = 16 << 20;
const REQUESTS: u64 = 20_000;

/// What is stored.
#[derive(Debug, Deserialize, Serialize)]
struct Stored {
    /// Growth, as a share, that a change of compiler may cause.
    tolerance: f64,
    /// Instructions of a request, by workload.
    instructions: BTreeMap<String, f64>,
}

type Workload = (&'static str, fn(u64));

const WORKLOADS: [Workload; 6] = [
    ("map-gpa-4k", |requests| map_gpa(requests, "chunk=4K", 4 << 10)),
    ("map-gpa-64k", |requests| map_gpa(requests, "chunk=64K", 64 << 10)),
    ("pagemap-apply-64k", pagemap),
    ("tdcall-info", |requests| tdcalls(requests, leaf::VP_INFO)),
    ("tdcall-map-gpa", |requests| tdcalls(requests, leaf::VP_VMCALL)),
    ("fuzz", fuzz),
];

fn engine(policy: &str) -> Engine<HostedMemory, Recorder> {
    let policy = Policy::parse(policy).expect("a policy");
    let settings = Settings {
        policy,
        seed: 1,
        gpaw: GPAW,
        vcpus: 1,
        timing: false,
        front_end: FrontEnd::Direct,
    };
    let recorder = Recorder::new(Judge::new(Rules::default(), false), None);
    Engine::new(settings, HostedMemory::default(), recorder)
}

/// A conversion that takes that many requests.
fn map_gpa(requests: u64, policy: &str, chunk: u64) {
    let mut engine = engine(policy);
    let mut start = RAM_GPA | shared_bit(GPAW);
    let end = start + requests * chunk;
    for _ in 0..requests {
        let reply = engine.map_gpa(0, black_box(start), end - start).expect("no memory to fail");
        if reply.status == status::RETRY {
            start = reply.r11;
        }
    }
    black_box(engine);
}

/// 64 KiB to shared at a time, every other 64 KiB.
fn pagemap(requests: u64) {
    let mut map = PageMap::default();
    let mut runs = Vec::new();
    for request in 0..requests {
        runs.clear();
        let pages = Pages { first: 32 * request, count: 16 };
        black_box(map.apply(black_box(pages), Change::Share, u64::MAX, &mut runs));
    }
    black_box(map);
}

/// TDCALLs from registers to registers; MapGPA asks for a page each.
fn tdcalls(requests: u64, leaf: u64) {
    let mut engine = engine("complete");
    for request in 0..requests {
        let mut regs = if leaf == leaf::VP_VMCALL {
            let page = RAM_GPA + request * PAGE_SIZE;
            Regs::vmcall(sub::MAP_GPA, page | shared_bit(GPAW), PAGE_SIZE)
        } else {
            Regs { rax: leaf, ..Regs::default() }
        };
        tdcall::tdcall(&mut engine, 0, black_box(&mut regs), &Bare, &NoCpu)
            .expect("no memory to fail");
        black_box(regs);
    }
    black_box(engine);
}

/// Seeds of the fuzzer until their cases, made, run and judged, have made that many requests.
fn fuzz(requests: u64) {
    let policy = Policy::parse("complete").expect("a policy");
    let case = Case::new(GuestSource::BuiltIn(Guest::Reference), policy);
    let fuzz = Fuzz {
        target: Target::Test(Box::new(case)),
        class: Class::Hostile,
        fixed: Fixed::default(),
        seed: 1,
        seeds: requests,
        shard: (1, 1),
        jobs: 1,
        time: None,
        stop: false,
        shrink_runs: 0,
    };
    let mut target = fuzz.target.clone();
    let mut made = 0;
    for seed in 1.. {
        if made >= requests {
            break;
        }
        fuzz.make(seed, &mut target);
        made += target.run().expect("a run").requests;
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match arguments.as_slice() {
        [name, requests] => {
            let workload = WORKLOADS.iter().find(|(other, _)| other == name);
            workload.expect("a workload").1(requests.parse().expect("a number"));
            ExitCode::SUCCESS
        }
        [update] if update == "--update" => check(true),
        [] => check(false),
        _ => {
            eprintln!("expected nothing, or --update");
            ExitCode::from(2)
        }
    }
}

/// Counts all, and compares or stores.
fn check(update: bool) -> ExitCode {
    if let Err(error) = Command::new("valgrind").arg("--version").output() {
        let required =
            std::env::var_os("MAPGPA_REQUIRE_VALGRIND").is_some_and(|value| value == "1");
        println!("{}: no valgrind: {error}", if required { "FAILED" } else { "skipped" });
        return ExitCode::from(u8::from(required));
    }
    let text = std::fs::read_to_string(STORED).unwrap_or_default();
    let stored: Option<Stored> = toml::from_str(&text).ok();
    let tolerance = stored.as_ref().map_or(0.1, |stored| stored.tolerance);
    let mut counted = BTreeMap::new();
    let mut good = true;
    for (name, _) in WORKLOADS {
        let now = count(name);
        let before = stored.as_ref().and_then(|stored| stored.instructions.get(name)).copied();
        let verdict = match before {
            _ if update => "stored",
            None => "NOT STORED: run with -- --update",
            Some(before) if now > before * (1.0 + tolerance) => "GROWN",
            Some(before) if now < before * (1.0 - tolerance) => "less: store it with -- --update",
            Some(_) => "ok",
        };
        good &= !(verdict == "GROWN" || verdict.starts_with("NOT"));
        let before = before.map_or_else(|| "-".to_owned(), |before| format!("{before:.1}"));
        println!("{name:<20} {now:9.1} instructions a request, stored {before:>9}  {verdict}");
        counted.insert(name.to_owned(), (now * 10.0).round() / 10.0);
    }
    if update {
        let text = toml::to_string(&Stored { tolerance, instructions: counted }).expect("TOML");
        std::fs::write(STORED, format!("{HEADER}{text}")).expect(STORED);
    }
    ExitCode::from(u8::from(!good))
}

/// Instructions of a request of the workload `name`.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn count(name: &str) -> f64 {
    let [once, twice] = [REQUESTS, 2 * REQUESTS].map(|requests| instructions(name, requests));
    (twice - once) as f64 / REQUESTS as f64
}

/// Instructions of this program, when it runs a workload, as callgrind counts them.
fn instructions(name: &str, requests: u64) -> u64 {
    let this = std::env::current_exe().expect("this program");
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(this)
        .args([name, &requests.to_string()])
        .output()
        .expect("valgrind runs");
    let log = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{log}");
    let line = log.lines().find_map(|line| line.split_once("Collected :")).expect("a count").1;
    line.trim().parse().expect("a number")
}
