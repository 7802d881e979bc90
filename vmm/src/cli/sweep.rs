//! The command `sweep`.

use std::io::IsTerminal;
use std::path::Path;

use mapgpa_abi::params::BOUND_OWN;
use mapgpa_guests::{GUESTS, Guest};

use super::keep::keeping;
use super::measure_args::SweepArgs;
use super::measured::Files;
use super::{CliError, Found, resolve, suite};
use crate::backend::emulated;
use crate::case::{Case, RunError};
use crate::linux::case::{LinuxCase, MEMORY, Options};
use crate::linux::machine::Until;
use crate::policy::Policy;
use crate::report::{page, sweep as report};
use crate::sweep::{GuestSpec, HostSpec, SoFar, Sweep, SweepReport, Trouble};

/// The most cells: what people look at.
const CELLS_MAX: usize = 100_000;
/// GPAW where there is no VM to agree with.
const HOSTED_GPAW: u32 = 48;

/// `mapgpa sweep`
pub(super) fn sweep(args: &SweepArgs) -> Result<Found, CliError> {
    let sweep = Sweep {
        hosts: hosts(args)?,
        guests: guests(args)?,
        range: args.range,
        seed: args.seed,
        seeds: args.seeds,
        jobs: resolve::jobs(args.jobs),
        shard: args.shard.map_or((1, 1), |shard| (shard.index, shard.count)),
        timeout: args.timeout,
        verify: args.verify,
        gpaw: emulated::default_gpaw().unwrap_or(HOSTED_GPAW),
    };
    if sweep.hosts.len().saturating_mul(sweep.guests.len()) > CELLS_MAX {
        return Err(CliError::Conflict(
            "sweep: more than 100000 cells; leave out values of an axis",
        ));
    }
    let cases = sweep.cases()?;
    cases.iter().try_for_each(Case::check)?;
    let kernel =
        args.verify_kernel.as_deref().map(|path| kernel(args, &sweep, path)).transpose()?;
    let files = Files::open(&args.reports)?;

    let bar = suite::progress_bar(cases.len());
    let so_far = SoFar::begin();
    let mut seen = 0;
    let keep = || {
        if let Some(report) = sweep.news(&so_far, &mut seen) {
            files.keep(&report);
        }
    };
    keeping(keep, || {
        sweep.run(&cases, kernel, &so_far, |done, of| {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        });
    });
    bar.finish_and_clear();
    let result = sweep.report(&so_far);

    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    files.write(
        &result,
        &|out| report::csv(out, &result),
        &|out| page::write(out, None, Some(&result)),
        &|out| report::write(out, &result, colour),
    )?;
    Ok(found(&result))
}

/// What the exit code of a sweep is made of.
pub(super) fn found(result: &SweepReport) -> Found {
    let failed = result.cells.iter().any(|cell| cell.error.is_some())
        || result.verified.iter().any(|verified| verified.error.is_some());
    if result.interrupted || result.unfinished {
        Found::Interrupted
    } else if result.verified.iter().any(|cell| cell.error.is_none() && !cell.agrees()) {
        Found::Violations
    } else if failed {
        Found::HostCannot
    } else {
        Found::Expected
    }
}

/// The kernel in the file `path`, whose first conversion is of the sweep's range, as far as it can be
/// checked without running it.
fn kernel(args: &SweepArgs, sweep: &Sweep, path: &Path) -> Result<LinuxCase, CliError> {
    if !sweep.guests.first().is_some_and(GuestSpec::is_as_modelled) {
        return Err(CliError::Conflict(
            "--verify-kernel: the first guest is what the kernel is held against: it needs --bound \
             own and --guest-chunk none, which are the kernel's",
        ));
    }
    if args.verify == 0 {
        return Err(CliError::Conflict("--verify-kernel: with --verify 0 nothing is verified"));
    }
    let options = Options {
        kernel: path.to_owned(),
        initrd: None,
        cmdline: String::new(),
        swiotlb: Some(sweep.range),
        modules: Vec::new(),
        kexec: false,
        // Room for swiotlb, and for the kernel.
        memory: MEMORY.max(sweep.range.saturating_mul(4)),
        until: Some(Until::Conversions),
    };
    let mut case = LinuxCase::load(&options, Policy::parse("complete")?)
        .map_err(|error| error.named_by("--verify-kernel"))?;
    let run = &mut case.run;
    (run.seed, run.gpaw, run.timeout) = (sweep.seed, sweep.gpaw, sweep.timeout);
    case.check()?;
    let mode = emulated::kernel_mode().map_err(RunError::from)?;
    if mode.is_fit() { Ok(case) } else { Err(RunError::Unfit { mode }.into()) }
}

/// The hosts: stalls and contentions, each with all chunks.
fn hosts(args: &SweepArgs) -> Result<Vec<HostSpec>, CliError> {
    let stalls = args.stall.0.iter().map(|stall| Trouble::Stall(*stall));
    // Without contention is without stalls, which is there already.
    let drawn = args.contention.0.iter().filter(|p| **p > 0.0 || args.stall.0.is_empty());
    let troubles = stalls.chain(drawn.map(|p| Trouble::Contention(*p)));
    let hosts: Vec<HostSpec> = troubles
        .flat_map(|trouble| {
            args.chunk.0.iter().map(move |chunk| HostSpec { chunk: *chunk, trouble })
        })
        .collect();
    if hosts.is_empty() {
        return Err(CliError::Conflict("sweep: no hosts: give --stall or --contention a value"));
    }
    Ok(hosts)
}

/// The guests: each with all bounds and guest-side chunks.
fn guests(args: &SweepArgs) -> Result<Vec<GuestSpec>, CliError> {
    let all = args.guests.iter().any(|name| name == "all");
    let guests: Vec<Guest> = if all {
        GUESTS.iter().filter(|info| info.hosted).map(|info| info.guest).collect()
    } else {
        resolve::twice("guest", &args.guests)?;
        let guest = |name: &String| {
            Guest::by_name(name).ok_or_else(|| CliError::UnknownBuiltIn(name.clone()))
        };
        args.guests.iter().map(guest).collect::<Result<_, _>>()?
    };
    let mut specs = Vec::new();
    for guest in guests {
        for guest_chunk in &args.guest_chunk.0 {
            if all && !guest.info().takes_bound() {
                // --bound is for those that have one.
                specs.push(GuestSpec { guest, bound: BOUND_OWN, guest_chunk: *guest_chunk });
                continue;
            }
            for bound in &args.bound.0 {
                specs.push(GuestSpec { guest, bound: *bound, guest_chunk: *guest_chunk });
            }
        }
    }
    Ok(specs)
}
