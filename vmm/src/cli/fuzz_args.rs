//! What can be typed after `fuzz`, `replay` and `merge`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::ArgPredicate;
use clap::{Args, ValueEnum};

use super::args::{BackendArg, CaseArgs, Format, SuiteFilesArgs};
use super::machine_args::LinuxArgs;
use super::shard::{Shard, shard};
use crate::judge::Class;
use crate::units;

const FUZZ_AFTER: &str = "\
A seed stands for a policy and what it meets: rules made near every boundary, a range, a direction.
Of each check that fails the lowest seed is made small, to the fewest and plainest rules that still
fail it, and written as a case that `mapgpa replay` runs again. The same seeds find the same, whatever
the number of threads. What is found is in --cases and --json from the moment it is known, so that
Ctrl-C, --time and a kill keep it. Classes: docs/policies.md.

Examples:
  mapgpa fuzz openvmm --class hostile                    what a hostile host does to OpenVMM's loop
  mapgpa fuzz my-guest.elf --class legal --backend emulated --seeds 2000
  mapgpa fuzz reference --time 10m --on-violation stop
  mapgpa fuzz linux-6.7 --shard 3/16 --json 3.json       then `mapgpa merge *.json`

Exit codes: 0 no check failed, 1 one did, 2 usage or bad input, 3 this host cannot do it, 4 internal
error, 130 interrupted (what was found is kept).";

const REPLAY_AFTER: &str = "\
A case (*.toml) is reproduced if the same checks fail, the guest ends in the same way, and the check
that it is about fails in the same call at the same address. A trace (*.jsonl, `mapgpa run --trace`) is
reproduced if the guest, given the recorded decisions, makes the recorded calls; else the first that is
another is shown.

Exit codes: 0 all reproduced, 1 one is not, 2 usage or bad input, 3 this host cannot do it, 130
interrupted.";

const MERGE_AFTER: &str = "\
Reads the --json files of the shards of one suite, fuzz or sweep, and joins them: cases and cells in
their order, findings folded to one of each check, sums added. All shards together give what one run
without --shard gives, in all its forms. A report that is unfinished, as a run that is killed leaves
it, is joined as far as it goes, and named on stderr.

Exit codes: as the command whose reports are joined.";

#[derive(Debug, Args)]
#[command(after_help = FUZZ_AFTER)]
#[command(mut_arg("backend", |arg| arg.default_value("hosted")
    .help("What the guest runs on; hosted, this process, is the fastest")))]
#[command(mut_arg("seed", |arg| arg.help("The first seed")))]
#[command(mut_arg("range", |arg| arg.hide_default_value(true)
    .help("Bytes to convert each way [default: drawn]")))]
#[command(mut_arg("direction", |arg| arg.hide_default_value(true)
    .help("Which way [default: drawn]")))]
#[command(mut_arg("layout", |arg| arg.hide_default_value(true)
    .help("How the pages lie: in one run, or apart [default: drawn]")))]
#[command(mut_arg("timeout", |arg| arg.default_value_if("kernel", ArgPredicate::IsPresent, "60s")
    .help("When a run is ended at the latest; with --kernel after 60s")))]
#[command(mut_arg("on_violation", |arg| arg
    .help("Collects a case of each check that fails, or stops at the lowest seed that fails")))]
pub(super) struct FuzzArgs {
    /// A guest's name (`mapgpa list guests`), or the file of an ELF made with the guest kit
    #[arg(required_unless_present = "kernel", conflicts_with = "kernel")]
    pub(super) guest: Option<String>,
    /// What the replies may be
    #[arg(long, value_enum, default_value = "hostile")]
    pub(super) class: ClassArg,
    /// How many seeds [default: 100000; 1000 in VMs, 20 with --kernel; with --time no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) seeds: Option<u64>,
    /// When all has to end, making findings small included
    #[arg(long, value_name = "DURATION", value_parser = units::time_limit)]
    pub(super) time: Option<Duration>,
    /// Only part I of N of the seeds; `auto` or `auto/N` takes I from the environment (docs/ci.md)
    #[arg(long, value_name = "I/N", value_parser = shard)]
    pub(super) shard: Option<Shard>,
    /// Threads [default: the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) jobs: Option<u16>,
    /// The directory that small cases are written to
    #[arg(long, value_name = "DIR", default_value = "mapgpa-cases")]
    pub(super) cases: PathBuf,
    /// Runs that making a finding small may take [default: 20000; 2000 in VMs, 20 with --kernel]
    #[arg(long, value_name = "N")]
    pub(super) shrink_runs: Option<u64>,
    /// Writes the report to this file, also while the campaign runs
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// What goes to stdout: text, or the object of --json
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,
    #[command(flatten)]
    pub(super) case: CaseArgs,
    #[command(flatten)]
    pub(super) linux: LinuxArgs,
    /// The most bytes that the guest asks for at a time
    #[arg(long, value_name = "SIZE", value_parser = units::page_size)]
    pub(super) guest_chunk: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ClassArg {
    /// True, at most two in a row without progress: the guest must converge
    Legal,
    /// True: the guest may also give up
    Stalling,
    /// True, and error statuses: the guest must give up
    Refusing,
    /// Anything: any end without a violation
    Hostile,
}

impl From<ClassArg> for Class {
    fn from(class: ClassArg) -> Self {
        match class {
            ClassArg::Legal => Self::Legal,
            ClassArg::Stalling => Self::Stalling,
            ClassArg::Refusing => Self::Refusing,
            ClassArg::Hostile => Self::Hostile,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = REPLAY_AFTER)]
pub(super) struct ReplayArgs {
    /// Cases (*.toml) and traces (*.jsonl)
    #[arg(required = true, value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
    /// What guests run on, instead of what was recorded
    #[arg(long, value_enum)]
    pub(super) backend: Option<BackendArg>,
    /// Output form
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = MERGE_AFTER)]
#[command(mut_arg("junit", |arg| arg.help("Writes JUnit XML to this file; of a suite")))]
#[command(mut_arg("ktap", |arg| arg.help("Writes KTAP to this file; of a suite")))]
#[command(mut_arg("json", |arg| arg.help("Writes the joined report to this file")))]
#[command(mut_arg("format", |arg| arg.help("What goes to stdout: text, or the object of --json")))]
pub(super) struct MergeArgs {
    /// Reports of shards, written by --json
    #[arg(required = true, value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
    /// The directory that the small cases of a fuzz campaign are written to
    #[arg(long, value_name = "DIR")]
    pub(super) cases: Option<PathBuf>,
    #[command(flatten)]
    pub(super) reports: SuiteFilesArgs,
}
