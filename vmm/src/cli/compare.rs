//! The command `compare`.

use std::path::Path;
use std::time::{Duration, Instant};

use super::measure_args::CompareArgs;
use super::measured::Files;
use super::output;
use super::{CliError, Found, resolve, suite};
use crate::case::{Backend, Case};
use crate::compare::{Comparison, Outcome, directions};
use crate::policy::Policy;
use crate::report::{compare as report, page};
use crate::sweep::{self, SweepReport};

/// The policies that are compared unless the user names others.
const POLICIES: [&str; 6] = ["chunk=4K", "chunk=64K", "chunk=2M", "chunk=64M", "hyperv", "kvm-7.2"];
/// The least time between two writes of what there is so far.
const KEPT_EVERY: Duration = Duration::from_millis(50);
/// What ratios are to.
const BASE: &str = "complete";

/// `mapgpa compare`
pub(super) fn compare(args: &CompareArgs) -> Result<Found, CliError> {
    let cases = cases(args)?;
    let comparison = Comparison { cases, repeats: args.repeat.into(), floor: args.floor };
    let swept = args.sweep.as_deref().map(read_sweep).transpose()?;
    let files = Files::open(&args.reports)?;

    let bar = suite::progress_bar(comparison.cases.len() * comparison.repeats);
    let (mut kept, mut pause) = (Instant::now(), KEPT_EVERY);
    let result = comparison.run(|case, so_far| {
        bar.set_message(case.policy.name.clone());
        bar.inc(1);
        // Between runs, on their thread: nothing else shall run while one is measured.
        if args.reports.json.is_some() && kept.elapsed() >= pause {
            let began = Instant::now();
            if let Ok(report) = so_far() {
                files.keep(&report);
            }
            kept = Instant::now();
            pause = KEPT_EVERY.max((kept - began) * 10);
        }
    });
    bar.finish_and_clear();
    let result = result?;

    files.write(
        &result,
        &|out| report::csv(out, &result),
        &|out| page::write(out, Some(&result), swept.as_ref()),
        &|out| report::write(out, &result),
    )?;
    let has = |outcome| result.rows.iter().any(|row| row.outcome == outcome);
    Ok(if result.interrupted {
        Found::Interrupted
    } else if has(Outcome::Error) {
        Found::HostCannot
    } else if result.rows.iter().any(|row| row.outcome != Outcome::Completed) {
        Found::Violations
    } else {
        Found::Expected
    })
}

/// The report that `sweep --json` wrote.
fn read_sweep(path: &Path) -> Result<SweepReport, CliError> {
    let name = || path.display().to_string();
    let text =
        std::fs::read_to_string(path).map_err(|source| CliError::Read { path: name(), source })?;
    match serde_json::from_str::<SweepReport>(&text) {
        Ok(report) if report.schema == sweep::SCHEMA => {
            if report.unfinished {
                output::unfinished(&name());
            }
            Ok(report)
        }
        Ok(_) => Err(CliError::NoSweep { path: name(), source: None }),
        Err(source) => Err(CliError::NoSweep { path: name(), source: Some(source) }),
    }
}

/// The rows: directions, then guest-side chunks, then policies, `complete` first.
fn cases(args: &CompareArgs) -> Result<Vec<Case>, CliError> {
    let mut names = if args.policies.is_empty() {
        POLICIES.map(str::to_owned).to_vec()
    } else {
        args.policies.clone()
    };
    resolve::twice("policy", &names)?;
    if !names.iter().any(|name| name == BASE) {
        names.insert(0, BASE.to_owned());
    }
    let policies = names.iter().map(|name| Policy::parse(name)).collect::<Result<Vec<_>, _>>()?;
    let mut chunks = args.guest_chunks.clone();
    if chunks.is_empty() {
        chunks.push(0);
    }
    let shown: Vec<String> = chunks.iter().map(|chunk| crate::units::show_size(*chunk)).collect();
    resolve::twice("--guest-chunk", &shown)?;
    let guest = resolve::guest(&args.guest)?;
    let ground = resolve::ground(&args.case)?;
    let policies = policies
        .into_iter()
        .map(|policy| {
            resolve::policy(policy, ground, args.case.nearest).map_err(|error| ground.refuse(error))
        })
        .collect::<Result<Vec<_>, _>>()?;
    if args.floor && ground.backend != Backend::Emulated {
        return Err(CliError::Conflict(
            "--floor: the bare work is a VM's: it needs --backend emulated",
        ));
    }
    if args.floor && args.case.vcpus != 1 {
        return Err(CliError::Conflict(
            "--floor: the bare work is done on one vCPU: it needs --vcpus 1",
        ));
    }
    let whole = resolve::case(guest.clone(), (Policy::parse(BASE)?, None), &args.case, ground);
    let mut cases = Vec::new();
    for plan in directions(whole.plan) {
        // What ratios are to is there even if no row asks for all at a time.
        if !chunks.contains(&0) {
            cases.push(Case { plan, ..whole.clone() });
        }
        for guest_chunk in &chunks {
            for policy in &policies {
                let (policy, stands_for) = policy.clone();
                let guest_chunk = *guest_chunk;
                cases.push(Case { plan, policy, stands_for, guest_chunk, ..whole.clone() });
            }
        }
    }
    cases.iter().try_for_each(Case::check)?;
    Ok(cases)
}
