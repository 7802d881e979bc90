//! What the fuzz targets of vmm/fuzz once found too much, and their seeds, replayed without a fuzzer.
#![allow(clippy::panic, clippy::expect_used, reason = "helpers fail the test, too")]

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "public for the targets' own crate")]
mod targets;

use std::path::Path;

/// Runs `target` with each file of fixtures/fuzz/NAME.
fn replay(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/fuzz").join(name);
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("a folder of inputs") {
        let path = entry.expect("an entry").path();
        println!("{}", path.display());
        target(&std::fs::read(&path).expect("an input"));
        files += 1;
    }
    assert_ne!(files, 0, "no inputs for {name}");
}

#[test]
fn guest() {
    replay("guest", targets::guest::run);
}

#[test]
fn policy() {
    replay("policy", targets::policy::run);
}

#[test]
fn image() {
    replay("image", targets::image::run);
}

#[test]
fn files() {
    replay("files", targets::files::run);
}
