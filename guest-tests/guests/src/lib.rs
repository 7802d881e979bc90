//! The guest tests: how each real guest converts memory, and one that does it as we recommend.
//!
//! Each guest is a module with one function, [`Conversion`] in, accepted pages or [`GaveUp`] out,
//! generic over [`mapgpa_kit::Td`]; its first paragraph names the software and version it models.
//! [`driver::run`] is the guest test around it: it marks conversations on the channel, touches
//! the pages, and ends. [`GUESTS`] is the list.
//!
//! A model issues the requests of the original, in its order and with its registers, and decides on
//! each reply as the original does; logging, page tables and caches are left out. Arithmetic wraps
//! where the original's would.
#![no_std]
#![deny(missing_docs)]

#[cfg(test)]
extern crate std;

mod accept;
mod asterinas;
#[cfg(test)]
mod behaviours;
pub mod driver;
mod edk2;
#[cfg(test)]
mod fake;
mod gramine;
mod guest;
mod line;
mod linux;
mod map_gpa;
mod mushroom;
mod oak;
mod openvmm;
pub mod reference;
mod svsm;
mod td_shim;
mod tdx_guest;

pub use guest::{Bound, Conversion, Converted, GUESTS, GaveUp, Guest, GuestInfo};
