//! Follows a guest: holds the calls of a run against recorded ones, up to the first that is another.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mapgpa_abi::Direction;

use crate::engine::{Call, Then};

/// A call as it was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// R12.
    pub gpa: u64,
    /// R13.
    pub size: u64,
    /// Direction.
    pub to: Direction,
    /// Pages that changed state.
    pub converted: u64,
    /// R10 of the reply.
    pub status: u64,
    /// R11, where it is defined.
    pub r11: Option<u64>,
}

impl Recorded {
    fn of(call: &Call) -> Self {
        Self {
            gpa: call.raw_gpa,
            size: call.size,
            to: call.to,
            converted: call.converted,
            status: call.status,
            r11: call.r11_defined().then_some(call.r11),
        }
    }

    /// The first field in which the two differ, and both values.
    fn differs(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let hex = |value: u64| format!("{value:#x}");
        let to = |to: Direction| match to {
            Direction::ToShared => "shared".to_owned(),
            Direction::ToPrivate => "private".to_owned(),
        };
        let r11 = |r11: Option<u64>| r11.map_or("null".to_owned(), hex);
        let fields = [
            ("gpa", hex(self.gpa), hex(other.gpa)),
            ("size", self.size.to_string(), other.size.to_string()),
            ("to", to(self.to), to(other.to)),
            ("converted_pages", self.converted.to_string(), other.converted.to_string()),
            ("status", hex(self.status), hex(other.status)),
            ("r11", r11(self.r11), r11(other.r11)),
        ];
        fields.into_iter().find(|(_, recorded, found)| recorded != found)
    }
}

/// Where a guest first did what it did not do when it was recorded.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Divergence {
    /// The vCPU.
    pub vcpu: usize,
    /// Its call.
    pub call: u64,
    /// The field of the trace; `call` where one of the two has no such call.
    pub field: &'static str,
    /// What was recorded.
    pub recorded: String,
    /// What is now.
    pub found: String,
}

/// What is known so far of a guest that is followed.
#[derive(Debug, Default)]
struct Following {
    /// Calls seen, by vCPU.
    seen: Vec<u64>,
    divergence: Option<Divergence>,
}

/// Holds the calls of a run against the recorded ones.
#[derive(Debug, Clone)]
pub struct Follow {
    recorded: Arc<Vec<Vec<Recorded>>>,
    following: Arc<Mutex<Following>>,
}

impl Follow {
    /// Follows a guest whose calls were `recorded`, by vCPU.
    #[must_use]
    pub fn new(recorded: Vec<Vec<Recorded>>) -> Self {
        Self { recorded: Arc::new(recorded), following: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Following> {
        self.following.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a call; the first that is another ends the run.
    pub fn on(&self, call: &Call) -> Then {
        let mut following = self.lock();
        let vcpu = call.vcpu as usize;
        if following.seen.len() <= vcpu {
            following.seen.resize(vcpu + 1, 0);
        }
        following.seen[vcpu] = call.call;
        if following.divergence.is_some() {
            return Then::Stop;
        }
        let at = usize::try_from(call.call).unwrap_or(usize::MAX).wrapping_sub(1);
        let found = Recorded::of(call);
        let differs = match self.recorded.get(vcpu).and_then(|calls| calls.get(at)) {
            Some(recorded) => recorded.differs(&found),
            None => {
                let found = format!("a request for {} bytes at {:#x}", call.size, call.raw_gpa);
                Some(("call", "none".to_owned(), found))
            }
        };
        following.divergence = differs.map(|(field, recorded, found)| Divergence {
            vcpu,
            call: call.call,
            field,
            recorded,
            found,
        });
        if following.divergence.is_some() { Then::Stop } else { Then::GoOn }
    }

    /// The divergence at the end of the run: that seen, or a call that did not come.
    #[must_use]
    pub fn divergence(&self) -> Option<Divergence> {
        let following = self.lock();
        let missing = || {
            self.recorded.iter().enumerate().find_map(|(vcpu, calls)| {
                let seen = following.seen.get(vcpu).copied().unwrap_or(0);
                let next = calls.get(usize::try_from(seen).ok()?)?;
                Some(Divergence {
                    vcpu,
                    call: seen + 1,
                    field: "call",
                    recorded: format!("a request for {} bytes at {:#x}", next.size, next.gpa),
                    found: "none".to_owned(),
                })
            })
        };
        following.divergence.clone().or_else(missing)
    }
}
