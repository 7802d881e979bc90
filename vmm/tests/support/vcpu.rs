//! A vCPU in this process for guests that the backend `hosted` does not know, such as mutants. Its TDX
//! module may refuse a call.

#![allow(clippy::expect_used, reason = "memory in this process does not fail")]

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use mapgpa::backend::hosted::HostedMemory;
use mapgpa::engine::{Engine, Event, EventSink, Flow};
use mapgpa::platform::{Bare, NoCpu};
use mapgpa_abi::tdcall::{Regs, leaf, module, sub};
use mapgpa_abi::{Alias, shared_bit};
use mapgpa_kit::Td;

/// The shared bit of its guests, whose GPAW is 48.
const BIT: u64 = shared_bit(48);

/// TDCALLs after which a guest has hung: what `reference` may do at most for the ranges here is less.
const TDCALLS_MAX: u64 = 40_000;

/// What ends a guest's stack.
struct Ended;

/// The vCPU.
pub(super) struct Vcpu<S> {
    pub(super) engine: Engine<HostedMemory, S>,
    words: HashMap<(Alias, u64), u64>,
    tdcalls: u64,
    /// The MapGPA call, from 1, that the TDX module refuses.
    refused: Option<u64>,
    map_gpas: u64,
}

/// Runs a guest until it returns or its vCPU has ended its stack.
pub(super) fn until_it_ends(guest: impl FnOnce()) {
    match catch_unwind(AssertUnwindSafe(guest)) {
        Err(payload) if !payload.is::<Ended>() => resume_unwind(payload),
        _ => {}
    }
}

impl<S: EventSink> Vcpu<S> {
    pub(super) fn new(engine: Engine<HostedMemory, S>, refused: Option<u64>) -> Self {
        Self { engine, words: HashMap::new(), tdcalls: 0, refused, map_gpas: 0 }
    }

    fn end() -> ! {
        // No message, and no hook: this is how a guest's code is left, not a failure.
        resume_unwind(Box::new(Ended))
    }

    fn touch(&mut self, alias: Alias, gpa: u64) {
        let bit = if alias == Alias::Shared { BIT } else { 0 };
        if self.engine.touch(gpa | bit) == Err(Flow::Stop) {
            Self::end();
        }
    }
}

impl<S: EventSink> Td for Vcpu<S> {
    fn tdcall(&mut self, regs: &mut Regs) {
        self.tdcalls += 1;
        if self.tdcalls > TDCALLS_MAX {
            self.engine.emit(&Event::Timeout);
            Self::end();
        }
        if (regs.rax, regs.r11) == (leaf::VP_VMCALL, sub::MAP_GPA) {
            self.map_gpas += 1;
            if self.refused == Some(self.map_gpas) {
                // The VMM never sees it; R10 and R11 are as the guest set them.
                regs.rax = module::OPERAND_INVALID | module::OPERAND_RCX;
                return;
            }
        }
        let flow = mapgpa::tdcall::tdcall(&mut self.engine, 0, regs, &Bare, &NoCpu);
        if matches!(flow.expect("memory does not fail"), Flow::Exit | Flow::Stop) {
            Self::end();
        }
    }

    fn read(&mut self, alias: Alias, gpa: u64) -> u64 {
        self.touch(alias, gpa);
        self.words.get(&(alias, gpa)).copied().unwrap_or_default()
    }

    fn write(&mut self, alias: Alias, gpa: u64, value: u64) {
        self.touch(alias, gpa);
        self.words.insert((alias, gpa), value);
    }

    fn stop(&mut self) -> ! {
        Self::end()
    }
}
