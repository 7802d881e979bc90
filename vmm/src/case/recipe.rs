//! All that a run is made of, in the form in which cases and traces keep it: guest, options, rules.

use std::path::PathBuf;

use mapgpa_abi::Direction;
use mapgpa_abi::params::{BOUND_NONE, BOUND_OWN, Layout, Plan};
use serde::{Deserialize, Serialize};

use super::{Backend, Case, GuestSource, plan_name};
use crate::judge::Rules;
use crate::linux::case::LinuxCase;
use crate::linux::machine::Until;
use crate::policy::RuleForm;
use crate::units::show_size;

/// What a run is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// A guest's name, or the file of an ELF or a kernel.
    pub guest: String,
    /// Its options.
    pub run: RunForm,
    /// What only a kernel has; it says that the guest is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelForm>,
    /// The policy.
    pub rule: Vec<RuleForm>,
}

/// Options of a run; what is absent is the command line's default.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RunForm {
    /// `hosted`, `emulated` or `tdx`.
    pub backend: String,
    /// `direct`, or the model of a KVM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub front_end: Option<String>,
    /// Guest-physical address width in bits.
    pub gpaw: u32,
    /// Seed of the policy's draws.
    pub seed: u64,
    /// Which way; of a guest test.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direction: Option<String>,
    /// Bytes converted each way; of a guest test.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<String>,
    /// How the pages lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// Number of vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<usize>,
    /// Bytes of guest memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// How guest memory is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_model: Option<String>,
    /// The guest's bound, or none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<String>,
    /// The most bytes that the guest asks for at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_chunk: Option<String>,
    /// When the guest is ended at the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// A limit of the judge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_no_progress: Option<u64>,
    /// A limit of the judge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_calls: Option<u64>,
}

/// Options of a kernel.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelForm {
    /// Its release, for the reader.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// An initrd instead of our own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// What is added to the command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Size of swiotlb.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swiotlb: Option<String>,
    /// Modules that are loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub module: Vec<PathBuf>,
    /// A kexec at the end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kexec: bool,
    /// `userspace`, `conversions` or `exit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
}

/// Plans by name.
const PLANS: [Plan; 3] =
    [Plan::RoundTrip, Plan::One(Direction::ToShared), Plan::One(Direction::ToPrivate)];
const LAYOUTS: [(&str, Layout); 3] = [
    ("contiguous", Layout::Contiguous),
    ("scattered", Layout::Scattered),
    ("overlapping", Layout::Overlapping),
];
const UNTILS: [(&str, Until); 3] =
    [("userspace", Until::Userspace), ("conversions", Until::Conversions), ("exit", Until::Exit)];

/// The plan of this name.
#[must_use]
pub fn plan_by_name(name: &str) -> Option<Plan> {
    PLANS.into_iter().find(|plan| plan_name(*plan) == name)
}

/// The layout of this name.
#[must_use]
pub fn layout_by_name(name: &str) -> Option<Layout> {
    LAYOUTS.iter().find(|(of, _)| *of == name).map(|(_, layout)| *layout)
}

/// The end of a kernel's run of this name.
#[must_use]
pub fn until_by_name(name: &str) -> Option<Until> {
    UNTILS.iter().find(|(of, _)| *of == name).map(|(_, until)| *until)
}

/// Text for what is not the default.
fn unless<T: PartialEq>(value: &T, default: &T, show: impl FnOnce(&T) -> String) -> Option<String> {
    (value != default).then(|| show(value))
}

fn limits(rules: &Rules) -> (Option<u64>, Option<u64>) {
    let default = Rules::default();
    let other = |value: u64, default| (value != default).then_some(value);
    (
        other(rules.max_no_progress, default.max_no_progress),
        other(rules.max_calls, default.max_calls),
    )
}

impl Recipe {
    /// That of a guest test.
    #[must_use]
    pub fn of_test(case: &Case) -> Self {
        let default = Case::new(case.guest.clone_name(), case.policy.clone());
        let (max_no_progress, max_calls) = limits(&case.rules);
        let run = RunForm {
            backend: case.backend.name().to_owned(),
            front_end: unless(&case.front_end, &default.front_end, |front| front.name().to_owned()),
            gpaw: case.gpaw,
            seed: case.seed,
            direction: Some(plan_name(case.plan).to_owned()),
            range: Some(show_size(case.range)),
            layout: LAYOUTS
                .iter()
                .find(|(_, layout)| *layout == case.layout && *layout != Layout::Contiguous)
                .map(|(name, _)| (*name).to_owned()),
            vcpus: (case.vcpus != 1).then_some(case.vcpus),
            memory: case.memory.map(show_size),
            memory_model: unless(&case.memory_model, &default.memory_model, |model| {
                model.name().to_owned()
            }),
            bound: match case.bound {
                BOUND_OWN => None,
                BOUND_NONE => Some("none".to_owned()),
                bound => Some(bound.to_string()),
            },
            guest_chunk: (case.guest_chunk != 0).then(|| show_size(case.guest_chunk)),
            timeout: unless(&case.timeout, &default.timeout, |time| {
                format!("{}ns", time.as_nanos())
            }),
            max_no_progress,
            max_calls,
        };
        let rule = case.policy.rules.iter().map(RuleForm::from).collect();
        Self { guest: case.guest.name(), run, kernel: None, rule }
    }

    /// That of a kernel.
    #[must_use]
    pub fn of_kernel(case: &LinuxCase) -> Self {
        let options = &case.options;
        let (max_no_progress, max_calls) = limits(&case.run.rules);
        let run = RunForm {
            backend: Backend::Emulated.name().to_owned(),
            front_end: None,
            gpaw: case.run.gpaw,
            seed: case.run.seed,
            direction: None,
            range: None,
            layout: None,
            vcpus: (case.run.vcpus != 1).then_some(case.run.vcpus),
            memory: Some(show_size(options.memory)),
            memory_model: None,
            bound: None,
            guest_chunk: None,
            timeout: unless(&case.run.timeout, &super::machine::TIMEOUT, |time| {
                format!("{}ns", time.as_nanos())
            }),
            max_no_progress,
            max_calls,
        };
        let kernel = KernelForm {
            version: case.version().map(ToOwned::to_owned),
            initrd: options.initrd.clone(),
            cmdline: options.cmdline.clone(),
            swiotlb: options.swiotlb.map(show_size),
            module: options.modules.clone(),
            kexec: options.kexec,
            until: options.until.and_then(|until| {
                UNTILS.iter().find(|(_, of)| *of == until).map(|(name, _)| (*name).to_owned())
            }),
        };
        let rule = case.run.policy.rules.iter().map(RuleForm::from).collect();
        let guest = options.kernel.display().to_string();
        Self { guest, run, kernel: Some(kernel), rule }
    }
}

impl GuestSource {
    /// The same without the bytes of its file.
    fn clone_name(&self) -> Self {
        match self {
            Self::BuiltIn(guest) => Self::BuiltIn(*guest),
            Self::Elf { path, .. } => Self::Elf { path: path.clone(), image: Vec::new() },
        }
    }
}
