//! The corpus, `fixtures/cases`: for each guest the smallest case of each check that it fails. Each is
//! reproduced, a guest that has learned to cope would show, and none is missing that the suite knows.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod harness;

use std::collections::BTreeSet;
use std::path::PathBuf;

use mapgpa::case::Backend;
use mapgpa::engine::FrontEnd;
use mapgpa::expect::Expectations;
use mapgpa::fuzz::Target;
use mapgpa::replay::CaseFile;
use mapgpa::suite::POLICIES;
use mapgpa_guests::GUESTS;

use harness::{Needs, harness};

fn files() -> Vec<PathBuf> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/cases");
    let files = std::fs::read_dir(dir).expect(dir).map(|file| file.expect("a file").path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "toml")).collect()
}

fn read(path: &PathBuf) -> CaseFile {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).expect(&name);
    CaseFile::parse(&name, &text, None).expect(&name)
}

fn backend(case: &CaseFile) -> Backend {
    match &case.target {
        Target::Test(case) => case.backend,
        Target::Kernel(_) => panic!("no kernels here"),
    }
}

fn reproduced(on: Backend) {
    let mut any = false;
    for path in files() {
        let case = read(&path);
        if backend(&case) != on {
            continue;
        }
        any = true;
        let outcome = case.target.run().expect("a run");
        let differences = case.differences(&outcome);
        assert_eq!(differences, [""; 0], "{}", path.display());
        assert!(case.target.rules().len() <= 3, "{}", path.display());
        assert!(case.expected.check.is_some_and(|check| case.expected.checks.contains(&check)));
    }
    assert!(any);
}

/// Every check that the expectations know of a guest has a case, and `reference` has none.
fn none_is_missing() {
    let expectations = Expectations::built_in().expect("well formed");
    let cases: Vec<CaseFile> = files().iter().map(read).collect();
    for info in GUESTS {
        let of_guest = cases.iter().filter(|case| case.guest == info.name);
        let found: BTreeSet<_> = of_guest.filter_map(|case| case.expected.check).collect();
        let known =
            POLICIES.iter().flat_map(|policy| expectations.of(info.name, policy, FrontEnd::Direct));
        let missing: Vec<_> = known.filter(|check| !found.contains(check)).collect();
        assert!(missing.is_empty(), "{}: {missing:?}", info.name);
    }
    assert!(cases.iter().all(|case| case.guest != "reference"));
}

fn hosted() {
    reproduced(Backend::Hosted);
}

fn emulated() {
    reproduced(Backend::Emulated);
}

fn main() -> std::process::ExitCode {
    harness(vec![
        ("each_hosted_case_is_reproduced", Needs::Nothing, hosted),
        ("none_is_missing", Needs::Nothing, none_is_missing),
        ("each_case_in_a_vm_is_reproduced", Needs::Kvm, emulated),
    ])
}
