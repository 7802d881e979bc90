//! Linker flags of a bare-metal image: no start files, no libraries, fixed addresses (link.ld).

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    let script = format!("-Wl,-T,{}/link.ld", env!("CARGO_MANIFEST_DIR"));
    let flags = [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
        &script,
    ];
    for flag in flags {
        println!("cargo::rustc-link-arg-bins={flag}");
        println!("cargo::rustc-link-arg-examples={flag}");
    }
}
