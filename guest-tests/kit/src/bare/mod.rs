//! The half of the kit that runs on a real (or emulated) vCPU: entry point, TDCALL, memory access,
//! and the reports of a panic or an unhandled exception.
//!
//! A guest test is a `no_std`, `no_main` binary, linked statically between
//! [`IMAGE_START`](mapgpa_abi::layout::IMAGE_START) and
//! [`IMAGE_END`](mapgpa_abi::layout::IMAGE_END), with one [`entry!`](crate::entry!):
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! mapgpa_kit::entry!(main);
//! fn main(td: &mut mapgpa_kit::bare::BareTd, params: &mapgpa_kit::abi::params::Params) -> bool {
//!     /* ... */
//! }
//! ```
//!
//! What the function returns is reported as success or failure, a panic with its message and place,
//! an unhandled exception with its registers.
//! Nothing here needs ring 0: on the emulated backend a guest test runs at CPL 3.
#![allow(unsafe_code, reason = "entry code, TDCALL and memory access of a bare-metal guest")]

mod entry;
mod exceptions;
mod mem;
mod panic;
mod td;

#[doc(hidden)]
pub use entry::Main;
pub use td::BareTd;

/// Names the guest test's function: `fn(&mut BareTd, &Params) -> bool`, once for each vCPU.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        static MAPGPA_MAIN: $crate::bare::Main = $main;
    };
}
