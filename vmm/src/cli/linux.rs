//! `mapgpa run --kernel`: from arguments to a run of a kernel.

use std::io::{self, Write};
use std::path::Path;

use super::CliError;
use super::args::{BackendArg, Format, LinuxArgs, MemoryModelArg, RunArgs};
use super::resolve::{self, Ground};
use crate::case::{Backend, Ran};
use crate::linux::case::{LinuxCase, MEMORY, Options};
use crate::policy::Policy;

/// Runs the kernel in the file `kernel`.
pub(super) fn run(args: &RunArgs, kernel: &Path) -> Result<Ran, CliError> {
    if args.case.backend == BackendArg::Tdx {
        return Err(CliError::Backend {
            backend: "tdx",
            why: "a kernel boots in a TD by firmware (TDVF), which this backend does not have; \
                  --backend emulated boots it on any KVM (docs/tdx-host.md)"
                .to_owned(),
        });
    }
    if args.case.backend == BackendArg::Hosted {
        return Err(CliError::Conflict(
            "--kernel: a kernel runs in a VM, not with --backend hosted",
        ));
    }
    if args.case.memory_model != MemoryModelArg::Alias {
        return Err(CliError::Conflict(
            "--kernel: needs --memory-model alias; KVM cannot read in guest_memfd the instructions and \
             page tables of a kernel, which it needs to emulate some of them",
        ));
    }
    let LinuxArgs { initrd, cmdline, swiotlb, module, kexec, until, console, .. } = &args.linux;
    let options = Options {
        kernel: kernel.to_owned(),
        initrd: initrd.clone(),
        cmdline: cmdline.clone().unwrap_or_default(),
        swiotlb: *swiotlb,
        modules: module.clone(),
        kexec: *kexec,
        memory: args.case.memory.unwrap_or(MEMORY),
        until: until.map(Into::into),
    };
    let front_end = args.case.front_end.into();
    let policy = Policy::parse(&args.policy)?;
    let ground = Ground { backend: Backend::Emulated, gpaw: 0, front_end };
    let (policy, stands_for) = resolve::policy(policy, ground, args.case.nearest)?;
    // What is wrong with the image is said even where no kernel could run.
    let mut case = LinuxCase::load(&options, policy)?;
    (case.front_end, case.stands_for) = (front_end, stands_for);
    case.vcpus = args.case.vcpus;
    case.seed = args.case.seed;
    case.timeout = args.case.timeout;
    case.rules = resolve::rules(&args.case);
    case.trace.clone_from(&args.trace);
    case.check()?;
    case.gpaw = resolve::emulated(&args.case)?.gpaw;
    case.check()?;
    let show: Option<Box<dyn Write + Send>> = match (console, args.format) {
        (false, _) => None,
        (true, Format::Text) => Some(Box::new(io::stdout())),
        (true, Format::Json) => Some(Box::new(io::stderr())),
    };
    Ok(case.run(show)?)
}
