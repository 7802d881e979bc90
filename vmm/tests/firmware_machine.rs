//! The firmware's machine without a VM: phases by its hooks, TDCALLs that are missed, DMA to pages that
//! the device cannot reach.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::collections::BTreeMap;

use mapgpa::engine::{Engine, Flow, FrontEnd, Phase, Settings};
use mapgpa::firmware::fw_cfg::{FwCfg, key};
use mapgpa::firmware::image::CR3_PORT;
use mapgpa::firmware::machine::{Machine, Wanted};
use mapgpa::firmware::{acpi, program};
use mapgpa::linux::machine::{Machine as Pc, Until};
use mapgpa::memory::{Contents, Memory, MemoryError};
use mapgpa::pagemap::{PageMap, Pages};
use mapgpa::patch::Patched;
use mapgpa::platform::{Hook, Platform};
use mapgpa::policy::Policy;
use mapgpa_abi::{Alias, Direction, PAGE_SIZE};
use support::{BIT, Events, GPAW};

const MEMORY: u64 = 128 << 20;

/// Memory of which a few bytes are there, and in which TDCALLs are as told.
#[derive(Debug, Default)]
struct Told {
    bytes: BTreeMap<(u64, bool), u8>,
    patch: u64,
    missed: Option<u64>,
}

impl Memory for Told {
    fn convert(&mut self, _: Pages, _: Direction, _: bool, _: &PageMap) -> Result<(), MemoryError> {
        Ok(())
    }

    fn accept(&mut self, _: Pages, _: &PageMap) -> Result<(), MemoryError> {
        Ok(())
    }
}

impl Contents for Told {
    fn read(&mut self, gpa: u64, alias: Alias, bytes: &mut [u8]) -> Result<bool, MemoryError> {
        for (at, byte) in (gpa..).zip(bytes) {
            *byte = self.bytes.get(&(at, alias == Alias::Shared)).copied().unwrap_or(0);
        }
        Ok(gpa < MEMORY)
    }

    fn write(&mut self, gpa: u64, alias: Alias, bytes: &[u8]) -> Result<bool, MemoryError> {
        for (at, byte) in (gpa..).zip(bytes) {
            self.bytes.insert((at, alias == Alias::Shared), *byte);
        }
        Ok(gpa < MEMORY)
    }

    fn patch(&mut self, _: Pages) -> Result<Patched, MemoryError> {
        Ok(Patched { sites: std::mem::take(&mut self.patch), lookalikes: 0 })
    }

    fn find_tdcall(&mut self, _: Pages) -> Result<Option<u64>, MemoryError> {
        Ok(self.missed)
    }
}

struct Bench {
    machine: Machine,
    engine: Engine<Told, Events>,
}

impl Bench {
    fn new(until_exit: bool) -> Self {
        let (pc, _) = Pc::new(Until::Bds, MEMORY).expect("an eventfd");
        let mut fw_cfg = FwCfg::default();
        fw_cfg.add(key::KERNEL, vec![1, 2, 3]);
        acpi::add(&mut fw_cfg, None);
        let wanted = Wanted { fw_cfg, packed_sites: 68, kernel: None, until_exit, shared_bit: BIT };
        let settings = Settings {
            policy: Policy::parse("complete").expect("a policy"),
            seed: 1,
            gpaw: GPAW,
            vcpus: 1,
            timing: false,
            front_end: FrontEnd::Direct,
        };
        let engine = Engine::new(settings, Told::default(), Events::default());
        Self { machine: Machine::new(pc, wanted), engine }
    }

    fn load_cr3(&mut self, sites: u64) -> Flow {
        self.engine.memory().patch = sites;
        self.machine
            .hooked(&mut self.engine, 0, Hook::LoadCr3, 0x80_0000, true)
            .expect("memory does not fail")
    }

    fn write(&mut self, port: u16, data: &[u8]) -> Flow {
        let flow = self.machine.write_port(&mut self.engine, 0, port, data);
        flow.expect("memory does not fail").expect("there are devices everywhere")
    }

    fn say(&mut self, line: &str) -> Flow {
        line.bytes().map(|byte| self.write(0x3f8, &[byte])).last().expect("a line")
    }

