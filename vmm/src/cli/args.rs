//! The command line: what can be typed. Parsed first; then resolved into cases by [`super::resolve`].

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::ArgPredicate;
use clap::{Args, Parser, Subcommand, ValueEnum};
use mapgpa_abi::Direction;
use mapgpa_abi::params::{BOUND_NONE, Layout, Plan};
use mapgpa_kvm_model::Kernel;

use super::fuzz_args::{FuzzArgs, MergeArgs, ReplayArgs};
use super::machine_args::{FirmwareArgs, LinuxArgs};
use super::measure_args::{CompareArgs, SweepArgs};
use super::shard::{Shard, shard};
use crate::engine::FrontEnd;
use crate::memory::MemoryModel;
use crate::units;

const AFTER: &str = "\
Examples:
  mapgpa suite                                     every guest against every policy
  mapgpa run linux-6.7 --policy chunk=64K          one guest, one policy
  mapgpa run openvmm --policy r11=end --trace t.jsonl
  mapgpa explain chunk=64K,stall=2 --range 256K    what a policy says, without a guest
  mapgpa compare --range 1G --direction to-shared  what policies cost
  mapgpa fuzz openvmm --class hostile              what nobody listed
  mapgpa host                                      what this machine can do

Exit codes: 0 as expected, 1 violations found or a suite differs from its expectations, 2 usage or
bad input, 3 this host cannot do it, 4 internal error, 130 interrupted.";

/// A test VMM that answers a TDX guest's MapGPA calls by a policy, and judges its retry logic.
#[derive(Debug, Parser)]
#[command(name = "mapgpa", version, about, after_help = AFTER, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// What this machine can do, and how to get more of it to do it
    Host {
        /// Output form
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Lists the guests, the policies, or the checks
    List {
        what: Listed,
        /// Output form
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// A policy's replies to a guest that does all that it is told, without running a guest
    Explain {
        /// The policy: a spec string, or a file (*.toml); `mapgpa list policies` has the grammar
        policy: String,
        /// Bytes to convert each way
        #[arg(long, value_parser = units::page_size, default_value = "2M")]
        range: u64,
        /// Which way
        #[arg(long, value_enum, default_value_t)]
        direction: DirectionArg,
        /// What stands between the guest and the policy
        #[arg(long, value_enum, default_value_t)]
        front_end: FrontEndArg,
        /// Seed of the policy's draws
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Most calls shown
        #[arg(long, default_value_t = 20)]
        calls: usize,
    },
    /// One guest test under one policy
    Run(RunArgs),
    /// Every guest under every policy, held against what is expected
    Suite(SuiteArgs),
    /// What policies cost: the same conversion under each, in turn, measured
    Compare(CompareArgs),
    /// Which hosts a guest's bound on retries survives, and with which odds
    Sweep(SweepArgs),
    /// Policies made from seeds, against one guest; what fails is made small and written as a case
    Fuzz(FuzzArgs),
    /// Cases and traces again: whether they still go the same way
    Replay(ReplayArgs),
    /// Joins the reports of the shards of one suite, fuzz or sweep
    Merge(MergeArgs),
}

#[derive(Debug, Args)]
#[command(mut_arg("timeout", |arg| {
    arg.default_value_ifs([
        ("kernel", ArgPredicate::IsPresent, "60s"),
        ("firmware", ArgPredicate::IsPresent, "60s"),
    ])
    .help("When the guest is ended at the latest; with --kernel or --firmware after 60s")
}))]
pub(super) struct RunArgs {
    /// A guest's name (`mapgpa list guests`), or the file of an ELF made with the guest kit
    #[arg(required_unless_present_any = ["kernel", "firmware"])]
    #[arg(conflicts_with_all = ["kernel", "firmware"])]
    pub(super) guest: Option<String>,
    /// The policy: a spec string, or a file (*.toml); `mapgpa list policies` has the grammar
    #[arg(long, default_value = "complete")]
    pub(super) policy: String,
    #[command(flatten)]
    pub(super) case: CaseArgs,
    #[command(flatten)]
    pub(super) linux: LinuxArgs,
    #[command(flatten)]
    pub(super) firmware: FirmwareArgs,
    /// Writes a line of JSON for each MapGPA call to this file
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
    /// The most bytes that the guest asks for at a time
    #[arg(long, value_name = "SIZE", value_parser = units::page_size)]
    pub(super) guest_chunk: Option<u64>,
    /// Exit codes for `git bisect run`: 125 for what could not be tested
    #[arg(long)]
    pub(super) git_bisect: bool,
    /// Output form
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,
}

#[derive(Debug, Args)]
pub(super) struct SuiteArgs {
    /// Only these guests
    #[arg(long, value_delimiter = ',', value_name = "GUEST,...")]
    pub(super) guests: Vec<String>,
    /// Only these policies; at a comma, stall, contention, cost, after and overlap belong to the policy
    /// before it, all else begins a new one. With semicolons, only those separate
    #[arg(long, value_name = "SPEC,...")]
    pub(super) policies: Vec<String>,
    /// What is expected, instead of the built-in expectations
    #[arg(long, value_name = "FILE")]
    pub(super) expect: Option<PathBuf>,
    /// Only part I of N of the cases, by a hash of their names; `auto` or `auto/N` takes I from the
    /// environment (docs/ci.md)
    #[arg(long, value_name = "I/N", value_parser = shard)]
    pub(super) shard: Option<Shard>,
    /// Cases at a time [default: the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) jobs: Option<u16>,
    #[command(flatten)]
    pub(super) files: SuiteFilesArgs,
    /// Writes all of it to this one file, to send to others (*.tar.gz): what the host can do, the
    /// matrix, the reports, and the calls and replies of every case
    #[arg(long, value_name = "FILE")]
    pub(super) bundle: Option<PathBuf>,
    #[command(flatten)]
    pub(super) case: CaseArgs,
    /// The most bytes that the guest asks for at a time
    #[arg(long, value_name = "SIZE", value_parser = units::page_size)]
    pub(super) guest_chunk: Option<u64>,
}

