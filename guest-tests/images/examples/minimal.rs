//! What a user writes: a guest test with a retry loop of its own.
#![no_std]
#![no_main]

use mapgpa_kit::abi::{Alias, Direction, params::Params, shared_bit, tdcall::status};
use mapgpa_kit::bare::BareTd;
use mapgpa_kit::{Td, calls, report};

mapgpa_kit::entry!(main);

fn main(td: &mut BareTd, params: &Params) -> bool {
    report::hello(td);
    let shared = shared_bit(calls::vp_info(td).gpaw);
    report::begin(td, Direction::ToShared, params.gpa, params.size);
    let success = make_shared(td, params.gpa | shared, params.size);
    report::end(td, success, 0);
    if success {
        td.write(Alias::Shared, params.gpa, 42);
    }
    success
}

/// The logic under test: converts `size` bytes at `start`, three tries without progress at most.
fn make_shared(td: &mut BareTd, mut start: u64, size: u64) -> bool {
    let end = start + size;
    let mut tries = 0;
    while tries < 3 {
        let reply = calls::map_gpa(td, start, end - start);
        let sound = (start..end).contains(&reply.r11) && reply.r11.is_multiple_of(4096);
        match reply.r10 {
            status::SUCCESS => return true,
            status::RETRY if sound => {
                tries = if reply.r11 == start { tries + 1 } else { 0 };
                start = reply.r11;
            }
            _ => return false,
        }
    }
    false
}
