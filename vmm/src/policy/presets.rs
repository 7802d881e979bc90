//! Named policies: models of hosts that exist, each with what is known of it and what is not.

/// A named policy.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// Its name in spec strings.
    pub name: &'static str,
    /// The spec that it stands for.
    pub spec: &'static str,
    /// The host that it models, and how sure we are.
    pub models: &'static str,
}

/// All presets.
///
/// `hyperv` has two parameters, and a user can set either: `hyperv,cost=400ns`. Its `budget` is
/// public: rep hypercalls return to the guest within about 50 us (Hypervisor Top-Level Functional
/// Specification, "Hypercall continuation"). That MapGPA obeys the same limit is conjecture, and so
/// is its `cost`, 200 ns for a page: nobody has published how many pages Hyper-V converts in one
/// call. What is public is that 1 GiB of swiotlb meets RETRY there and that the next call makes
/// progress (Linux commit 019b383d1132), which holds for every cost below the budget.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "hyperv",
        spec: "budget=50us,cost=200ns",
        models: "Hyper-V: a time budget for each call (public) at a cost a page (conjecture)",
    },
    Preset {
        name: "qemu-tdx",
        spec: "chunk=64M",
        models: "Intel's qemu-tdx fork: the first 64 MiB of a request, then RETRY (from its source)",
    },
    Preset {
        name: "kvm-6.16",
        spec: "chunk=2M",
        models: "Linux 6.16 to 7.1 with an event pending after every 2 MiB chunk, the worst it can do",
    },
    Preset {
        name: "kvm-7.2",
        spec: "chunk=2M,stall=1",
        models: "Linux 7.2 with a VMM that says EAGAIN once for each 2 MiB chunk",
    },
];
