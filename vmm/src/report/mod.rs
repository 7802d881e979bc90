//! Reports: what the events of a run become for people, CI systems and programs.

pub mod ci;
pub mod matrix;
mod record;
mod run;
pub mod text;
mod trace;

pub use record::{Record, Recorder};
pub use run::{ConversationRow, Host, Outcome, RunReport, SCHEMA as RUN_SCHEMA, Totals, Verdict};
pub use trace::Trace;