    /// A DMA that selects the kernel and reads it to `to`; what is left of its control word.
    fn dma(&mut self, to: u64) -> u32 {
        let descriptor = [
            &(u32::from(key::KERNEL) << 16 | 0b1010).to_be_bytes()[..],
            &3u32.to_be_bytes(),
            &to.to_be_bytes(),
        ]
        .concat();
        let (at, place) = (16 << 20, 0x0100_0000u32);
        self.engine.memory().write(at, Alias::Shared, &descriptor).expect("it");
        self.write(0x514, &[0; 4]);
        self.write(0x518, &place.to_be_bytes());
        let mut control = [0; 4];
        self.engine.memory().read(at, Alias::Shared, &mut control).expect("it");
        u32::from_be_bytes(control)
    }

    fn texts(self) -> Vec<String> {
        self.engine.end().1.texts
    }
}

fn hook_of(machine: &Machine, port: u16) -> Option<Hook> {
    Platform::<Told, Events>::hook(machine, port)
}

#[test]
fn the_phases_are_told_by_hooks_and_console() {
    let mut bench = Bench::new(false);
    assert_eq!(hook_of(&bench.machine, CR3_PORT), Some(Hook::LoadCr3));
    assert_eq!(hook_of(&bench.machine, 0x80), None);
    assert_eq!(bench.load_cr3(0), Flow::Continue);
    assert_eq!(bench.engine.reached(), None, "nothing was unpacked yet");
    assert_eq!(bench.load_cr3(124), Flow::Continue);
    assert_eq!(bench.engine.reached(), Some(Phase::Dxe));
    assert_eq!(bench.machine.unpacked().sites, 124);
    assert_eq!(bench.say("\x1b[2JBdsDxe: No bootable option\r\n"), Flow::Stop);
    assert_eq!(bench.engine.reached(), Some(Phase::Bds));
    assert_eq!(bench.engine.end().1.exits, [(0, true)]);
}

#[test]
fn fewer_tdcalls_than_there_are_in_the_image_end_the_run() {
    let mut bench = Bench::new(false);
    assert_eq!(bench.load_cr3(67), Flow::Stop);
    let unfit = bench.machine.unfit().expect("a reason");
    assert!(unfit.contains("67 TDCALLs") && unfit.contains("68 are in its compressed"), "{unfit}");
}

#[test]
fn a_missed_tdcall_is_named_when_the_guest_dies() {
    let mut bench = Bench::new(false);
    bench.load_cr3(68);
    bench.engine.memory().missed = Some(0x7_1234);
    assert_eq!(bench.say("!!!! X64 Exception Type - 06(#UD - Invalid Opcode)\r\n"), Flow::Continue);
    assert_eq!(bench.say("!!!! Can't find image information. !!!!\r\n"), Flow::Stop);
    let texts = bench.texts();
    assert!(texts.iter().any(|text| text.contains("a TDCALL at 0x71234 that was not replaced")));

    let mut bench = Bench::new(false);
    bench.load_cr3(68);
    bench.say("!!!! Can't find image information. !!!!\r\n");
    assert_eq!(bench.texts(), [""; 0], "nothing was missed");
}

#[test]
fn the_program_that_exits_boot_services_ends_the_run() {
    let mut bench = Bench::new(true);
    assert_eq!(bench.write(program::PORT, &[0]), Flow::Stop);
    assert_eq!(bench.engine.reached(), Some(Phase::BootServicesExited));
    let mut bench = Bench::new(false);
    assert_eq!(bench.write(program::PORT, &[0]), Flow::Continue, "an idle port otherwise");
}

#[test]
fn dma_goes_to_shared_pages_only() {
    let mut bench = Bench::new(false);
    bench.engine.map_gpa(0, (16 << 20) | BIT, PAGE_SIZE).expect("memory does not fail");
    bench.engine.map_gpa(0, (32 << 20) | BIT, PAGE_SIZE).expect("memory does not fail");
    assert_eq!(bench.dma(32 << 20), 0);
    let mut data = [0; 4];
    bench.engine.memory().read(32 << 20, Alias::Shared, &mut data).expect("it");
    assert_eq!(data, [1, 2, 3, 0]);
    assert_eq!(bench.dma((32 << 20) - 1), 1, "one page of two is private");
    assert_eq!(bench.engine.end().1.touches, [false]);
}
