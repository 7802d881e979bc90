//! What a policy says to a guest that does all that it is told: calls and replies, without a guest.

use mapgpa_abi::params::Plan;
use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Direction, PAGE_SIZE, shared_bit};

use crate::backend::hosted::HostedMemory;
use crate::engine::{Call, Engine, Event, EventSink, Flow, FrontEnd, Settings, Then};
use crate::judge::{Class, Judge, Rules};
use crate::memory::MemoryError;
use crate::policy::Policy;

/// GPAW and start GPA of the example: the usual ones of a guest test.
const GPAW: u32 = 48;
const GPA: u64 = 16 << 20;
/// Calls after which a policy that never lets a guest finish has shown what it does.
const CALLS_MAX: usize = 100_000;

/// The replies of a policy.
#[derive(Debug)]
pub struct Explained {
    /// The calls, in order.
    pub calls: Vec<Call>,
    /// What the replies ask of a guest.
    pub class: Class,
    /// What the policy is about occurred.
    pub exercised: bool,
    /// The conversions ended, one way or the other.
    pub ended: bool,
}

struct Listener {
    calls: Vec<Call>,
    judge: Judge,
}

impl EventSink for Listener {
    fn on(&mut self, event: &Event<'_>) -> Then {
        if let Event::Call(call) = event {
            self.calls.push(*call);
        }
        self.judge.on(event);
        Then::GoOn
    }
}

/// Lists what `policy` says behind `front_end` when `range` bytes are converted by `plan`.
///
/// # Errors
/// None in practice: no memory is behind it.
pub fn explain(
    policy: &Policy,
    front_end: FrontEnd,
    plan: Plan,
    range: u64,
    seed: u64,
) -> Result<Explained, MemoryError> {
    let settings =
        Settings { policy: policy.clone(), seed, gpaw: GPAW, vcpus: 1, timing: false, front_end };
    let judge = Judge::new(Rules::default(), policy.is_special());
    let listener = Listener { calls: Vec::new(), judge };
    let mut engine = Engine::new(settings, HostedMemory::default(), listener);
    if plan == Plan::One(Direction::ToPrivate) {
        engine.preset_shared(crate::pagemap::Pages::of_bytes(GPA, range))?;
    }
    let directions: &[Direction] = match &plan {
        Plan::One(direction) => std::slice::from_ref(direction),
        Plan::RoundTrip => &[Direction::ToShared, Direction::ToPrivate],
    };
    let mut ended = true;
    for to in directions {
        let bit = if *to == Direction::ToShared { shared_bit(GPAW) } else { 0 };
        let end = (GPA + range) | bit;
        let mut start = GPA | bit;
        let mut done = false;
        for _ in 0..CALLS_MAX {
            let reply = engine.map_gpa(0, start, end.wrapping_sub(start))?;
            done = reply.status != status::RETRY || reply.flow == Flow::Stop;
            // What is out of range or unaligned is where a careful guest stops.
            let followed = reply.r11 >= start && reply.r11 < end && reply.r11 % PAGE_SIZE == 0;
            if done || !followed {
                done = true;
                break;
            }
            start = reply.r11;
        }
        ended &= done;
        let last = engine.map().find(crate::pagemap::Pages::of_bytes(GPA, range), |state| {
            (state == crate::pagemap::PageState::Shared) != (*to == Direction::ToShared)
        });
        if last.is_some() {
            break;
        }
    }
    let (_, listener) = engine.end();
    let judgement = listener.judge.finish();
    Ok(Explained {
        calls: listener.calls,
        class: judgement.class,
        exercised: judgement.exercised,
        ended,
    })
}
