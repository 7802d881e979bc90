//! Builds the library of `lib.rs`, and runs the binary with a host whose calls fail.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

pub mod sweep;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The library, built once a test binary.
pub fn library() -> Result<&'static Path, String> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    LIBRARY.get_or_init(build).as_deref().map_err(Clone::clone)
}

/// Where it was built before: in the lab, a compiler takes its time.
const BUILT: &str = "MAPGPA_FAULTS_LIBRARY";

fn build() -> Result<PathBuf, String> {
    if let Some(built) = std::env::var_os(BUILT) {
        return Ok(built.into());
    }
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interposer/lib.rs");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join(format!("libfaults-{}.so", std::process::id()));
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let built = Command::new(rustc)
        .args(["--edition", "2024", "-O", "--crate-type", "cdylib", "-o"])
        .arg(&library)
        .arg(source)
        .output()
        .map_err(|error| format!("rustc: {error}"))?;
    if built.status.success() {
        Ok(library)
    } else {
        Err(String::from_utf8_lossy(&built.stderr).into_owned())
    }
}

/// A call that fails: the function, which of its calls, the error, and how many calls do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub function: &'static str,
    pub first: u64,
    pub errno: i32,
    pub times: u64,
}

/// A run of the binary, and what the library counted.
#[derive(Debug)]
pub struct Ran {
    pub output: Output,
    /// Calls by function, and `fds`, `threads` and `mappings` at the end; empty if it ended otherwise.
    pub counted: BTreeMap<String, u64>,
}

/// The output of `command`; one that does not end in time is no output.
fn within(command: &mut Command, limit: Duration, fault: Option<Fault>) -> Output {
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("the binary runs");
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = std::thread::scope(|scope| {
        let out = scope.spawn(move || read(&mut out));
        let err = scope.spawn(move || read(&mut err));
        let begun = Instant::now();
        while child.try_wait().expect("a child").is_none() {
            if begun.elapsed() > limit {
                child.kill().expect("killed");
                child.wait().expect("a child");
                panic!("{fault:?}: still running after {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        (out.join().expect("read"), err.join().expect("read"))
    });
    Output { status: child.wait().expect("a child"), stdout, stderr }
}

fn read(stream: &mut Option<impl std::io::Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.read_to_end(&mut bytes).expect("readable");
    }
    bytes
}

/// Runs `command` with `fault`, if one is given; the report goes to `report`.
pub fn run(command: &mut Command, fault: Option<Fault>, report: &Path) -> Ran {
    let library = library().expect("the library");
    let _ = std::fs::remove_file(report);
    // What the command wants to be preloaded comes behind it.
    let mut preloaded = library.as_os_str().to_owned();
    if let Some((_, Some(more))) = command.get_envs().find(|(name, _)| *name == "LD_PRELOAD") {
        preloaded.push(":");
        preloaded.push(more);
    }
    command.env("LD_PRELOAD", preloaded).env("MAPGPA_FAULT_REPORT", report);
    if let Some(Fault { function, first, errno, times }) = fault {
        command.env("MAPGPA_FAULT", format!("{function}:{first}:{errno}:{times}"));
    }
    let output = within(command, Duration::from_secs(60), fault);
    let text = std::fs::read_to_string(report).unwrap_or_default();
    let counted = text.lines().filter_map(|line| {
        let (name, count) = line.split_once(' ')?;
        Some((name.to_owned(), count.parse().ok()?))
    });
    Ran { output, counted: counted.collect() }
}
