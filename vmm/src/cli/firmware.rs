//! `mapgpa run --firmware`: from arguments to a run of a firmware.

use std::path::Path;

use super::args::{BackendArg, MemoryModelArg, RunArgs};
use super::{CliError, linux, resolve};
use crate::case::Ran;
use crate::firmware::case::{FirmwareCase, MEMORY, Options};
use crate::policy::Policy;

/// What is said to the options of kernels without one.
const NEEDS_KERNEL: &str = "--initrd, --cmdline, --swiotlb, --module and --kexec are about a kernel: \
                            they need --kernel";

/// Runs the firmware in the file `firmware`, which boots a kernel if there is one.
pub(super) fn run(args: &RunArgs, firmware: &Path) -> Result<Ran, CliError> {
    if args.case.backend == BackendArg::Tdx {
        return Err(CliError::Backend {
            backend: "tdx",
            why: "a firmware's requests are answered by --backend emulated, on any KVM".to_owned(),
        });
    }
    if args.case.backend == BackendArg::Hosted {
        return Err(CliError::Conflict(
            "--firmware: a firmware runs in a VM, not with --backend hosted",
        ));
    }
    if args.case.memory_model != MemoryModelArg::Alias {
        return Err(CliError::Conflict(
            "--firmware: needs --memory-model alias; KVM cannot read in guest_memfd the instructions and \
             page tables of a firmware, which it needs to emulate some of them",
        ));
    }
    if args.linux.kernel.is_none() && args.linux.any_of_kernel() {
        return Err(CliError::Conflict(NEEDS_KERNEL));
    }
    let kernel = args.linux.kernel.as_deref();
    let options = Options {
        firmware: firmware.to_owned(),
        kernel: kernel.map(|kernel| linux::options(&args.linux, &args.case, kernel, MEMORY)),
        scenarios: args.firmware.scenario.iter().map(|scenario| (*scenario).into()).collect(),
        until: args.linux.until.map(Into::into),
        memory: args.case.memory.unwrap_or(MEMORY),
    };
    let (policy, stands_for) = linux::policy(Policy::parse(&args.policy)?, &args.case)?;
    // What is wrong with the image is said even where no firmware could run.
    let mut case = FirmwareCase::load(&options, policy)?;
    linux::set(&mut case.run, &args.case, stands_for);
    case.run.trace.clone_from(&args.trace);
    case.check()?;
    case.run.gpaw = resolve::emulated(&args.case)?.gpaw;
    case.check()?;
    Ok(case.run(linux::show(args))?)
}
