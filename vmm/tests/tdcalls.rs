//! TDCALL over made-up memory: leaves, sub-functions, registers that are hidden, and accepts.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use mapgpa::engine::{Flow, Malformed};
use mapgpa::pagemap::{PageState, Pages};
use mapgpa_abi::Direction;
use mapgpa_abi::tdcall::{Regs, leaf, level, module, status, sub};
use support::{Asked, BIT, Bench, GPA, GPAW, K4, M2, accept_regs};

const FIRST: u64 = GPA / K4;
const PAGES: Pages = Pages { first: FIRST, count: 512 };

#[test]
fn accepts_answer_as_the_pages_are() {
    let mut bench = Bench::new("complete");
    let large = FIRST * K4;
    let already = |level| Some(module::PAGE_ALREADY_ACCEPTED | level);
    assert_eq!(bench.accept(large, level::L4K), already(0), "private from the start");
    assert_eq!(bench.accept(large, level::L2M), already(1));
    bench.map(BIT | GPA, M2);
    bench.map(GPA, M2);
    assert_eq!(bench.accept(large + K4, level::L4K), Some(module::SUCCESS));
    assert_eq!(bench.accept(large + K4, level::L4K), already(0));
    let mismatch = Some(module::PAGE_SIZE_MISMATCH | 1);
    assert_eq!(bench.accept(large, level::L2M), mismatch, "a part is accepted");
    for page in (0..512).filter(|page| *page != 1) {
        assert_eq!(bench.accept(large + page * K4, level::L4K), Some(module::SUCCESS));
    }
    assert_eq!(bench.engine.map().uniform(PAGES), Some(PageState::PrivateAccepted));
    bench.map(BIT | GPA, M2);
    bench.map(GPA, M2);
    assert_eq!(bench.accept(large, level::L2M), Some(module::SUCCESS));
    // A page that is shared is not there: the TD does not come back.
    bench.map(BIT | (GPA + K4), K4);
    assert_eq!(bench.accept(large, level::L2M), None);
    let accept = *bench.accepts().last().expect("an accept");
    assert!(accept.shared && !accept.lied && !accept.special);
    assert_eq!(bench.accept(large, level::L4K), already(0), "the page beside it is");
}

#[test]
fn accepts_answer_as_the_policy_says() {
    let pending = |policy: &str| {
        let mut bench = Bench::new(policy);
        bench.map(BIT | GPA, M2);
        bench.map(GPA, M2);
        bench
    };
    let mut bench = pending("accept=already");
    let state = bench.engine.map().uniform(PAGES);
    assert_eq!(state, Some(PageState::PrivateAccepted), "the page was never removed");
    let keeps = Asked::Convert(PAGES, Direction::ToPrivate, true);
    assert_eq!(bench.engine.memory().asked.last(), Some(&keeps));
    assert_eq!(bench.accept(GPA, level::L2M), Some(module::PAGE_ALREADY_ACCEPTED | 1));
    assert!(bench.accepts()[0].special);

    // The host kept the pages in one call; that its rule is not for accepts makes no difference.
    let scratch = support::Scratch::new("kept");
    let file = scratch.path("p.toml");
    let text = "schema = \"mapgpa.policy/1\"\n[[rule]]\ncalls = [2, 2]\n\
                do = \"accept=already\"\n";
    std::fs::write(&file, text).expect("a file");
    let mut bench = pending(&file.display().to_string());
    bench.accept(GPA, level::L4K);
    assert!(bench.accepts()[0].special);
    bench.map(BIT | GPA, M2);
    bench.map(GPA, M2);
    bench.accept(GPA, level::L4K);
    bench.accept(GPA, level::L4K);
    let special: Vec<_> = bench.accepts().iter().map(|accept| accept.special).collect();
    assert_eq!(special, [true, false, false], "the guest's own second accept is its own doing");

    let mut bench = pending("accept=mismatch");
    assert_eq!(bench.accept(GPA, level::L2M), Some(module::PAGE_SIZE_MISMATCH | 1));
    assert_eq!(bench.accept(GPA, level::L4K), Some(module::SUCCESS), "only for 2 MiB");
    assert!(bench.accepts()[0].special);

    let busy = module::OPERAND_BUSY | module::OPERAND_RCX;
    let mut bench = pending("accept=busy");
    let answers = [0, 0, 1, 1, 2].map(|page| bench.accept(GPA + page * K4, level::L4K));
    assert_eq!(answers, [Some(busy), Some(0), Some(busy), Some(0), Some(busy)], "every other one");
    assert!(bench.accepts()[0].special && !bench.accepts()[1].special);
    assert_eq!(bench.accept(GPA, level::L4K), Some(module::PAGE_ALREADY_ACCEPTED), "the truth");
    let mut bench = pending("accept=stuck");
    for _ in 0..20 {
        assert_eq!(bench.accept(GPA, level::L2M), Some(busy));
    }

    let mut bench = pending("accept=exit");
    let (answer, flow) = bench.engine.accept(0, GPA | level::L2M).expect("memory");
    assert_eq!((answer, flow), (None, Flow::Stop));
    let accept = bench.accepts()[0];
    assert!(accept.special && !accept.shared);
}

