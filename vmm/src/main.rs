//! The binary `mapgpa`: all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    mapgpa::cli::main()
}
