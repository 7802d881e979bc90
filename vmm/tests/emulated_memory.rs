//! Backend `emulated`: what guest memory does at conversions, and which accesses are caught.

mod common;

use common::{GPA, K4, M2, Probe, Script, kvm, kvm_and_userfaultfd, shared_bit};
use mapgpa::pagemap::PageState::{PrivateAccepted, PrivatePending, Shared};
use mapgpa_abi::Alias;

#[test]
fn contents_are_lost_at_conversion_and_zero_after_accept() {
    if !kvm() {
        return;
    }
    let script = Script::new()
        .fill(Alias::Private, GPA, 512, K4)
        .check(Alias::Private, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, true)
        .check(Alias::Shared, GPA, 512, K4)
        .fill(Alias::Shared, GPA, 512, K4)
        .check(Alias::Shared, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, false)
        .accept(GPA, 1, 0, 1)
        .check(Alias::Private, GPA, 512, K4)
        .convert(GPA, 1, 0, M2, true)
        .check(Alias::Shared, GPA, 512, K4);
    let seen = Probe::default().run(&[script]);
    assert_eq!(
        seen.data,
        [0, 512, 1, 512, 0, 0, 512, 1, 1, 512, 0, 1, 512, 0],
        "written; converted and lost; written; converted, accepted and zero; lost again"
    );
    assert_eq!(seen.touches, []);
    assert_eq!(seen.exits, [(0, true)]);
}
