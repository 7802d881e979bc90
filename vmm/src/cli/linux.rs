//! `mapgpa run --kernel`: from arguments to a run of a kernel.

use std::io::{self, Write};
use std::path::Path;

use super::CliError;
use super::args::{BackendArg, CaseArgs, Format, MemoryModelArg, RunArgs};
use super::machine_args::LinuxArgs;
use super::resolve::{self, Ground};
use crate::case::machine::MachineRun;
use crate::case::{Backend, Ran};
use crate::linux::case::{LinuxCase, MEMORY, Options};
use crate::policy::Policy;

/// Runs the kernel in the file `kernel`.
pub(super) fn run(args: &RunArgs, kernel: &Path) -> Result<Ran, CliError> {
    let mut case = case(&args.linux, &args.case, kernel, Policy::parse(&args.policy)?)?;
    case.run.trace.clone_from(&args.trace);
    Ok(case.run(show(args))?)
}

/// The case of the kernel in the file `kernel` under `policy`.
pub(super) fn case(
    linux: &LinuxArgs,
    args: &CaseArgs,
    kernel: &Path,
    policy: Policy,
) -> Result<LinuxCase, CliError> {
    if args.backend == BackendArg::Tdx {
        return Err(CliError::Backend {
            backend: "tdx",
            why: "a kernel boots in a TD by firmware (TDVF), which this backend does not have; \
                  --backend emulated boots it on any KVM (docs/tdx-host.md)"
                .to_owned(),
        });
    }
    if args.backend == BackendArg::Hosted {
        return Err(CliError::Conflict(
            "--kernel: a kernel runs in a VM, not with --backend hosted",
        ));
    }
    if args.memory_model != MemoryModelArg::Alias {
        return Err(CliError::Conflict(
            "--kernel: needs --memory-model alias; KVM cannot read in guest_memfd the instructions and \
             page tables of a kernel, which it needs to emulate some of them",
        ));
    }
    let options = options(linux, args, kernel, MEMORY);
    let (policy, stands_for) = self::policy(policy, args)?;
    // What is wrong with the image is said even where no kernel could run.
    let mut case = LinuxCase::load(&options, policy)?;
    set(&mut case.run, args, stands_for);
    case.check()?;
    case.run.gpaw = resolve::emulated(args)?.gpaw;
    case.check()?;
    Ok(case)
}

/// The policy that can be had, and what it stands for.
pub(super) fn policy(
    policy: Policy,
    args: &CaseArgs,
) -> Result<(Policy, Option<String>), CliError> {
    let front_end = args.front_end.into();
    let ground = Ground { backend: Backend::Emulated, gpaw: 0, front_end };
    Ok(resolve::policy(policy, ground, args.nearest)?)
}

/// What the arguments say of the kernel in the file `kernel`, with `memory` bytes unless they say
/// otherwise.
pub(super) fn options(linux: &LinuxArgs, args: &CaseArgs, kernel: &Path, memory: u64) -> Options {
    let LinuxArgs { initrd, cmdline, swiotlb, module, kexec, until, .. } = linux;
    Options {
        kernel: kernel.to_owned(),
        initrd: initrd.clone(),
        cmdline: cmdline.clone().unwrap_or_default(),
        swiotlb: *swiotlb,
        modules: module.clone(),
        kexec: *kexec,
        memory: args.memory.unwrap_or(memory),
        until: until.map(Into::into),
    }
}

/// Sets what the arguments say of a run; its policy stands for another, if `stands_for` says so.
pub(super) fn set(run: &mut MachineRun, args: &CaseArgs, stands_for: Option<String>) {
    run.front_end = args.front_end.into();
    run.stands_for = stands_for;
    run.vcpus = args.vcpus;
    run.seed = args.seed;
    run.timeout = args.timeout;
    run.rules = resolve::rules(args);
}

/// Where the console is shown, if it is.
pub(super) fn show(args: &RunArgs) -> Option<Box<dyn Write + Send>> {
    match (args.linux.console, args.format) {
        (false, _) => None,
        (true, Format::Text) => Some(Box::new(io::stdout())),
        (true, Format::Json) => Some(Box::new(io::stderr())),
    }
}
