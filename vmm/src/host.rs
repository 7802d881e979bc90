//! What this machine can do, and how to get more of it: facts in plain words, found by booting
//! canaries rather than by capability bits.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use mapgpa_abi::PAGE_SIZE_2M;
use mapgpa_abi::params::{BOUND_OWN, Layout, Params, Plan};
use mapgpa_kvm_model::Kernel;
use serde::Serialize;

use crate::backend::tdx::{self, TdxError};
use crate::backend::{End, Setup, emulated};
use crate::case::Backend;
use crate::engine::{Event, EventSink, FrontEnd, Settings, Then};
use crate::express::express;
use crate::memory::MemoryModel;
use crate::one_line;
use crate::policy::Policy;
use crate::suite::POLICIES;

/// How a thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It works.
    Works,
    /// It works, with a limit.
    Limited,
    /// It does not.
    Missing,
}

/// A thing that this machine can do or cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// What it is.
    pub what: &'static str,
    /// How it stands.
    pub standing: Standing,
    /// What was found.
    pub found: String,
    /// What to do about it, if there is something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// The facts, in an order in which they make sense.
    pub facts: Vec<Fact>,
    /// Guest tests run here in VMs.
    pub guest_tests: bool,
    /// Linux kernels and firmware run here at speed.
    pub kernels: bool,
    /// Real TDs run here.
    pub tdx: bool,
}

const LAB: &str = "the lab runs it on any machine, under software emulation: see docs/lab.md";
const NO_KVM: &str = "`--backend hosted` needs no KVM; the lab has one of its own: see docs/lab.md";

/// Looks.
#[must_use]
pub fn look() -> Facts {
    let mut facts = Facts { facts: Vec::new(), guest_tests: false, kernels: false, tdx: false };
    match emulated::kvm_facts() {
        Ok(kvm) => {
            let nested = if cpu_has("hypervisor") { ", in a virtual machine itself" } else { "" };
            facts.works(
                "KVM",
                format!(
                    "API {}, guests have {} physical address bits{nested}",
                    kvm.api, kvm.address_bits
                ),
            );
            facts.guest_tests();
            facts.kernels();
            facts.accesses();
            facts.guest_memfd(&kvm);
        }
        Err(error) => {
            let advice = kvm_advice();
            facts.add("KVM", Standing::Missing, one_line(&error), Some(advice));
        }
    }
    facts.tdx();
    facts
}

impl Facts {
    fn add(
        &mut self,
        what: &'static str,
        standing: Standing,
        found: String,
        advice: Option<String>,
    ) {
        self.facts.push(Fact { what, standing, found, advice });
    }

    fn works(&mut self, what: &'static str, found: String) {
        self.add(what, Standing::Works, found, None);
    }

    /// Boots the canary of guest tests.
    fn guest_tests(&mut self) {
        const WHAT: &str = "guest tests";
        match canary(Backend::Emulated) {
            Ok(Canary { mips, steps: 4 }) => {
                self.guest_tests = true;
                self.works(
                    WHAT,
                    format!("user-mode code, SSE and POPCNT work, at {mips:.0} million instructions a second"),
                );
            }
            Ok(Canary { steps, .. }) => {
                let found = format!("the canary stopped after step {steps} of 4");
                self.add(WHAT, Standing::Missing, found, Some(NO_KVM.to_owned()));
            }
            Err(error) => self.add(WHAT, Standing::Missing, error, Some(NO_KVM.to_owned())),
        }
    }

    /// Boots the canary of kernel mode.
    fn kernels(&mut self) {
        const WHAT: &str = "kernels and firmware";
        match emulated::kernel_mode() {
            Ok(mode) => {
                let sse = if mode.sse { "with" } else { "without" };
                let found = format!(
                    "kernel-mode code runs at {:.0} million instructions a second, {sse} SSE",
                    mode.mips
                );
                self.kernels = mode.is_fit();
                if self.kernels {
                    self.works(WHAT, found);
                } else {
                    let found = format!("{found}: this KVM interprets it");
                    self.add(WHAT, Standing::Missing, found, Some(LAB.to_owned()));
                }
            }
            Err(error) => {
                self.add(WHAT, Standing::Missing, one_line(&error), Some(LAB.to_owned()));
            }
        }
    }

