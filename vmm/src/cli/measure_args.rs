//! What can be typed after `compare` and `sweep`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::args::{CaseArgs, Format};
use super::lists;
use super::shard::{Shard, shard};
use crate::units;

const SWEEP_AFTER: &str = "\
A cell of the heat map is a host (chunk across, stall or contention down) and the percentage of
conversions that a guest survives there: it reports success, and all pages are converted. Cells run
in this process; some are run in VMs too, and must agree in verdict and calls. A closed form beside
the measurement, (1-p^b)^n for a bound b and n positions, says what the bound alone gives.

Examples:
  mapgpa sweep                                           linux-6.7 (bound 3) and reference (16), 1 GiB
  mapgpa sweep --bound 1..8,none --guest linux-6.7 --range 64M
  mapgpa sweep --guest linux-6.7 --guest-chunk none,2M --html sweep.html
  mapgpa sweep --guest linux-6.7 --range 64M --verify 12 --verify-kernel /boot/vmlinuz-$(uname -r)

Exit codes: 0 done, 1 a VM or the kernel disagrees, 2 usage or bad input, 3 a cell could not be run, 4 internal
error, 130 interrupted (what was measured is shown).";

const COMPARE_AFTER: &str = "\
Every page of the range is written before its conversion, so that all memory work is in it. A round
trip is measured as two tables, to shared and to private; the latter's time includes accept. A row
whose guest hangs or gives up is shown as such, and is not repeated.

Examples:
  mapgpa compare --range 1G --direction to-shared --floor
  mapgpa compare --policy hyperv --guest-chunk none --guest-chunk 2M --range 256M
  mapgpa compare --policy chunk=64K --policy chunk=2M --html out.html --csv out.csv

Exit codes: 0 all rows completed, 1 a guest did not, 2 usage or bad input, 3 this host cannot do it,
4 internal error, 130 interrupted (what was measured is shown).";

#[derive(Debug, Args)]
#[command(after_help = COMPARE_AFTER)]
#[command(mut_arg("timeout", |arg| arg.default_value("60s")))]
pub(super) struct CompareArgs {
    /// A policy; may be given several times. `complete` is added: ratios are to it
    /// [default: chunk=4K, chunk=64K, chunk=2M, chunk=64M, hyperv and kvm-7.2]
    #[arg(long = "policy", value_name = "SPEC")]
    pub(super) policies: Vec<String>,
    /// The guest: a name (`mapgpa list guests`), or the file of an ELF made with the guest kit
    #[arg(long, default_value = "reference")]
    pub(super) guest: String,
    /// The most bytes that the guest asks for at a time, or none; may be given several times: each
    /// policy meets each
    #[arg(long = "guest-chunk", value_name = "SIZE|none", value_parser = guest_chunk)]
    pub(super) guest_chunks: Vec<u64>,
    /// Runs of each row; they take turns, so that a drift of the machine hits all alike
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(super) repeat: u16,
    /// Also runs the bare work of each row, its exits and hole punches without an engine, and shows
    /// the ratio to it
    #[arg(long)]
    pub(super) floor: bool,
    #[command(flatten)]
    pub(super) reports: ReportArgs,
    /// Adds the heat maps of this sweep, written by `mapgpa sweep --json`, to the page
    #[arg(long, value_name = "FILE", requires = "html")]
    pub(super) sweep: Option<PathBuf>,
    #[command(flatten)]
    pub(super) case: CaseArgs,
}

#[derive(Debug, Args)]
#[command(after_help = SWEEP_AFTER)]
pub(super) struct SweepArgs {
    /// Bytes that the host converts in one call: sizes, or A..B for A, 4A, 16A, ... B
    #[arg(
        long,
        value_name = "SIZES",
        value_parser = lists::sizes,
        default_value = "4K,16K,64K,256K,1M,2M,4M,16M,64M,256M,1G"
    )]
    pub(super) chunk: lists::List<u64>,
    /// Replies without progress at each position: numbers, A..B, or none for no such hosts
    #[arg(long, value_name = "NUMBERS", value_parser = lists::stalls, default_value = "0..5")]
    pub(super) stall: lists::List<u64>,
    /// Probabilities that a reply makes no progress: A..B for A, B and 1, 2, 5 of each power of ten
    /// between, or none
    #[arg(long, value_name = "P,...", value_parser = lists::probabilities, default_value = "0..0.5")]
    pub(super) contention: lists::List<f64>,
    /// Replies without progress at which the guest gives up: numbers, A..B, own, or none; 0 acts as 1
    #[arg(long, value_name = "NUMBERS|own|none", value_parser = lists::bounds, default_value = "own")]
    pub(super) bound: lists::List<u64>,
    /// Guests, or all for all built-in ones that can be run without a VM
    #[arg(long = "guest", value_delimiter = ',', default_value = "linux-6.7,reference")]
    pub(super) guests: Vec<String>,
    /// The most bytes that the guest asks for at a time: sizes, or none
    #[arg(long, value_name = "SIZES|none", value_parser = lists::guest_chunks, default_value = "none")]
    pub(super) guest_chunk: lists::List<u64>,
    /// Bytes to convert, to shared
    #[arg(long, value_parser = units::page_size, default_value = "1G")]
    pub(super) range: u64,
    /// Conversions of each cell in which something is drawn, each with a seed of its own
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(super) seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// Cells that are run in VMs too, and have to agree
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(super) verify: usize,
    /// A Linux kernel that the first guest models: as many cells are run with it as well, and have to
    /// agree. Its swiotlb is set to --range
    #[arg(long, value_name = "IMAGE")]
    pub(super) verify_kernel: Option<PathBuf>,
    /// Only part I of N of the cells; `auto` or `auto/N` takes I from the environment (docs/ci.md)
    #[arg(long, value_name = "I/N", value_parser = shard)]
    pub(super) shard: Option<Shard>,
    /// Threads [default: the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) jobs: Option<u16>,
    /// When one conversion is ended at the latest
    #[arg(long, value_parser = units::time_limit, default_value = "60s")]
    pub(super) timeout: Duration,
    #[command(flatten)]
    pub(super) reports: ReportArgs,
}

/// Where the figures go.
#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// Writes a line for each row or cell to this file
    #[arg(long, value_name = "FILE")]
    pub(super) csv: Option<PathBuf>,
    /// Writes a page with charts to this file; it needs no network
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Writes all figures to this file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// What goes to stdout: tables, or the object of --json
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,
}

fn guest_chunk(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        _ => units::page_size(text).map_err(|error| format!("{error}, or none")),
    }
}
