//! What the guest does with pages beside converting them: TDG.MEM.PAGE.ACCEPT, and touching them.

use mapgpa_abi::tdcall::{level, module};
use mapgpa_abi::{Alias, PAGE_SIZE, PAGE_SIZE_2M};

use super::event::{Accept, Event, EventSink};
use super::{Engine, Flow, FrontEnd};
use crate::memory::{Memory, MemoryError};
use crate::pagemap::{Change, PageState, Pages};
use crate::policy::AcceptAnswer;

impl<M: Memory, S: EventSink> Engine<M, S> {
    /// Answers TDG.MEM.PAGE.ACCEPT with `rcx` on `vcpu`: RAX, or nothing if the TD does not come back.
    ///
    /// # Errors
    /// The memory could not be set up.
    pub fn accept(&mut self, vcpu: u32, rcx: u64) -> Result<(Option<u64>, Flow), MemoryError> {
        let this = &mut self.vcpus[vcpu as usize];
        this.accepts += 1;
        let size = match rcx & 0xfff {
            level::L4K => PAGE_SIZE,
            level::L2M => PAGE_SIZE_2M,
            _ => 0,
        };
        let gpa = rcx & !0xfff;
        if size == 0 || !gpa.is_multiple_of(size) || gpa & !(self.shared_bit - 1) != 0 {
            return Ok((Some(module::OPERAND_INVALID | module::OPERAND_RCX), Flow::Continue));
        }
        let pages = Pages::of_bytes(gpa, size);
        let policy =
            self.settings.policy.decide_accept(self.settings.seed, vcpu, this.accepts, gpa);
        // KVM maps a TD's memory by 4 KiB only (tdx_gmem_private_max_mapping_level()).
        let by_kvm = matches!(self.settings.front_end, FrontEnd::Kvm(_));
        let state = self.map.uniform(pages);
        let shared = state != Some(PageState::PrivatePending)
            && self.map.find(pages, |state| state == PageState::Shared).is_some();
        let large = size == PAGE_SIZE_2M;
        let odd = !self.vcpus[vcpu as usize].accepts.is_multiple_of(2);
        let busy = (Some(module::OPERAND_BUSY | module::OPERAND_RCX), true);
        let (answer, special) = match (policy, state) {
            (AcceptAnswer::Exit, _) => (None, true),
            _ if shared => (None, false),
            (AcceptAnswer::Mismatch, Some(PageState::PrivatePending)) if large => {
                (Some(module::PAGE_SIZE_MISMATCH | level::L2M), true)
            }
            _ if by_kvm && large => (Some(module::PAGE_SIZE_MISMATCH | level::L2M), false),
            (AcceptAnswer::Stuck, Some(PageState::PrivatePending)) => busy,
            (AcceptAnswer::Busy, Some(PageState::PrivatePending)) if odd => busy,
            (_, Some(PageState::PrivatePending)) => (Some(module::SUCCESS), false),
            (_, Some(_)) => {
                let code = module::PAGE_ALREADY_ACCEPTED | (rcx & 7);
                // Of the host's making, and not because the guest accepts twice.
                (Some(code), self.kept.overlaps(&(pages.first..pages.end())))
            }
            (_, None) => (Some(module::PAGE_SIZE_MISMATCH | level::L2M), false),
        };
        if answer == Some(module::SUCCESS) {
            self.runs.clear();
            self.map.apply(pages, Change::Accept, u64::MAX, &mut self.runs);
            for run in &self.runs {
                self.memory.accept(*run, &self.map)?;
            }
        }
        let lied = shared && self.are_lied(pages, |state| state == PageState::Shared);
        let event = Event::Accept(Accept { vcpu, pages, answer, shared, lied, special });
        let flow = self.emit(&event);
        Ok((answer, if answer.is_none() { Flow::Stop } else { flow }))
    }

    /// Where accepts are not seen: a conversion that `vcpu` says has succeeded, with as many pages
    /// accepted as are pending, has accepted them.
    pub(super) fn book_accepts(&mut self, vcpu: u32, success: bool, accepted: u64) {
        let Some(open) = self.vcpus[vcpu as usize].open.filter(|_| self.accepts_unseen) else {
            return;
        };
        let pages = open.conversation.pages;
        let mut pending = 0;
        self.map.scan(pages, |piece, state| {
            pending += if state == PageState::PrivatePending { piece.count } else { 0 };
            true
        });
        if !success || accepted < pending {
            return;
        }
        self.runs.clear();
        self.map.apply(pages, Change::Accept, u64::MAX, &mut self.runs);
        for at in 0..self.runs.len() {
            let (pages, answer) = (self.runs[at], Some(module::SUCCESS));
            let (shared, lied, special) = (false, false, false);
            self.emit(&Event::Accept(Accept { vcpu, pages, answer, shared, lied, special }));
        }
    }

    /// Whether the guest may touch `raw_gpa` (bytes, shared bit as used); if not, that is an event.
    ///
    /// # Errors
    /// It may not; what the vCPU is to do then.
    pub fn touch(&mut self, raw_gpa: u64) -> Result<(), Flow> {
        let alias = if raw_gpa & self.shared_bit == 0 { Alias::Private } else { Alias::Shared };
        let page = (raw_gpa & !self.shared_bit) / PAGE_SIZE;
        let state = self.map.state(page);
        let legitimate = match alias {
            Alias::Private => state == PageState::PrivateAccepted,
            Alias::Shared => state == PageState::Shared,
        };
        if legitimate {
            return Ok(());
        }
        if (alias, state) == (Alias::Private, PageState::PrivatePending) {
            self.touched_pending(page);
        }
        let lied = self.is_lied(Pages { first: page, count: 1 });
        Err(self.emit(&Event::Touch { raw_gpa, alias, page, state, lied }))
    }
}