/// Where the results of a suite go.
#[derive(Debug, Args)]
pub(super) struct SuiteFilesArgs {
    /// Writes JUnit XML to this file
    #[arg(long, value_name = "FILE")]
    pub(super) junit: Option<PathBuf>,
    /// Writes KTAP to this file
    #[arg(long, value_name = "FILE")]
    pub(super) ktap: Option<PathBuf>,
    /// Writes the report of every case to this file, also while the suite runs
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// What goes to stdout: the matrix, or the object of --json
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,
}

#[derive(Debug, Args, Clone)]
pub(super) struct CaseArgs {
    /// What the guest runs on; auto takes a VM, never this process
    #[arg(long, value_enum, default_value_t)]
    pub(super) backend: BackendArg,
    /// How guest memory is made: a mapping for each alias, on any KVM and with all checks, or
    /// guest_memfd with memory attributes, as a VMM of real TDs does it
    #[arg(long, value_enum, default_value_t)]
    pub(super) memory_model: MemoryModelArg,
    /// What stands between the guest and the policy: nothing, or a model of KVM's MapGPA, which a
    /// guest meets on a TDX host with that kernel or a later one
    #[arg(long, value_enum, default_value_t)]
    pub(super) front_end: FrontEndArg,
    /// Takes the nearest policy where KVM cannot express the one asked for, and says so
    #[arg(long)]
    pub(super) nearest: bool,
    /// Bytes of guest memory [default: what the range needs]
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub(super) memory: Option<u64>,
    /// Bytes to convert each way
    #[arg(long, value_name = "SIZE", value_parser = units::page_size, default_value = "2M")]
    pub(super) range: u64,
    /// Which way; round-trip is to shared, then back
    #[arg(long, value_enum, default_value_t)]
    pub(super) direction: DirectionArg,
    /// How the pages lie: in one run, apart as those of a vmalloc'ed buffer, or the same run for all
    /// vCPUs at once
    #[arg(long, value_enum, default_value_t)]
    pub(super) layout: LayoutArg,
    /// Replies without progress at which the guest gives up, or none [default: the guest's own]
    #[arg(long, value_name = "N|none", value_parser = bound)]
    pub(super) bound: Option<u64>,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) vcpus: usize,
    /// Guest-physical address width in bits [default: 48 where the host has that, else its most]
    #[arg(long, value_name = "N")]
    pub(super) gpaw: Option<u32>,
    /// Seed of the policy's draws
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// When the guest is ended at the latest
    #[arg(long, value_parser = units::time_limit, default_value = "10s")]
    pub(super) timeout: Duration,
    /// What a violation does to the run; endless retries always end it
    #[arg(long, value_enum, default_value_t)]
    pub(super) on_violation: OnViolation,
    /// Replies in a row without progress above which a guest's retries count as unbounded
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(super) max_no_progress: u64,
    /// Calls in a conversation, beside 4 a page, above which they count as unbounded
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub(super) max_calls: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum Format {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Listed {
    Guests,
    Policies,
    Checks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum BackendArg {
    #[default]
    Auto,
    Emulated,
    Tdx,
    Hosted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum MemoryModelArg {
    #[default]
    Alias,
    GuestMemfd,
}

impl From<MemoryModelArg> for MemoryModel {
    fn from(model: MemoryModelArg) -> Self {
        match model {
            MemoryModelArg::Alias => Self::Alias,
            MemoryModelArg::GuestMemfd => Self::GuestMemfd,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum FrontEndArg {
    #[default]
    Direct,
    #[value(name = "kvm-6.16")]
    Kvm6_16,
    #[value(name = "kvm-7.2")]
    Kvm7_2,
}

impl From<FrontEndArg> for FrontEnd {
    fn from(front_end: FrontEndArg) -> Self {
        match front_end {
            FrontEndArg::Direct => Self::Direct,
            FrontEndArg::Kvm6_16 => Self::Kvm(Kernel::V6_16),
            FrontEndArg::Kvm7_2 => Self::Kvm(Kernel::V7_2),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum DirectionArg {
    ToShared,
    ToPrivate,
    #[default]
    RoundTrip,
}

impl From<DirectionArg> for Plan {
    fn from(direction: DirectionArg) -> Self {
        match direction {
            DirectionArg::ToShared => Self::One(Direction::ToShared),
            DirectionArg::ToPrivate => Self::One(Direction::ToPrivate),
            DirectionArg::RoundTrip => Self::RoundTrip,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum LayoutArg {
    #[default]
    Contiguous,
    Scattered,
    Overlapping,
}

impl From<LayoutArg> for Layout {
    fn from(layout: LayoutArg) -> Self {
        match layout {
            LayoutArg::Contiguous => Self::Contiguous,
            LayoutArg::Scattered => Self::Scattered,
            LayoutArg::Overlapping => Self::Overlapping,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum OnViolation {
    #[default]
    Continue,
    Stop,
}

fn bound(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(BOUND_NONE),
        _ => match units::number(text) {
            Some(n @ 1..=1_000_000) => Ok(n),
            _ => Err(format!("expected a number from 1 to 1000000, or none, found \"{text}\"")),
        },
    }
}
