//! All guests of `mapgpa_guests`, selected by the parameter page, and the real crate tdx-tdcall.
#![no_std]
#![no_main]

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::null_mut;

use mapgpa_guests::{Conversion, Converted, Guest, driver};
use mapgpa_kit::abi::params::Params;
use mapgpa_kit::abi::{Direction, PAGE_SIZE};
use mapgpa_kit::bare::BareTd;
use tdx_tdcall::tdx::{td_accept_pages, tdvmcall_mapgpa};

mapgpa_kit::entry!(main);

fn main(td: &mut BareTd, params: &Params) -> bool {
    let vcpu = td.vcpu();
    if Guest::from_index(params.guest) == Some(Guest::TdxTdcall) {
        driver::run_with(td, params, vcpu, tdx_tdcall)
    }
    driver::run(td, params, vcpu)
}

/// Guest `tdx-tdcall`: the crate's own MapGPA and accept, called as td-payload's `decrypt` and
/// `encrypt` do (td-shim, td-payload/src/arch/x86_64/dma.rs): a failure panics, pages are accepted
/// by 4 KiB. The bound is the crate's own.
fn tdx_tdcall(_: &mut BareTd, c: &Conversion) -> Converted {
    let shared = c.to == Direction::ToShared;
    // usize has 64 bits here.
    if tdvmcall_mapgpa(shared, c.gpa, c.size as usize).is_err() {
        panic!("td-payload: MapGPA failed");
    }
    if shared {
        return Ok(0);
    }
    let pages = c.size / PAGE_SIZE;
    td_accept_pages(c.gpa, pages, PAGE_SIZE);
    Ok(pages)
}

/// The crate links `alloc`, which demands an allocator; none of what is called here allocates.
struct NoAllocator;

// SAFETY: no memory is ever handed out.
unsafe impl GlobalAlloc for NoAllocator {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        null_mut()
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static ALLOCATOR: NoAllocator = NoAllocator;
