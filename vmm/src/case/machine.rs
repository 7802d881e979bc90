//! What runs of kernels and of firmware have in common: what is asked of a run, how it is recorded,
//! and its report.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Recipe, RunError, trace_error};
use crate::backend::End;
use crate::backend::emulated::EmulatedError;
use crate::engine::{FrontEnd, Settings};
use crate::judge::{Judge, Rules};
use crate::policy::Policy;
use crate::report::{
    Console, Follow, Host, KernelRow, RUN_SCHEMA, Record, Recorder, RunReport, Totals, Trace,
    Verdict,
};

/// Time-out of a kernel or a firmware unless the user says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// What is asked of a run.
#[derive(Debug, Clone)]
pub struct MachineRun {
    /// The policy.
    pub policy: Policy,
    /// What stands between the guest and the policy.
    pub front_end: FrontEnd,
    /// The policy that this one stands for, and why, if the user's cannot be expressed.
    pub stands_for: Option<String>,
    /// Seed of its draws.
    pub seed: u64,
    /// Guest-physical address width in bits.
    pub gpaw: u32,
    /// vCPUs.
    pub vcpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// When the guest is ended at the latest.
    pub timeout: Duration,
    /// The judge's limits.
    pub rules: Rules,
    /// Where the trace goes.
    pub trace: Option<PathBuf>,
}

impl MachineRun {
    /// A run under `policy` with `memory` bytes; the rest are defaults.
    #[must_use]
    pub fn new(policy: Policy, memory: u64) -> Self {
        Self {
            policy,
            front_end: FrontEnd::Direct,
            stands_for: None,
            seed: 1,
            gpaw: 48,
            vcpus: 1,
            memory,
            timeout: TIMEOUT,
            rules: Rules::default(),
            trace: None,
        }
    }

    /// Its recorder; the console's lines go to `show` as they come, calls are held against those that
    /// `follow` has, and the trace says that the run is made of `recipe`.
    pub(crate) fn recorder(
        &self,
        show: Option<Box<dyn Write + Send>>,
        until_conversion: bool,
        recipe: Option<Recipe>,
        follow: Option<Follow>,
    ) -> Result<Recorder, RunError> {
        let trace = self.trace.as_deref().map(|path| Trace::create(path, recipe)).transpose();
        let trace = trace.map_err(|source| self.trace_error(source))?;
        let judge = Judge::new(self.rules, self.policy.is_special());
        let recorder = Recorder::new(judge, trace).following(follow);
        Ok(recorder.with_console(Console::new(show), until_conversion))
    }

    /// What its engine is made with.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            policy: self.policy.clone(),
            seed: self.seed,
            gpaw: self.gpaw,
            vcpus: self.vcpus,
            timing: true,
            front_end: self.front_end,
        }
    }

    /// The report of a run of `guest` that took `wall`, and what it failed with: `unfit`, unless it
    /// failed otherwise.
    pub(crate) fn report(
        &self,
        guest: &str,
        kernel: Option<KernelRow>,
        end: End<Recorder, EmulatedError>,
        unfit: Option<RunError>,
        wall: Duration,
    ) -> Result<(RunReport, Option<RunError>), RunError> {
        let error = end.error.map(RunError::from).or(unfit);
        let could_run = error.is_none() && !end.interrupted;
        let record = end.sink.finish().map_err(|source| self.trace_error(source))?;
        let Record { judgement, conversations, totals, console, phases, .. } = record;
        let wall_ns = u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX);
        let report = RunReport {
            schema: RUN_SCHEMA.into(),
            guest: guest.to_owned(),
            policy: self.policy.name.clone(),
            class: judgement.class,
            backend: "emulated".into(),
            front_end: self.front_end.name().into(),
            memory_model: "alias".into(),
            gpaw: self.gpaw,
            seed: self.seed,
            direction: "any".into(),
            range: conversations.iter().map(|row| row.size).sum(),
            // The guest's own timing decides when it asks.
            reproducible: self.policy.is_reproducible() && self.vcpus == 1,
            verdict: Verdict::of(&judgement, could_run),
            guest_result: judgement.result,
            violations: judgement.violations,
            notes: self.stands_for.iter().cloned().chain(judgement.notes).collect(),
            checks_off: end.checks_off.iter().map(|check| (*check).into()).collect(),
            conversations,
            totals: Totals { exits: end.exits, wall_ns, ..totals },
            kernel,
            firmware: None,
            phases,
            console,
            host: Host::this(),
        };
        Ok((report, error))
    }

    fn trace_error(&self, source: std::io::Error) -> RunError {
        trace_error(self.trace.as_deref().unwrap_or(Path::new("")), source)
    }
}
