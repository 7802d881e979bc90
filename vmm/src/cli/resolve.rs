//! From arguments to cases: names looked up, policies read, defaults filled in, all of it checked.

use std::path::Path;

use mapgpa_abi::params::BOUND_OWN;
use mapgpa_guests::Guest;

use super::CliError;
use super::args::{BackendArg, CaseArgs, MemoryModelArg, OnViolation};
use crate::backend::{emulated, tdx};
use crate::case::{Backend, Case, GuestSource, RunError};
use crate::engine::FrontEnd;
use crate::express::{Inexpressible, express};
use crate::judge::Rules;
use crate::one_line;
use crate::policy::Policy;

/// The guest of this name, or the ELF in this file.
pub(super) fn guest(name: &str) -> Result<GuestSource, CliError> {
    if let Some(guest) = Guest::by_name(name) {
        return Ok(GuestSource::BuiltIn(guest));
    }
    let path = Path::new(name);
    if !path.exists() {
        return Err(CliError::UnknownGuest(name.to_owned()));
    }
    GuestSource::of_file(path).map_err(|source| CliError::Read { path: name.to_owned(), source })
}

/// What guests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ground {
    /// The backend.
    pub(super) backend: Backend,
    /// GPAW of guests on it.
    pub(super) gpaw: u32,
    /// What stands between them and the policy.
    pub(super) front_end: FrontEnd,
}

impl Ground {
    /// The error of a policy that cannot be expressed here: the host's, if it is a TDX host.
    pub(super) fn refuse(self, error: Inexpressible) -> CliError {
        if self.backend == Backend::Tdx { CliError::TdxInexpressible(error) } else { error.into() }
    }
}

/// GPAW of guests that need not agree with a host.
const USUAL_GPAW: u32 = 48;

/// The backend, the GPAW of guests on it, and the front-end.
pub(super) fn ground(args: &CaseArgs) -> Result<Ground, CliError> {
    let front_end = args.front_end.into();
    // On a TDX host the front-end is what is there, unless the user knows better (a backport).
    let on_tdx = || Ground {
        backend: Backend::Tdx,
        gpaw: args.gpaw.unwrap_or(USUAL_GPAW),
        front_end: match front_end {
            FrontEnd::Direct => FrontEnd::Kvm(tdx::kernel()),
            kvm @ FrontEnd::Kvm(_) => kvm,
        },
    };
    match args.backend {
        BackendArg::Hosted if args.memory_model != MemoryModelArg::Alias => {
            Err(CliError::Conflict(
                "--memory-model: with --backend hosted there is no memory behind the pages",
            ))
        }
        BackendArg::Hosted => {
            let gpaw = args.gpaw.unwrap_or(USUAL_GPAW);
            Ok(Ground { backend: Backend::Hosted, gpaw, front_end })
        }
        BackendArg::Tdx => match tdx::facts() {
            Ok(_) => Ok(on_tdx()),
            Err(error) => {
                let hint = "--backend emulated plays the TDX module on any KVM";
                let why = format!("{} ({hint})", one_line(&error));
                Err(CliError::Backend { backend: "tdx", why })
            }
        },
        // Who asks for a model, or another memory, does not mean the TDs that may be here.
        BackendArg::Auto
            if front_end == FrontEnd::Direct
                && args.memory_model == MemoryModelArg::Alias
                && tdx::facts().is_ok() =>
        {
            Ok(on_tdx())
        }
        BackendArg::Auto | BackendArg::Emulated => emulated(args),
    }
}

/// Backend `emulated`, the GPAW of guests on it, and the front-end.
pub(super) fn emulated(args: &CaseArgs) -> Result<Ground, CliError> {
    match emulated::default_gpaw() {
        Ok(gpaw) => {
            let model = args.memory_model.into();
            emulated::check_memory_model(model).map_err(RunError::from)?;
            let gpaw = args.gpaw.unwrap_or(gpaw);
            Ok(Ground { backend: Backend::Emulated, gpaw, front_end: args.front_end.into() })
        }
        Err(error) => {
            let backend = if args.backend == BackendArg::Auto { "auto" } else { "emulated" };
            let hint = "`mapgpa host` says what to do; --backend hosted needs no KVM";
            Err(CliError::Backend { backend, why: format!("{} ({hint})", one_line(&error)) })
        }
    }
}