    fn accesses(&mut self) {
        const WHAT: &str = "wrong accesses";
        match emulated::can_catch_accesses() {
            Ok(()) => self.works(WHAT, "userfaultfd catches each, with its GPA".to_owned()),
            Err(error) => self.add(
                WHAT,
                Standing::Limited,
                format!("not caught: no userfaultfd ({error}); results list it in checks_off"),
                Some(
                    "give access to /dev/userfaultfd, run with CAP_SYS_PTRACE, or set the sysctl \
                     vm.unprivileged_userfaultfd=1"
                        .to_owned(),
                ),
            ),
        }
    }

    fn guest_memfd(&mut self, kvm: &emulated::KvmFacts) {
        const WHAT: &str = "guest-memfd memory";
        if kvm.guest_memfd {
            self.works(
                WHAT,
                "KVM has VMs of type SW_PROTECTED_VM: --memory-model guest-memfd".to_owned(),
            );
        } else {
            self.add(
                WHAT,
                Standing::Missing,
                "no VMs of type SW_PROTECTED_VM outside TDs: the alias model serves there"
                    .to_owned(),
                Some(
                    "a kernel with CONFIG_KVM_SW_PROTECTED_VM, as the lab's lab-sw-protected"
                        .to_owned(),
                ),
            );
        }
    }

    /// Asks for what TDs can be made of, and boots the canary in one.
    fn tdx(&mut self) {
        const WHAT: &str = "TDX";
        let tds = match tdx::facts() {
            Ok(tds) => tds,
            Err(TdxError::NoTds(lacking)) => {
                let emulated = "backend `emulated` plays the TDX module on any KVM";
                let advice = lacking.advice.unwrap_or(emulated).to_owned();
                return self.add(WHAT, Standing::Missing, lacking.what.to_owned(), Some(advice));
            }
            Err(error) => return self.add(WHAT, Standing::Missing, one_line(&error), None),
        };
        let kernel = tds.kernel.name();
        let found = format!(
            "KVM makes TDs, and reads a VMM's answers as {kernel} does{}; attributes {:#x}, XFAM {:#x}, \
             {} configurable CPUID leaves",
            module_version().map(|version| format!("; TDX module {version}")).unwrap_or_default(),
            tds.attributes,
            tds.xfam,
            tds.cpuid_leaves
        );
        match canary(Backend::Tdx) {
            Ok(Canary { mips, steps: 4 }) => {
                self.tdx = true;
                let found = format!(
                    "{found}; a TD runs at {mips:.0} million instructions a second; its accepts are \
                         not seen, results list that in checks_off"
                );
                self.works(WHAT, found);
            }
            Ok(Canary { steps, .. }) => {
                let found = format!("{found}; but the canary stopped after step {steps} of 4");
                self.add(WHAT, Standing::Missing, found, None);
            }
            Err(error) => {
                let found = format!("{found}; but no TD runs: {error}");
                self.add(WHAT, Standing::Missing, found, None);
            }
        }
        let can = |spec: &&&str| {
            Policy::parse(spec).is_ok_and(|policy| express(&policy, tds.kernel).is_ok())
        };
        let expressible: Vec<&str> = POLICIES.iter().filter(can).copied().collect();
        let advice = match tds.kernel {
            Kernel::V7_2 => {
                "chunks are multiples of 2M; --nearest takes what comes nearest to others"
            }
            Kernel::V6_16 => {
                "chunks are multiples of 2M, and RETRY comes after progress only: Linux 7.2 has RETRY \
                 at the start too; --nearest takes what comes nearest to others"
            }
        };
        let found = format!("of the suite's {}", expressible.join("; "));
        self.add("policies in TDs", Standing::Limited, found, Some(advice.to_owned()));
    }

    /// Whether guest tests run here in VMs.
    #[must_use]
    pub const fn runs_guest_tests(&self) -> bool {
        self.guest_tests
    }

