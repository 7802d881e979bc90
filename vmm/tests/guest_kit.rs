//! docs/guest-kit.md: its Rust program is the example, and both its programs do what it says.
#![allow(clippy::expect_used, reason = "test code")]

mod common;
mod harness;

use std::path::Path;
use std::process::Command;

use common::{Probe, Script, Seen};
use harness::{Needs, harness};

const DOC: &str = include_str!("../../docs/guest-kit.md");

/// The first code block of the document in `language`.
fn block(language: &str) -> &'static str {
    let start = format!("```{language}\n");
    let from = DOC.find(&start).expect("the block is there") + start.len();
    let to = DOC[from..].find("```").expect("it ends");
    &DOC[from..from + to]
}

fn run(image: Vec<u8>, policy: &'static str) -> Seen {
    Probe { image, policy, ..Probe::default() }.run(&[Script::new()])
}

fn the_rust_program_is_the_example() {
    let example = include_str!("../../guest-tests/images/examples/minimal.rs");
    assert_eq!(block("rust"), example);
}

fn the_rust_program_converts_its_range() {
    let image = std::fs::read(env!("MAPGPA_IMAGE_MINIMAL")).expect("built by build.rs");
    converts(&image);
}

fn the_c_program_builds_as_documented_and_converts_its_range() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest_kit");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("guest.c"), block("c")).expect("a file");
    let line = DOC.split('`').find(|text| text.starts_with("cc -O2")).expect("how to build it");
    let mut words = line.split(' ');
    let built = Command::new(words.next().expect("a command"))
        .args(words)
        .args(["-Wall", "-Wextra", "-Werror"])
        .current_dir(&folder)
        .status()
        .expect("a C compiler, which Rust needs to link");
    assert!(built.success());
    let image = std::fs::read(folder.join("guest.elf")).expect("built");
    converts(&image);
}

fn converts(image: &[u8]) {
    let seen = run(image.to_vec(), "chunk=64K,stall=1");
    assert_eq!((seen.calls.len(), seen.exits), (64, vec![(0, true)]));
    assert_eq!((seen.touches, seen.odd), (vec![], vec![]));
    let seen = run(image.to_vec(), "stall=forever");
    assert_eq!((seen.calls.len(), seen.exits), (3, vec![(0, false)]));
}

fn main() -> std::process::ExitCode {
    harness(vec![
        ("the_rust_program_is_the_example", Needs::Nothing, the_rust_program_is_the_example),
        ("the_rust_program_converts_its_range", Needs::Kvm, the_rust_program_converts_its_range),
        (
            "the_c_program_builds_as_documented_and_converts_its_range",
            Needs::Kvm,
            the_c_program_builds_as_documented_and_converts_its_range,
        ),
    ])
}
