//! The command `suite`.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};
use mapgpa_guests::{GUESTS, GuestInfo};

use super::args::SuiteArgs;
use super::bundle::Bundle;
use super::keep::keeping;
use super::output;
use super::resolve::{self, Ground, split_policies, twice};
use super::suite_files::{SuiteFiles, apart, found};
use super::{CliError, Found};
use crate::case::{Backend, Case, CaseError};
use crate::expect::Expectations;
use crate::policy::Policy;
use crate::report::suite::SoFar;
use crate::suite::{CaseResult, POLICIES, in_shard, run};

/// `mapgpa suite`
pub(super) fn suite(args: &SuiteArgs) -> Result<Found, CliError> {
    let mut cases = cases(args)?;
    let expectations = match &args.expect {
        Some(path) => Expectations::read(path)?,
        None => Expectations::built_in()?,
    };
    apart(&args.files, args.bundle.as_deref())?;
    let files = SuiteFiles::open(&args.files)?;
    let bundle = Bundle::open(args.bundle.as_deref(), &mut cases)?;
    let jobs = resolve::jobs(args.jobs);
    let bar = progress_bar(cases.len());
    let result = match &files.json {
        None => run(&cases, &expectations, jobs, |case| show_progress(&bar, case)),
        Some(json) => {
            let so_far = Mutex::new(SoFar::new(cases.len()));
            let so_far = || so_far.lock().unwrap_or_else(PoisonError::into_inner);
            let keep = || {
                let news = so_far().news();
                if let Some(news) = news {
                    json.keep(|out| out.write_all(&news));
                }
            };
            let progress = |case: &CaseResult| {
                show_progress(&bar, case);
                so_far().add(case);
            };
            keeping(keep, || run(&cases, &expectations, jobs, progress))
        }
    };
    bar.finish_and_clear();

    if let Some(bundle) = bundle {
        bundle.write(&result)?;
    }
    files.write(&result)?;
    Ok(found(&result))
}

/// The cases of the suite and their numbers: guests in their order, policies in theirs.
fn cases(args: &SuiteArgs) -> Result<Vec<(usize, Case)>, CliError> {
    let names: Vec<String> = if args.policies.is_empty() {
        POLICIES.iter().map(ToString::to_string).collect()
    } else {
        args.policies.iter().flat_map(|list| split_policies(list)).collect()
    };
    let policies = names.iter().map(|name| Policy::parse(name)).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<String> = policies.iter().map(|policy| policy.name.clone()).collect();
    twice("policy", &names)?;
    twice("guest", &args.guests)?;
    let ground = resolve::ground(&args.case)?;
    let policies = expressible(policies, ground, args)?;
    let guests: Vec<&str> = if args.guests.is_empty() {
        let runs_here = |guest: &&GuestInfo| match ground.backend {
            Backend::Hosted => guest.hosted,
            Backend::Emulated | Backend::Tdx => guest.runs_with_gpaw(ground.gpaw),
        };
        GUESTS.iter().filter(runs_here).map(|guest| guest.name).collect()
    } else {
        args.guests.iter().map(String::as_str).collect()
    };
    let mut cases = Vec::with_capacity(guests.len() * policies.len());
    let mut number = 0;
    for guest in guests {
        let source = resolve::guest(guest)?;
        for policy in &policies {
            number += 1;
            let mut case = resolve::case(source.clone(), policy.clone(), &args.case, ground);
            case.guest_chunk = args.guest_chunk.unwrap_or(0);
            match case.check() {
                // In a suite such a case runs, and turns out as not exercised.
                Ok(()) | Err(CaseError::CannotApply { .. }) => {}
                // --bound is for the guests that have one.
                Err(CaseError::NoBound { .. }) if args.guests.is_empty() => {
                    case.bound = mapgpa_abi::params::BOUND_OWN;
                }
                Err(error) => return Err(error.into()),
            }
            let kept = args
                .shard
                .is_none_or(|shard| in_shard(guest, &policy.0.name, shard.index, shard.count));
            if kept {
                cases.push((number, case));
            }
        }
    }
    Ok(cases)
}

/// The policies that can be had on `ground`. What cannot is refused if it was asked for; of the
/// suite's own it is left out, which is said, or replaced by the nearest that is not there yet.
fn expressible(
    policies: Vec<Policy>,
    ground: Ground,
    args: &SuiteArgs,
) -> Result<Vec<(Policy, Option<String>)>, CliError> {
    let mut kept: Vec<(Policy, Option<String>)> = Vec::with_capacity(policies.len());
    let mut left_out = Vec::new();
    for policy in policies {
        match resolve::policy(policy, ground, args.case.nearest) {
            // The nearest to several, and what means the same by another name.
            Ok((near, _)) if args.case.nearest && has(&kept, &near) => {}
            Ok(policy) => kept.push(policy),
            Err(error) if args.policies.is_empty() => left_out.push(error.policy),
            Err(error) => return Err(ground.refuse(error)),
        }
    }
    if !left_out.is_empty() {
        output::complain(&format!(
            "mapgpa: left out, as {} cannot express them: {} (--nearest takes what comes nearest)",
            ground.front_end.name(),
            left_out.join("; ")
        ));
    }
    Ok(kept)
}

/// Whether a policy that does the same is there.
fn has(kept: &[(Policy, Option<String>)], policy: &Policy) -> bool {
    kept.iter().any(|(other, _)| other.rules == policy.rules)
}

/// A progress bar of `cases` steps, if stderr is a terminal.
pub(super) fn progress_bar(cases: usize) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(cases as u64);
    // The template is ours and well formed; without it the bar still shows.
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

fn show_progress(bar: &ProgressBar, case: &CaseResult) {
    if !case.as_expected() {
        bar.println(format!("not as expected: {} under {}", case.guest, case.policy));
    }
    bar.set_message(format!("{} under {}", case.guest, case.policy));
    bar.inc(1);
}