    /// As an object.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "schema": "mapgpa.host/1",
            "versions": crate::report::Host::this(),
            "facts": self.facts,
            "guest_tests": self.guest_tests,
            "kernels": self.kernels,
            "tdx": self.tdx,
        })
    }

    /// As text.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for fact in &self.facts {
            let standing = match fact.standing {
                Standing::Works => "yes    ",
                Standing::Limited => "limited",
                Standing::Missing => "no     ",
            };
            writeln!(out, "{standing}  {:<22} {}", fact.what, fact.found)?;
            if let Some(advice) = &fact.advice {
                writeln!(out, "{:33}-> {advice}", "")?;
            }
        }
        writeln!(
            out,
            "\n{}",
            if self.guest_tests {
                "`mapgpa suite` runs here, each case in a VM of its own."
            } else {
                "`mapgpa suite --backend hosted` runs here, without VMs."
            }
        )
    }
}

/// Why there is no KVM, and what to do.
fn kvm_advice() -> String {
    let kvm = Path::new("/dev/kvm");
    let advice = if !kvm.exists() {
        if cpu_has("vmx") || cpu_has("svm") {
            "load the module kvm_intel or kvm_amd; in a container, pass /dev/kvm in"
        } else {
            "enable virtualisation in the BIOS, or nested virtualisation if this is a virtual machine"
        }
    } else if std::fs::OpenOptions::new().read(true).write(true).open(kvm).is_err() {
        "join the group of /dev/kvm (usually `kvm`), or have its permissions changed"
    } else {
        "this KVM is too old or not x86-64"
    };
    format!("{advice}; {NO_KVM}")
}

/// Whether /proc/cpuinfo lists this flag.
pub(crate) fn cpu_has(flag: &str) -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_whitespace().any(|word| word == flag))
}

struct Canary {
    mips: f64,
    steps: u64,
}

/// Takes the canary's reports: DATA \[step, value\] (guest-tests/images/src/bin/canary.rs).
struct Listener {
    steps: u64,
    began: Instant,
    mips: f64,
}

impl EventSink for Listener {
    fn on(&mut self, event: &Event<'_>) -> Then {
        match event {
            Event::Data { values: [1, _] } => self.began = Instant::now(),
            #[expect(clippy::cast_precision_loss, reason = "shown without decimals")]
            Event::Data { values: [2, instructions] } => {
                let micros = self.began.elapsed().as_secs_f64().max(1e-9) * 1e6;
                self.mips = *instructions as f64 / micros;
            }
            // Where arithmetic gives something else, the step has not been done.
            Event::Data { values: [3, sum] } if *sum != 3 => return Then::Stop,
            Event::Data { values: [4, ones] } if *ones != 32 => return Then::Stop,
            _ => {}
        }
        if let Event::Data { values: [step, _] } = event {
            self.steps = *step;
        }
        Then::GoOn
    }
}

fn canary(backend: Backend) -> Result<Canary, String> {
    let setup = Setup {
        image: emulated::CANARY_IMAGE,
        params: Params {
            guest: 0,
            gpa: 16 << 20,
            size: PAGE_SIZE_2M,
            plan: Plan::RoundTrip,
            layout: Layout::Contiguous,
            bound: BOUND_OWN,
            guest_chunk: 0,
            vcpus: 1,
            touch: 0,
            touch_before: 0,
            mark_replies: false,
        },
        memory: 32 << 20,
        memory_model: MemoryModel::default(),
        shared: None,
        timeout: Duration::from_secs(5),
    };
    let policy = Policy::parse("complete").map_err(|error| one_line(&error))?;
    let front_end = FrontEnd::Direct;
    let settings = |gpaw| Settings { policy, seed: 0, gpaw, vcpus: 1, timing: false, front_end };
    let sink = Listener { steps: 0, began: Instant::now(), mips: 0.0 };
    match backend {
        Backend::Tdx => ran(tdx::run(&setup, settings(48), sink)),
        _ => {
            let gpaw = emulated::default_gpaw().map_err(|error| one_line(&error))?;
            ran(emulated::run(&setup, settings(gpaw), sink))
        }
    }
}

fn ran<E: std::error::Error>(end: Result<End<Listener, E>, E>) -> Result<Canary, String> {
    match end {
        Ok(End { error: None, sink, .. }) => Ok(Canary { mips: sink.mips, steps: sink.steps }),
        Ok(End { error: Some(error), .. }) | Err(error) => Err(one_line(&error)),
    }
}

/// The TDX module's version, where the kernel tells it.
fn module_version() -> Option<String> {
    let version = std::fs::read_to_string("/sys/devices/faux/tdx_host/version").ok()?;
    Some(version.trim().to_owned())
}
