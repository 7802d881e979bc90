//! The command `fuzz`.

use std::path::Path;
use std::time::Instant;

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::args::{BackendArg, Format, OnViolation};
use super::fuzz_args::FuzzArgs;
use super::fuzz_watch::{Kept, Shown};
use super::keep::keeping;
use super::output::{self, Output};
use super::{CliError, Found, linux, resolve};
use crate::case::{Backend, CaseError};
use crate::engine::FrontEnd;
use crate::fuzz::{Fixed, Fuzz, FuzzError, FuzzReport, Live, Target};
use crate::policy::{Action, Policy};
use crate::report::fuzz as report;

/// The highest seed: what TOML has numbers for.
const SEED_MAX: u64 = i64::MAX as u64;

/// `mapgpa fuzz`; `matches` are those of its arguments.
pub(super) fn fuzz(args: &FuzzArgs, matches: &ArgMatches) -> Result<Found, CliError> {
    let began = Instant::now();
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let target = target(args)?;
    let many = |hosted, vms, kernel| match &target {
        Target::Test(case) if case.backend == Backend::Hosted => hosted,
        Target::Test(_) => vms,
        Target::Kernel(_) => kernel,
    };
    let most = SEED_MAX - args.case.seed.min(SEED_MAX);
    let default = if args.time.is_some() { most } else { many(100_000, 1_000, 20).min(most) };
    let seeds = args.seeds.unwrap_or(default);
    if seeds == 0 || seeds > most {
        return Err(CliError::Conflict("fuzz: --seed and --seeds reach over 2^63 - 1"));
    }
    let fuzz = Fuzz {
        class: args.class.into(),
        fixed: Fixed {
            range: given("range").then_some(args.case.range),
            plan: given("direction").then_some(args.case.direction.into()),
            layout: given("layout").then_some(args.case.layout.into()),
        },
        seed: args.case.seed,
        seeds,
        shard: args.shard.map_or((1, 1), |shard| (shard.index, shard.count)),
        jobs: if matches!(target, Target::Kernel(_)) { 1 } else { resolve::jobs(args.jobs) },
        // A kernel has been read and searched for TDCALLs by now.
        time: args.time.map(|time| time.saturating_sub(began.elapsed())),
        stop: args.case.on_violation == OnViolation::Stop,
        shrink_runs: args.shrink_runs.unwrap_or(many(20_000, 2_000, 20)),
        target,
    };
    let json = Output::create("--json", args.json.as_deref())?;

    let live = Live::new(&fuzz);
    let shown = Shown::new(&fuzz);
    let mut kept = Kept::new(json.as_ref(), &args.cases);
    keeping(|| kept.keep(&fuzz, &live), || fuzz.run(&live, |progress| shown.on(progress)));
    shown.clear();

    let campaign = live.into_campaign();
    let result = FuzzReport::new(&fuzz, &campaign);
    write_cases(&result, &args.cases)?;
    kept.discard_cases();
    if let Some(output) = json {
        output.write(|out| output::json(out, &result))?;
    }
    let cases = args.cases.display().to_string();
    output::stdout(|out| match args.format {
        Format::Text => report::write(out, &result, Some(&cases)),
        Format::Json => output::json(out, &result),
    })?;
    match campaign.error {
        Some(FuzzError::Run { source, .. }) => Err(source.into()),
        Some(error @ FuzzError::Class { .. }) => Err(CliError::Fuzz(error)),
        None if campaign.interrupted => Ok(Found::Interrupted),
        None if campaign.findings.is_empty() => Ok(Found::Expected),
        None => Ok(Found::Violations),
    }
}

/// Writes the small case of each finding into the directory `dir`, which is made if there is one.
pub(super) fn write_cases(report: &FuzzReport, dir: &Path) -> Result<(), CliError> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |source| CliError::Write { option: "--cases", path, source }
    };
    if !report.findings.is_empty() {
        std::fs::create_dir_all(dir).map_err(failed(dir))?;
    }
    for finding in &report.findings {
        let path = dir.join(report.case_name(finding));
        std::fs::write(&path, &finding.case).map_err(failed(&path))?;
    }
    Ok(())
}

fn target(args: &FuzzArgs) -> Result<Target, CliError> {
    let policy = Policy::of("fuzz", Action::COMPLETE);
    if args.case.layout == super::args::LayoutArg::Overlapping {
        return Err(CliError::Conflict(
            "fuzz: --layout overlapping depends on which vCPU comes first: no seed stands for that",
        ));
    }
    if FrontEnd::from(args.case.front_end) != FrontEnd::Direct {
        return Err(CliError::Conflict(
            "fuzz: --front-end: policies are made that a KVM cannot express",
        ));
    }
    if let Some(kernel) = &args.linux.kernel {
        // The default here is hosted, which no kernel runs on.
        let mut case = args.case.clone();
        if case.backend == BackendArg::Hosted {
            case.backend = BackendArg::Auto;
        }
        let case = linux::case(&args.linux, &case, kernel, policy)?;
        return Ok(Target::Kernel(Box::new(case)));
    }
    if args.linux.any() {
        return Err(CliError::Conflict(super::commands::NEEDS_KERNEL));
    }
    let guest = resolve::guest(args.guest.as_deref().unwrap_or_default())?;
    let ground = resolve::ground(&args.case)?;
    let mut case = resolve::case(guest, (policy, None), &args.case, ground);
    // What ends a run is not what ends the campaign.
    case.rules.stop = false;
    case.guest_chunk = args.guest_chunk.unwrap_or(0);
    match case.check() {
        Ok(()) | Err(CaseError::CannotApply { .. }) => Ok(Target::Test(Box::new(case))),
        Err(error) => Err(error.into()),
    }
}
