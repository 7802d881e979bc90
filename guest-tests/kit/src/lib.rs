//! The guest kit: what a guest test is written with.
//!
//! The portable half is [`Td`] (what a TD can do), the calls made of it ([`calls`]) and the guest
//! channel ([`report`]). Code that is generic over [`Td`] runs in a VM and, for property tests and
//! fuzzing, inside the VMM's own process. The `bare` feature adds what a VM needs.
#![no_std]

#[cfg(feature = "bare")]
pub mod bare;
pub mod calls;
pub mod report;
mod td;

pub use mapgpa_abi as abi;
pub use td::Td;
