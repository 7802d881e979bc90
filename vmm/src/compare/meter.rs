//! The meter: the consumer of a run's events that measures conversations and single calls.
//!
//! It reads the clock once an event and adds to a histogram of fixed size, so that measuring costs a
//! call well under a tenth of a microsecond.

use std::time::Instant;

use hdrhistogram::Histogram;
use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::status;

use crate::case::Case;
use crate::engine::{Call, Event, EventSink, Then};
use crate::judge::{Judge, Judgement};

/// The longest call that the histogram tells from longer ones: an hour, in nanoseconds.
const LONGEST: u64 = 3_600_000_000_000;
/// Significant digits of the histogram.
const DIGITS: u8 = 3;
/// Calls that room is made for before a run; more make room as they come.
const ROOM_MAX: usize = 1 << 20;

/// One call as a run recorded it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Nanoseconds from the begin of the first conversation to the reply.
    pub at_ns: u64,
    /// First page of the request.
    pub first: u64,
    /// Pages that it converted.
    pub converted: u64,
    /// R10 of the reply.
    pub status: u64,
    /// R11 of the reply.
    pub r11: u64,
}

/// What was measured of a run.
#[derive(Debug, Clone)]
pub struct Measured {
    /// MapGPA calls.
    pub requests: u64,
    /// Replies RETRY.
    pub retries: u64,
    /// Replies RETRY without progress.
    pub no_progress: u64,
    /// Pages converted.
    pub pages: u64,
    /// Nanoseconds spent answering MapGPA.
    pub handler_ns: u64,
    /// Nanoseconds in which a conversation was open: from its begin mark to its end mark, calls,
    /// accepts and the guest's own work included.
    pub conversation_ns: u64,
    /// The longest single call in nanoseconds, as the guest feels it.
    pub longest_ns: u64,
    /// Single calls in nanoseconds, as the guest feels them: from the end of what the vCPU did
    /// before to the reply, so that leaving and entering the guest are in it.
    pub calls: Histogram<u64>,
    /// Each call, if they were to be recorded.
    pub steps: Vec<Step>,
}

/// A histogram of the kind that [`Measured`] has.
///
/// # Errors
/// None in practice: the bounds are constants that the crate accepts.
pub fn histogram() -> Result<Histogram<u64>, hdrhistogram::CreationError> {
    Histogram::new_with_bounds(1, LONGEST, DIGITS)
}

/// A meter at work.
#[derive(Debug)]
pub struct Meter {
    judge: Judge,
    shared_bit: u64,
    measured: Measured,
    record: bool,
    /// When each vCPU came back from its last call, accept or mark.
    last: Vec<Instant>,
    /// When the first conversation began.
    first: Option<Instant>,
    /// Conversations that are open, and since when there is one.
    open: usize,
    since: Instant,
}

impl Meter {
    /// A meter for a run of `case`, with its judge, so that a guest which never ends is ended. With
    /// `record` it keeps each call.
    ///
    /// # Errors
    /// As [`histogram`].
    pub fn new(case: &Case, record: bool) -> Result<Self, hdrhistogram::CreationError> {
        let now = Instant::now();
        let expected = usize::try_from(case.range / PAGE_SIZE).unwrap_or(0).min(ROOM_MAX);
        Ok(Self {
            judge: case.judge(),
            shared_bit: mapgpa_abi::shared_bit(case.gpaw),
            measured: Measured {
                requests: 0,
                retries: 0,
                no_progress: 0,
                pages: 0,
                handler_ns: 0,
                conversation_ns: 0,
                longest_ns: 0,
                calls: histogram()?,
                steps: Vec::with_capacity(if record { expected } else { 0 }),
            },
            record,
            last: vec![now; case.vcpus],
            first: None,
            open: 0,
            since: now,
        })
    }

    /// What was measured, and what the judge says.
    #[must_use]
    pub fn finish(self) -> (Measured, Judgement) {
        (self.measured, self.judge.finish())
    }

    /// Nanoseconds since this vCPU's last event, which is now this one.
    fn lap(&mut self, vcpu: u32, now: Instant) -> u64 {
        match self.last.get_mut(vcpu as usize) {
            Some(last) => nanos(std::mem::replace(last, now), now),
            None => 0,
        }
    }

    fn call(&mut self, call: &Call, now: Instant) {
        let felt = self.lap(call.vcpu, now);
        let measured = &mut self.measured;
        let retry = call.status == status::RETRY;
        measured.requests += 1;
        measured.retries += u64::from(retry);
        measured.no_progress += u64::from(retry && call.converted == 0);
        measured.pages += call.converted;
        measured.handler_ns += call.took_ns;
        measured.longest_ns = measured.longest_ns.max(felt);
        measured.calls.saturating_record(felt);
        if self.record {
            measured.steps.push(Step {
                at_ns: nanos(self.first.unwrap_or(now), now),
                first: (call.raw_gpa & !self.shared_bit) / PAGE_SIZE,
                converted: call.converted,
                status: call.status,
                r11: call.r11,
            });
        }
    }
}

impl EventSink for Meter {
    fn on(&mut self, event: &Event<'_>) -> Then {
        let now = Instant::now();
        match event {
            Event::Begun { vcpu, .. } => {
                self.lap(*vcpu, now);
                self.first.get_or_insert(now);
                if self.open == 0 {
                    self.since = now;
                }
                self.open += 1;
            }
            Event::Call(call) => self.call(call, now),
            Event::Accept(accept) => {
                self.lap(accept.vcpu, now);
            }
            Event::Closed { conversation, marked: true, .. } => {
                self.lap(conversation.vcpu, now);
                self.open = self.open.saturating_sub(1);
                if self.open == 0 {
                    self.measured.conversation_ns += nanos(self.since, now);
                }
            }
            _ => {}
        }
        self.judge.on(event)
    }
}

fn nanos(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}
