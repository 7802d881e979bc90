//! Builds the bare-metal guest images (guest-tests/images, a workspace of its own) and passes their
//! paths on as `MAPGPA_IMAGE_GUESTS` and the like.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What the images run on, whatever this crate is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The images, and where cargo puts them: those that are embedded, and the example for users, which
/// a test runs.
const IMAGES: [(&str, &str); 4] =
    [("guests", ""), ("canary", ""), ("probe", ""), ("minimal", "examples")];
/// What they are built from, relative to guest-tests; not images/target.
const SOURCES: [&str; 12] = [
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
    let target_dir = PathBuf::from(variable("OUT_DIR")?).join("images");
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .current_dir(guest_tests.join("images"))
        .args([
            "build",
            "--release",
            "--locked",
            "--bins",
            "--examples",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(&target_dir)
        // The images have their own flags; what the user passes is meant for the host's code.
        .env("CARGO_ENCODED_RUSTFLAGS", "")
        .env_remove("RUSTFLAGS")
        // Under `cargo clippy` this is clippy-driver, which builds nothing.
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    // Settings of the outer build's profiles and target are not the images'.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PROFILE_") || name.starts_with("CARGO_TARGET_") {
            cargo.env_remove(&*name);
        }
    }
    let status = cargo.status().map_err(|error| format!("cargo: {error}"))?;
    if !status.success() {
        return Err(format!("cargo build in {}: {status}", guest_tests.join("images").display()));
    }
    for (image, folder) in IMAGES {
        let path = target_dir.join(TARGET).join("release").join(folder).join(image);
        println!("cargo::rustc-env=MAPGPA_IMAGE_{}={}", image.to_uppercase(), path.display());
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}"))
}