/// The judge's limits.
pub(super) fn rules(args: &CaseArgs) -> Rules {
    Rules {
        max_no_progress: args.max_no_progress,
        max_calls: args.max_calls,
        stop: args.on_violation == OnViolation::Stop,
    }
}

/// The policy that can be had on `ground`, and what a report says if it is not the one asked for.
pub(super) fn policy(
    policy: Policy,
    ground: Ground,
    nearest: bool,
) -> Result<(Policy, Option<String>), Inexpressible> {
    let FrontEnd::Kvm(kernel) = ground.front_end else { return Ok((policy, None)) };
    match express(&policy, kernel) {
        Ok(()) => Ok((policy, None)),
        Err(error) if nearest => {
            let note = error.note();
            Ok((error.nearest, Some(note)))
        }
        Err(error) => Err(error),
    }
}

/// The case of `guest` and `policy` with the options of `args`.
pub(super) fn case(
    guest: GuestSource,
    (policy, stands_for): (Policy, Option<String>),
    args: &CaseArgs,
    ground: Ground,
) -> Case {
    let Ground { backend, gpaw, front_end } = ground;
    Case {
        guest,
        policy,
        backend,
        front_end,
        stands_for,
        seed: args.seed,
        gpaw,
        plan: args.direction.into(),
        layout: args.layout.into(),
        range: args.range,
        memory: args.memory,
        memory_model: args.memory_model.into(),
        bound: args.bound.unwrap_or(BOUND_OWN),
        guest_chunk: 0,
        vcpus: args.vcpus,
        timeout: args.timeout,
        rules: rules(args),
        trace: None,
    }
}

/// Splits a list of policies. Specs have commas of their own, so an item that only modifies a policy
/// stays with the one before it, unless that has such an item already.
pub(super) fn split_policies(list: &str) -> Vec<String> {
    if list.contains(';') {
        return list.split(';').map(|spec| spec.trim().to_owned()).collect();
    }
    let key = |item: &str| item.split('=').next().unwrap_or_default().to_owned();
    let mut policies: Vec<String> = Vec::new();
    for item in list.split(',') {
        let modifies = ["stall", "contention", "cost", "after", "overlap"].contains(&&*key(item));
        let alone = |policy: &str| policy == "random" || policy == "hostile-random";
        match policies.last_mut() {
            Some(last)
                if modifies
                    && !alone(last)
                    && last.split(',').all(|other| key(other) != key(item)) =>
            {
                last.push(',');
                last.push_str(item);
            }
            _ => policies.push(item.to_owned()),
        }
    }
    policies
}

/// Threads: as many as asked for, or as there are processors.
pub(super) fn jobs(asked: Option<u16>) -> usize {
    asked.map_or_else(
        || std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        usize::from,
    )
}

/// Refuses a list in which a name is given twice.
pub(super) fn twice(what: &'static str, names: &[String]) -> Result<(), CliError> {
    for (at, name) in names.iter().enumerate() {
        if names[..at].contains(name) {
            return Err(CliError::Twice { what, name: name.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_split_where_a_new_one_begins() {
        for (list, policies) in [
            ("complete", vec!["complete"]),
            ("complete,chunk=4K", vec!["complete", "chunk=4K"]),
            ("chunk=64K,stall=2,r11=end,after=1", vec!["chunk=64K,stall=2", "r11=end,after=1"]),
            ("stall=1,stall=2", vec!["stall=1", "stall=2"]),
            ("random,contention=0.1,stall=1", vec!["random", "contention=0.1,stall=1"]),
            ("hyperv,cost=400ns,random", vec!["hyperv,cost=400ns", "random"]),
            ("chunk=4K,r11=end; complete", vec!["chunk=4K,r11=end", "complete"]),
            ("a.toml,b.toml", vec!["a.toml", "b.toml"]),
        ] {
            assert_eq!(split_policies(list), policies);
        }
    }
}
