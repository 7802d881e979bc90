//! Builds the bare-metal guest images (guest-tests/images) and the init of Linux guests
//! (guest-tests/linux-init), workspaces of their own, and passes their paths on as
//! `MAPGPA_IMAGE_GUESTS` and the like.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What the images run on, whatever this crate is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The images, their workspaces, and where cargo puts them: those that are embedded, and the example
/// for users, which a test runs.
const IMAGES: [(&str, &str, &str); 5] = [
    ("guests", "images", ""),
    ("canary", "images", ""),
    ("probe", "images", ""),
    ("minimal", "images", "examples"),
    ("linux-init", "linux-init", ""),
];
/// The workspaces, and what cargo builds of each.
const WORKSPACES: [(&str, &[&str]); 2] =
    [("images", &["--bins", "--examples"]), ("linux-init", &["--bins"])];
/// What they are built from, relative to guest-tests; not their target directories.
const SOURCES: [&str; 16] = [
    "abi/Cargo.toml",
    "abi/src",
    "kit/Cargo.toml",
    "kit/src",
    "guests/Cargo.toml",
    "guests/src",
    "images/Cargo.toml",
    "images/Cargo.lock",
    "images/build.rs",
    "images/link.ld",
    "images/examples",
    "images/src",
    "linux-init/Cargo.toml",
    "linux-init/Cargo.lock",
    "linux-init/build.rs",
    "linux-init/src",
];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("the guest images cannot be built: {why}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let guest_tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-tests");
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", guest_tests.join(source).display());
    }
    let out = PathBuf::from(variable("OUT_DIR")?);
    for (workspace, targets) in WORKSPACES {
        build_workspace(&guest_tests.join(workspace), targets, &out.join(workspace))?;
    }
    for (image, workspace, folder) in IMAGES {
        let path = out.join(workspace).join(TARGET).join("release").join(folder).join(image);
        let name = image.to_uppercase().replace('-', "_");
        println!("cargo::rustc-env=MAPGPA_IMAGE_{name}={}", path.display());
    }
    Ok(())
}

fn build_workspace(workspace: &Path, targets: &[&str], target_dir: &Path) -> Result<(), String> {
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .current_dir(workspace)
        .args(["build", "--release", "--locked"])
        .args(targets)
        .args(["--target", TARGET, "--target-dir"])
        .arg(target_dir)
        // They have their own flags; what the user passes is meant for the host's code.
        .env("CARGO_ENCODED_RUSTFLAGS", "")
        .env_remove("RUSTFLAGS")
        // Under `cargo clippy` this is clippy-driver, which builds nothing.
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    // Settings of the outer build's profiles and target are not theirs.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PROFILE_") || name.starts_with("CARGO_TARGET_") {
            cargo.env_remove(&*name);
        }
    }
    let status = cargo.status().map_err(|error| format!("cargo: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("cargo build in {}: {status}", workspace.display()))
    }
}

fn variable(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}"))
}