#[test]
fn malformed_accepts_are_refused() {
    let mut bench = Bench::new("complete");
    for rcx in [GPA | level::L1G, GPA | 3, GPA | 8, GPA + K4 + level::L2M, BIT | GPA, 1 << 52] {
        let mut regs = accept_regs(rcx);
        bench.tdcall(&mut regs);
        assert_eq!(regs.rax, module::OPERAND_INVALID | module::OPERAND_RCX, "{rcx:#x}");
    }
}

#[test]
fn leaves_and_sub_functions() {
    let mut bench = Bench::with("complete", 1, 3, GPAW);
    let mut regs = Regs { rax: leaf::VP_INFO, ..Regs::default() };
    bench.tdcall(&mut regs);
    assert_eq!((regs.rax, regs.rcx & 0x3f), (module::SUCCESS, u64::from(GPAW)));
    assert_eq!((regs.r8 & 0xffff_ffff, regs.r9), (3, 0));
    let mut regs = Regs { rax: 99, ..Regs::default() };
    bench.tdcall(&mut regs);
    assert_eq!(regs.rax & module::STATUS_MASK, module::OPERAND_INVALID);
    let mut regs = Regs::vmcall(0x10099, 1, 2);
    bench.tdcall(&mut regs);
    assert_eq!((regs.rax, regs.r10), (module::SUCCESS, status::SUBFUNC_UNSUPPORTED));
    let mut regs = Regs { r10: 5, ..Regs::vmcall(sub::MAP_GPA, BIT | GPA, K4) };
    bench.tdcall(&mut regs);
    assert_eq!(regs.r10, status::INVALID_OPERAND, "R10 other than 0 is no GHCI call");
    assert_eq!(bench.calls(), [], "none of it is a request");
    assert_eq!(bench.events.borrow().texts.len(), 3, "but each is worth a note");
}

#[test]
fn hidden_registers_read_as_zero_and_are_not_written() {
    let call = |hidden: u64| {
        let mut bench = Bench::new("chunk=4K");
        let full = Regs::vmcall(sub::MAP_GPA, BIT | GPA, M2);
        let mut regs = Regs { rcx: full.rcx & !(1 << hidden), ..full };
        bench.tdcall(&mut regs);
        (regs, bench)
    };
    // R12 hidden: a request for GPA 0, to private. R13 hidden: of size 0.
    let (regs, bench) = call(12);
    assert_eq!((regs.r10, bench.last().raw_gpa, bench.last().size), (0, 0, M2));
    assert_eq!(regs.r12, BIT | GPA, "inputs stay");
    let (regs, bench) = call(13);
    assert_eq!(regs.r10, status::INVALID_OPERAND);
    assert_eq!(bench.last().malformed, Some(Malformed::Empty));
    // R11 hidden: no sub-function. R10 hidden: a GHCI call, whose status nobody sees.
    let (regs, bench) = call(11);
    assert_eq!((regs.r10, regs.r11), (status::SUBFUNC_UNSUPPORTED, sub::MAP_GPA));
    assert!(bench.calls().is_empty());
    let (regs, bench) = call(10);
    assert_eq!((regs.r10, regs.r11), (0, BIT | (GPA + K4)));
    assert_eq!(bench.last().status, status::RETRY);
    // A mask with RAX, RCX or RSP in it, or bits that are no register, is the module's to refuse.
    for bit in [0, 1, 4, 32, 63] {
        let mut bench = Bench::new("complete");
        let mut regs = Regs::vmcall(sub::MAP_GPA, BIT | GPA, M2);
        regs.rcx |= 1 << bit;
        bench.tdcall(&mut regs);
        assert_eq!(regs.rax, module::OPERAND_INVALID | module::OPERAND_RCX);
        assert!(bench.calls().is_empty());
    }
}
