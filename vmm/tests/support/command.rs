//! Runs the binary, and holds what it says to the contract of the command line.

use std::process::{Command, Output, Stdio};

/// A command line of the binary; words are separated by spaces.
pub fn command(line: &str) -> Command {
    with(&line.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>())
}

/// The same, word by word.
pub fn with(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mapgpa"));
    command.args(words).stdin(Stdio::null());
    command
}

pub fn output(line: &str) -> Output {
    command(line).output().expect("the binary runs")
}

pub fn code(output: &Output) -> i32 {
    output.status.code().expect("an exit code, no signal")
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Exit 2, nothing on stdout, and an error of one line that has all of `words`.
pub fn refused(mut command: Command, words: &[&str]) {
    let output = command.output().expect("the binary runs");
    let error = stderr(&output);
    assert_eq!(code(&output), 2, "{command:?}: {error}");
    assert_eq!(stdout(&output), "", "{command:?}");
    for word in words {
        assert!(error.contains(word), "{command:?}: no {word:?} in {error}");
    }
    let one_line = error.starts_with("mapgpa: ") && error.lines().count() == 1;
    assert!(one_line && error.len() < 500 && error.ends_with('\n'), "{command:?}: {error}");
    assert!(!error.contains("panicked"), "{error}");
}
