//! Fuzz target `guest`; what it does is in `src/guest.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mapgpa_fuzz::guest::run(data));
