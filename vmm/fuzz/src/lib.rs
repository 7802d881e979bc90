//! What is fuzzed: each module is a target, `run` takes any bytes and panics where the VMM is wrong.
//!
//! vmm/tests/fuzz_inputs.rs includes this file, so that inputs that once were too much are replayed
//! by `make test`, without a fuzzer.

pub mod files;
pub mod guest;
pub mod image;
pub mod policy;

/// What is shown of an error: one line that moves no cursor.
fn shown(error: &dyn std::error::Error) {
    let line = mapgpa::one_line(error);
    assert!(!line.is_empty() && !line.contains(char::is_control), "{line:?}");
}
