//! Fuzz target `policy`; what it does is in `src/policy.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mapgpa_fuzz::policy::run(data));
