//! What a guest test says on the guest channel, one function a message.

use mapgpa_abi::channel::{TEXT_MAX, VERSION, header, range_words, tag};
use mapgpa_abi::tdcall::status;
use mapgpa_abi::{Alias, Direction};

use crate::Td;
use crate::calls::channel_word;

/// The guest runs; the first message of each vCPU.
pub fn hello(td: &mut impl Td) {
    channel_word(td, header(tag::HELLO, VERSION));
}

/// A conversation begins: the guest wants `size` bytes at `gpa` (no shared bit) converted.
pub fn begin(td: &mut impl Td, to: Direction, gpa: u64, size: u64) {
    range(td, tag::BEGIN, u32::from(to == Direction::ToShared), gpa, size);
}

/// The conversation ends, successfully or not, after `accepted` pages of 4 KiB were accepted.
pub fn end(td: &mut impl Td, success: bool, accepted: u64) {
    channel_word(td, header(tag::END, u32::from(!success)));
    channel_word(td, u32::try_from(accepted).unwrap_or(u32::MAX));
}

/// The last MapGPA call was answered with `status` in R10.
pub fn reply(td: &mut impl Td, status: u64) {
    let field = match status {
        status::SUCCESS => 0,
        status::RETRY => 1,
        _ => 2,
    };
    channel_word(td, header(tag::REPLY, field));
}

/// The guest goes on to use `size` bytes at `gpa` through `alias`.
pub fn use_range(td: &mut impl Td, alias: Alias, gpa: u64, size: u64) {
    range(td, tag::USE, u32::from(alias == Alias::Shared), gpa, size);
}

/// Waits until all vCPUs that have not ended wait.
pub fn barrier(td: &mut impl Td) {
    channel_word(td, header(tag::BARRIER, 0));
}

/// Values for whoever drives the guest.
#[expect(clippy::cast_possible_truncation, reason = "the two halves of a 64-bit number")]
pub fn data(td: &mut impl Td, values: &[u64]) {
    channel_word(td, header(tag::DATA, values.len() as u32));
    for value in values {
        channel_word(td, *value as u32);
        channel_word(td, (*value >> 32) as u32);
    }
}

/// A line for the report; what is over [`TEXT_MAX`] bytes is cut.
pub fn text(td: &mut impl Td, line: &str) {
    bytes(td, tag::TEXT, line.as_bytes());
}

/// Ends this vCPU: the guest test is done, with success or with failure.
pub fn exit(td: &mut impl Td, success: bool) -> ! {
    channel_word(td, header(tag::EXIT, u32::from(!success)));
    td.stop()
}

/// Ends the guest by a deliberate panic, as a guest does that cannot go on: it gives up.
pub fn panic(td: &mut impl Td, message: &str) -> ! {
    bytes(td, tag::PANIC, message.as_bytes());
    td.stop()
}

fn range(td: &mut impl Td, tag: u8, field: u32, gpa: u64, size: u64) {
    channel_word(td, header(tag, field));
    for word in range_words(gpa, size) {
        channel_word(td, word);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "TEXT_MAX fits in 24 bits")]
fn bytes(td: &mut impl Td, tag: u8, text: &[u8]) {
    let text = &text[..text.len().min(TEXT_MAX)];
    channel_word(td, header(tag, text.len() as u32));
    for chunk in text.chunks(4) {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        channel_word(td, u32::from_le_bytes(word));
    }
}
