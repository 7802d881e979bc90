//! Linker flags of a static program without a C library.

fn main() {
    for flag in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"] {
        println!("cargo::rustc-link-arg-bins={flag}");
    }
}
