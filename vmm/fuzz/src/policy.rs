//! Any text as a policy, a spec string or a TOML file; what is read of it answers a guest that follows
//! every R11, wherever it points.

use mapgpa::backend::hosted::HostedMemory;
use mapgpa::engine::{Engine, FrontEnd, Settings};
use mapgpa::judge::{Judge, Rules};
use mapgpa::policy::Policy;
use mapgpa::report::Recorder;
use mapgpa::units;
use mapgpa_abi::{Direction, PAGE_SIZE, shared_bit};

const GPAW: u32 = 48;
const GPA: u64 = 16 << 20;
const PAGES: u64 = 40;
/// Calls of the guest in each direction.
const CALLS: usize = 24;

/// Reads a policy from `data`, a form and a text, and has it answer.
pub fn run(data: &[u8]) {
    let Some((form, text)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let policy = if form & 1 != 0 {
        Policy::from_toml("fuzz.toml", &text)
    } else if std::path::Path::new(&*text).extension().is_some_and(|ext| ext == "toml") {
        // The name of a file.
        return;
    } else {
        numbers(&text);
        Policy::parse(&text)
    };
    match policy {
        Ok(policy) => answer(policy),
        Err(error) => super::shown(&error),
    }
}

fn numbers(text: &str) {
    let errors = [
        units::size(text).err(),
        units::page_size(text).err(),
        units::duration(text).err(),
        units::time_limit(text).err(),
    ];
    for error in errors.into_iter().flatten() {
        super::shown(&error);
    }
    if let Ok(size) = units::size(text) {
        assert_eq!(units::size(&units::show_size(size)), Ok(size));
    }
}

fn answer(policy: Policy) {
    for to in [Direction::ToShared, Direction::ToPrivate] {
        let _ = policy.cannot_apply(&[to]);
    }
    let recorder = Recorder::new(Judge::new(Rules::default(), policy.is_special()), None);
    let settings = Settings {
        policy,
        seed: 1,
        gpaw: GPAW,
        vcpus: 1,
        timing: false,
        front_end: FrontEnd::Direct,
    };
    let mut engine = Engine::new(settings, HostedMemory::default(), recorder);
    for bit in [shared_bit(GPAW), 0] {
        let (mut next, end) = (GPA | bit, (GPA | bit) + PAGES * PAGE_SIZE);
        for _ in 0..CALLS {
            let Ok(reply) = engine.map_gpa(0, next, end.wrapping_sub(next)) else { return };
            next = reply.r11;
        }
        for page in 0..PAGES {
            let _ = engine.accept(0, GPA + page * PAGE_SIZE);
            let _ = engine.touch((GPA + page * PAGE_SIZE) | bit);
        }
    }
    let (_, recorder) = engine.end();
    let _ = recorder.finish();
}
