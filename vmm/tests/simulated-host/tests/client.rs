//! Tests of the simulated TDX host by a client of its own: the right calls in the right order make a TD
//! that runs, and each wrong one is refused as KVM refuses it.
//!
//! A test runs in a process of its own, into which the library is preloaded: this program once more, with
//! the test's name in MAPGPA_SIM_CLIENT.
#![allow(unsafe_code, reason = "the calls of a VMM, and a guest in assembly")]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::cast_lossless,
    clippy::expect_used,
    clippy::panic,
    reason = "a test"
)]

#[path = "client/checks.rs"]
mod checks;
#[path = "client/guest.rs"]
mod guest;
#[path = "client/guests.rs"]
mod guests;
#[path = "client/mistakes.rs"]
mod mistakes;
#[path = "client/td.rs"]
mod td;
#[path = "../src/uapi.rs"]
mod uapi;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Output};

use libtest_mimic::{Arguments, Completion, Trial};

/// Names the test to a child.
const CHILD: &str = "MAPGPA_SIM_CLIENT";

/// What a test needs of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// A KVM that carries a simulated TD.
    Host,
    /// One whose guests run, with a shared bit at 47.
    Guest,
    /// One that can be interrupted while it waits for a page of a guest's: no PVM, Linux 6.2 or later.
    Restart,
}

/// A test: name, what it needs, environment, what is done in the child.
pub type Test = (&'static str, Needs, &'static [(&'static str, &'static str)], fn());

fn main() -> ExitCode {
    let tests: Vec<Test> = checks::TESTS.iter().chain(guests::TESTS).copied().collect();
    if let Ok(name) = std::env::var(CHILD) {
        return child(&tests, &name);
    }
    let host = missing("can make a TD");
    let guest = host.clone().or_else(|| missing("a guest reports"));
    let restart = guest.clone().or_else(|| missing("a fault comes again"));
    let needs = |needs| match needs {
        Needs::Host => host.clone(),
        Needs::Guest => guest.clone(),
        Needs::Restart => restart.clone(),
    };
    let mut trials = vec![
        Trial::test("the mistakes are those that the library knows", || {
            mistakes::complete();
            Ok(())
        }),
        Trial::test("a misspelt fault or mistake ends the process", || {
            for variable in ["MAPGPA_SIM_HOST", "MAPGPA_SIM_BREAK", "MAPGPA_SIM_KERNEL"] {
                let output = run("can make a TD", &[(variable, "nonsense")]);
                if output.status.code() != Some(99) {
                    return Err(format!("{variable}: {}", output.status).into());
                }
            }
            Ok(())
        }),
    ];
    for (name, needed, env, _) in tests {
        let missing = needs(needed);
        trials.push(trial(name.to_owned(), name, missing, env.to_vec()));
    }
    for mistake in mistakes::MISTAKES {
        let (needed, test) = match mistake.seen {
            mistakes::Seen::By(..) => (Needs::Host, "a mistake is refused"),
            mistakes::Seen::Guest => (Needs::Guest, "a mistake shows in the guest"),
        };
        let name = format!("mistake {}", mistake.name);
        let env = vec![("MAPGPA_SIM_BREAK", mistake.name)];
        trials.push(trial(name, test, needs(needed), env));
    }
    for (fault, ..) in mistakes::FAULTS {
        let env = vec![("MAPGPA_SIM_HOST", *fault)];
        trials.push(trial(format!("host {fault}"), "a fault is seen", needs(Needs::Host), env));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial(
    name: String,
    test: &'static str,
    missing: Option<String>,
    env: Vec<(&'static str, &'static str)>,
) -> Trial {
    Trial::ignorable_test(name, move || match missing {
        Some(reason)
            if std::env::var_os("MAPGPA_REQUIRE_SIM").is_some_and(|value| value == "1") =>
        {
            Err(format!("required, but {reason}").into())
        }
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => {
            let output = run(test, &env);
            if output.status.success() {
                Ok(Completion::Completed)
            } else {
                let text = String::from_utf8_lossy(&output.stderr);
                Err(format!("{}\n{text}", output.status).into())
            }
        }
    })
}

/// Why a test of what the machine can do fails, if it does.
fn missing(test: &str) -> Option<String> {
    let output = run_for("15", test, &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    let why = text.lines().find(|line| line.starts_with("missing: "));
    let why = why.unwrap_or("missing: this KVM does not do as the guest wants");
    (!output.status.success()).then(|| why["missing: ".len()..].to_owned())
}

/// The library, which cargo builds beside this program.
fn library() -> PathBuf {
    let program = std::env::current_exe().expect("a program");
    let folder = program.parent().expect("a folder");
    let name = "libmapgpa_simulated_host.so";
    let found = [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.exists());
    found.unwrap_or_else(|| panic!("no {name} at {}", folder.display()))
}

/// Runs a test in a process with the library.
fn run(test: &str, env: &[(&str, &str)]) -> Output {
    run_for("60", test, env)
}

/// The same, for so many seconds at most.
fn run_for(seconds: &str, test: &str, env: &[(&str, &str)]) -> Output {
    let program = std::env::current_exe().expect("a program");
    let mut command = Command::new("timeout");
    command.args(["-k", "1", seconds]).arg(program);
    command.env("LD_PRELOAD", library()).env(CHILD, test).envs(env.iter().copied());
    command.output().expect("timeout starts")
}

/// Does a test in this process.
fn child(tests: &[Test], name: &str) -> ExitCode {
    let special: [(&str, fn()); 5] = [
        ("can make a TD", checks::can_make_a_td),
        ("a guest reports", guests::a_guest_reports),
        ("a mistake is refused", mistakes::refused),
        ("a mistake shows in the guest", mistakes::shows_in_the_guest),
        ("a fault is seen", mistakes::fault_is_seen),
    ];
    let ordinary = tests.iter().map(|(name, _, _, test)| (*name, *test));
    let Some((_, test)) = special.into_iter().chain(ordinary).find(|(n, _)| *n == name) else {
        eprintln!("no test {name}");
        return ExitCode::FAILURE;
    };
    test();
    ExitCode::SUCCESS
}
