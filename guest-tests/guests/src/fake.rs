//! A [`Td`] for unit tests: it answers by a script and records what the guest did.

use std::boxed::Box;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::string::String;
use std::vec::Vec;

use mapgpa_kit::Td;
use mapgpa_kit::abi::channel::{PORT, tag};
use mapgpa_kit::abi::tdcall::{Regs, leaf, sub};
use mapgpa_kit::abi::{Alias, Direction};

use crate::{Bound, Conversion};

pub(crate) const K4: u64 = 4096;
pub(crate) const M2: u64 = 2 << 20;
/// Where test conversions start; 2 MiB aligned, not 1 GiB.
pub(crate) const GPA: u64 = 0x4020_0000;
/// The shared bit at the [`FakeTd`]'s GPAW of 48.
pub(crate) const BIT: u64 = 1 << 47;

/// Replies to MapGPA: (R10, R11).
pub(crate) mod reply {
    use mapgpa_kit::abi::tdcall::status;

    pub(crate) type Reply = (u64, u64);
    pub(crate) const SUCCESS: Reply = (status::SUCCESS, 0);

    pub(crate) const fn retry(r11: u64) -> Reply {
        (status::RETRY, r11)
    }

    pub(crate) const fn error(status: u64) -> Reply {
        (status, 0)
    }
}

/// A conversion of `size` bytes at [`GPA`] with the guest's own bound.
pub(crate) const fn conversion(to: Direction, size: u64) -> Conversion {
    Conversion { gpa: GPA, size, to, shared_bit: BIT, bound: Bound::Own }
}

/// Whether `run` ends by [`Td::stop`].
pub(crate) fn stops<R>(run: impl FnOnce() -> R) -> bool {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(_) => false,
        Err(cause) if cause.is::<Stopped>() => true,
        Err(cause) => resume_unwind(cause),
    }
}

struct Stopped;

type Host = Box<dyn FnMut(u64, u64) -> reply::Reply>;
type Module = Box<dyn FnMut(u64) -> u64>;

/// A TD whose host and module are closures.
pub(crate) struct FakeTd {
    host: Host,
    module: Module,
    /// R12 and R13 of each MapGPA.
    pub(crate) requests: Vec<(u64, u64)>,
    /// RCX of each MapGPA.
    pub(crate) masks: Vec<u64>,
    /// RCX of each accept.
    pub(crate) accepts: Vec<u64>,
    /// Each write.
    pub(crate) writes: Vec<(Alias, u64, u64)>,
    /// Each read.
    pub(crate) reads: Vec<(Alias, u64)>,
    /// The channel, word by word.
    pub(crate) words: Vec<u32>,
    /// Whether writes are lost.
    pub(crate) forgetful: bool,
    memory: HashMap<u64, u64>,
}

impl FakeTd {
    /// `host` answers (R12, R13) of MapGPA, `module` RCX of an accept.
    pub(crate) fn new(
        host: impl FnMut(u64, u64) -> reply::Reply + 'static,
        module: impl FnMut(u64) -> u64 + 'static,
    ) -> Self {
        Self {
            host: Box::new(host),
            module: Box::new(module),
            requests: Vec::new(),
            masks: Vec::new(),
            accepts: Vec::new(),
            writes: Vec::new(),
            reads: Vec::new(),
            words: Vec::new(),
            forgetful: false,
            memory: HashMap::new(),
        }
    }

    /// A host that answers with these replies, and no more; accepts succeed.
    pub(crate) fn replies<const N: usize>(replies: [reply::Reply; N]) -> Self {
        let mut replies = VecDeque::from(replies);
        Self::new(move |_, _| replies.pop_front().expect("one request too many"), |_| 0)
    }

    /// A host that always answers so; accepts succeed.
    pub(crate) fn always(reply: reply::Reply) -> Self {
        Self::new(move |_, _| reply, |_| 0)
    }

    /// A host that converts `chunk` bytes of each request; accepts succeed.
    pub(crate) fn chunked(chunk: u64) -> Self {
        let host = move |gpa, size| {
            if size <= chunk { reply::SUCCESS } else { reply::retry(gpa + chunk) }
        };
        Self::new(host, |_| 0)
    }

    /// The texts of this tag, in order.
    pub(crate) fn texts(&self, wanted: u8) -> Vec<String> {
        self.messages()
            .into_iter()
            .filter(|(tag, ..)| *tag == wanted)
            .map(|(_, field, payload)| {
                let bytes: Vec<u8> = payload.iter().flat_map(|word| word.to_le_bytes()).collect();
                String::from_utf8(bytes[..field as usize].to_vec()).unwrap()
            })
            .collect()
    }

    /// The texts of deliberate panics.
    pub(crate) fn panics(&self) -> Vec<String> {
        self.texts(tag::PANIC)
    }

    /// The channel's messages: tag, field, payload.
    pub(crate) fn messages(&self) -> Vec<(u8, u32, Vec<u32>)> {
        let mut words = self.words.iter().copied();
        let mut messages = Vec::new();
        while let Some(header) = words.next() {
            let [field @ .., message_tag] = header.to_le_bytes();
            let field = u32::from_le_bytes([field[0], field[1], field[2], 0]);
            let payload = match message_tag {
                tag::HELLO | tag::EXIT | tag::BARRIER => 0,
                tag::BEGIN | tag::USE => 3,
                tag::END => 1,
                tag::TEXT | tag::PANIC => field.div_ceil(4) as usize,
                other => panic!("unexpected tag {other}"),
            };
            let payload: Vec<u32> = words.by_ref().take(payload).collect();
            messages.push((message_tag, field, payload));
        }
        messages
    }
}

impl Td for FakeTd {
    fn tdcall(&mut self, regs: &mut Regs) {
        match (regs.rax, regs.r11) {
            (leaf::VP_INFO, _) => {
                regs.rax = 0;
                regs.rcx = 48;
            }
            (leaf::MEM_PAGE_ACCEPT, _) => {
                self.accepts.push(regs.rcx);
                regs.rax = (self.module)(regs.rcx);
            }
            (leaf::VP_VMCALL, sub::IO) => {
                assert_eq!((regs.r12, regs.r13, regs.r14), (4, 1, u64::from(PORT)));
                self.words.push(u32::try_from(regs.r15).unwrap());
                regs.r10 = 0;
            }
            (leaf::VP_VMCALL, sub::MAP_GPA) => {
                assert_eq!(regs.rcx & 0x3c00, 0x3c00, "RCX hides registers that MapGPA needs");
                self.masks.push(regs.rcx);
                self.requests.push((regs.r12, regs.r13));
                (regs.r10, regs.r11) = (self.host)(regs.r12, regs.r13);
                regs.rax = 0;
            }
            other => panic!("unexpected TDCALL {other:x?}"),
        }
    }

    fn read(&mut self, alias: Alias, gpa: u64) -> u64 {
        self.reads.push((alias, gpa));
        self.memory.get(&gpa).copied().unwrap_or(0)
    }

    fn write(&mut self, alias: Alias, gpa: u64, value: u64) {
        self.writes.push((alias, gpa, value));
        if !self.forgetful {
            self.memory.insert(gpa, value);
        }
    }

    fn stop(&mut self) -> ! {
        resume_unwind(Box::new(Stopped))
    }
}
