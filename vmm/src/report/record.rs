//! The recorder: the consumer of a run's events that feeds the judge, the sums and the trace.

use mapgpa_abi::Direction;
use mapgpa_abi::tdcall::{module, status};

use super::{Console, ConversationRow, Follow, PhaseRow, Totals, Trace};
use crate::engine::{Accept, Call, Event, EventSink, Then};
use crate::judge::{Judge, Judgement};

/// Conversations kept; more are counted in the sums only.
const ROWS_KEPT: usize = 10_000;

/// Values kept of what a guest sends; a guest that floods the channel costs no more.
const DATA_KEPT: usize = 1 << 16;

/// What was recorded of a run.
#[derive(Debug)]
pub struct Record {
    /// The judge's word.
    pub judgement: Judgement,
    /// Conversations.
    pub conversations: Vec<ConversationRow>,
    /// Sums; exits and wall time are the backend's to add.
    pub totals: Totals,
    /// Values that the guest sent.
    pub data: Vec<u64>,
    /// A kernel's console, if it had one.
    pub console: Option<String>,
    /// When a firmware came to each phase.
    pub phases: Vec<PhaseRow>,
}

/// A recorder at work.
#[derive(Debug)]
pub struct Recorder {
    judge: Judge,
    trace: Option<Trace>,
    follow: Option<Follow>,
    conversations: Vec<ConversationRow>,
    rows_dropped: u64,
    totals: Totals,
    data: Vec<u64>,
    console: Option<Console>,
    phases: Vec<PhaseRow>,
    until_conversion: bool,
}

impl Recorder {
    /// A recorder that feeds `judge` and, if given, `trace`.
    #[must_use]
    pub const fn new(judge: Judge, trace: Option<Trace>) -> Self {
        Self {
            judge,
            trace,
            follow: None,
            conversations: Vec::new(),
            rows_dropped: 0,
            totals: Totals {
                calls: 0,
                retries: 0,
                no_progress: 0,
                pages_to_shared: 0,
                pages_to_private: 0,
                pages_accepted: 0,
                exits: 0,
                handler_ns: 0,
                max_call_ns: 0,
                wall_ns: 0,
            },
            data: Vec::new(),
            console: None,
            phases: Vec::new(),
            until_conversion: false,
        }
    }

    /// Holds the calls against recorded ones, if given, and ends the run at the first that is another.
    #[must_use]
    pub fn following(self, follow: Option<Follow>) -> Self {
        Self { follow, ..self }
    }

    /// Keeps a kernel's console in `console`, and with `until_conversion` ends the run with the first
    /// conversation, as the user wants it.
    #[must_use]
    pub fn with_console(self, console: Console, until_conversion: bool) -> Self {
        Self { console: Some(console), until_conversion, ..self }
    }

    /// Takes what is left of the console when the run is over.
    pub fn console_line(&mut self, text: &str) {
        if let Some(console) = &mut self.console {
            console.line(text);
        }
    }

    /// Ends the run.
    ///
    /// # Errors
    /// The trace could not be written.
    pub fn finish(self) -> std::io::Result<Record> {
        if let Some(trace) = self.trace {
            trace.close()?;
        }
        let mut judgement = self.judge.finish();
        if self.rows_dropped > 0 {
            judgement
                .notes
                .push(format!("{} more conversations are not listed", self.rows_dropped));
        }
        Ok(Record {
            judgement,
            conversations: self.conversations,
            totals: self.totals,
            data: self.data,
            console: self.console.map(Console::into_text),
            phases: self.phases,
        })
    }

    fn call(&mut self, call: &Call) {
        let totals = &mut self.totals;
        let retry = call.status == status::RETRY;
        totals.calls += 1;
        totals.retries += u64::from(retry);
        totals.no_progress += u64::from(retry && call.converted == 0);
        match call.to {
            Direction::ToShared => totals.pages_to_shared += call.converted,
            Direction::ToPrivate => totals.pages_to_private += call.converted,
        }
        totals.handler_ns += call.took_ns;
        totals.max_call_ns = totals.max_call_ns.max(call.took_ns);
        if let Some(trace) = &mut self.trace {
            trace.write(call);
        }
    }
}

impl EventSink for Recorder {
    fn tick(&mut self) {
        if let Some(trace) = &mut self.trace {
            trace.tick();
        }
    }

    fn on(&mut self, event: &Event<'_>) -> Then {
        match event {
            Event::Call(call) => self.call(call),
            Event::Accept(Accept { pages, answer: Some(module::SUCCESS), .. }) => {
                self.totals.pages_accepted += pages.count;
            }
            Event::Closed { conversation, ending, .. } => {
                if self.conversations.len() < ROWS_KEPT {
                    self.conversations.push(ConversationRow::new(conversation, *ending));
                } else {
                    self.rows_dropped += 1;
                }
            }
            Event::Phase { phase, at_ns } => {
                self.phases.push(PhaseRow { phase: *phase, t_ns: *at_ns });
            }
            Event::Data { values } if self.data.len() < DATA_KEPT => {
                self.data.extend_from_slice(values);
            }
            Event::Console { text, .. } => {
                if let Some(console) = &mut self.console {
                    console.line(text);
                }
            }
            _ => {}
        }
        let mut then = self.judge.on(event);
        if let (Event::Call(call), Some(follow)) = (event, &self.follow)
            && follow.on(call) == Then::Stop
        {
            then = Then::Stop;
        }
        if let (true, Event::Closed { conversation, .. }) = (self.until_conversion, event) {
            self.judge.on(&Event::Exit { vcpu: conversation.vcpu, success: true });
            return Then::Stop;
        }
        then
    }
}
