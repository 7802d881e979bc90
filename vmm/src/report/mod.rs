//! Reports: what the events of a run become for people, CI systems and programs.

pub mod charts;
pub mod ci;
pub mod compare;
mod console;
mod follow;
pub mod fuzz;
pub mod matrix;
pub mod page;
mod record;
mod rows;
mod run;
pub mod suite;
pub mod sweep;
pub mod sweep_charts;
pub mod table;
pub mod text;
mod trace;

pub use console::Console;
pub use follow::{Divergence, Follow, Recorded};
pub use record::{Record, Recorder};
pub use run::{
    ConversationRow, FirmwareRow, Host, KernelRow, Outcome, PhaseRow, RunReport,
    SCHEMA as RUN_SCHEMA, Totals, Verdict,
};
pub use trace::{SCHEMA as TRACE_SCHEMA, Trace, TraceHeader};
