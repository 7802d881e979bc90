//! Fuzz target `files`; what it does is in `src/files.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mapgpa_fuzz::files::run(data));
