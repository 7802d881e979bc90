//! The VMM's end of the guest channel: words to messages, messages to what they mean for the run.

use mapgpa_abi::channel::{CRASH_WORDS, TEXT_MAX, VERSION, tag};
use mapgpa_abi::{Alias, Direction};

use super::conversation::Open;
use super::event::{Conversation, Event, EventSink};
use super::{Engine, Flow};
use crate::memory::Memory;
use crate::pagemap::Pages;

/// The most payload words of a message: 64 values of DATA.
const PAYLOAD_MAX: usize = 128;

/// A message being received.
#[derive(Debug, Default)]
pub(super) struct Channel {
    tag: u8,
    field: u32,
    /// Payload words still to come.
    missing: usize,
    payload: Vec<u32>,
}

/// What a message says.
enum Message {
    Incomplete,
    Hello(u32),
    Begin(Direction, Pages),
    End { success: bool, accepted: u64 },
    Use(Alias, Pages),
    Panic(String),
    Crash(String),
    Exit { success: bool },
    Barrier,
    Data(Vec<u64>),
    Text(String),
    Reply(u32),
    Unknown(u32),
}

impl Channel {
    fn push(&mut self, word: u32) -> Message {
        if self.missing == 0 {
            self.payload.clear();
            let [field @ .., tag] = word.to_le_bytes();
            self.tag = tag;
            self.field = u32::from_le_bytes([field[0], field[1], field[2], 0]);
            let field = self.field as usize;
            self.missing = match tag {
                tag::BEGIN | tag::USE => 3,
                tag::END => 1,
                tag::CRASH => CRASH_WORDS,
                tag::PANIC | tag::TEXT if field <= TEXT_MAX => field.div_ceil(4),
                tag::DATA if 2 * field <= PAYLOAD_MAX => 2 * field,
                tag::HELLO | tag::EXIT | tag::BARRIER | tag::REPLY => 0,
                _ => return Message::Unknown(word),
            };
        } else {
            self.missing -= 1;
            self.payload.push(word);
        }
        if self.missing == 0 { self.message() } else { Message::Incomplete }
    }

    fn message(&self) -> Message {
        match self.tag {
            tag::HELLO => Message::Hello(self.field),
            tag::BEGIN if self.field & 1 != 0 => Message::Begin(Direction::ToShared, self.pages()),
            tag::BEGIN => Message::Begin(Direction::ToPrivate, self.pages()),
            tag::END => {
                let accepted = self.payload.first().copied().unwrap_or(0);
                Message::End { success: self.field == 0, accepted: accepted.into() }
            }
            tag::USE if self.field & 1 != 0 => Message::Use(Alias::Shared, self.pages()),
            tag::USE => Message::Use(Alias::Private, self.pages()),
            tag::PANIC => Message::Panic(self.text()),
            tag::TEXT => Message::Text(self.text()),
            tag::CRASH => Message::Crash(self.crash()),
            tag::EXIT => Message::Exit { success: self.field == 0 },
            tag::BARRIER => Message::Barrier,
            tag::REPLY => Message::Reply(self.field),
            _ => Message::Data(self.values().collect()),
        }
    }

    fn pages(&self) -> Pages {
        let word = |at: usize| u64::from(self.payload.get(at).copied().unwrap_or(0));
        // 40 bits of page frame number are all that a 52-bit GPA has.
        Pages { first: word(0) | (word(1) & 0xff) << 32, count: word(2) }
    }

    fn values(&self) -> impl Iterator<Item = u64> {
        self.payload.chunks_exact(2).map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32)
    }

    /// The text, in a form that fits in a line of a report: without control characters.
    fn text(&self) -> String {
        let mut bytes: Vec<u8> = self.payload.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(self.field as usize);
        crate::printable(&String::from_utf8_lossy(&bytes))
    }

    fn crash(&self) -> String {
        const NAMES: [&str; CRASH_WORDS / 2] = [
            "error", "rip", "rflags", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
            "r9", "r10", "r11", "r12", "r13", "r14", "r15",
        ];
        let registers: Vec<_> = NAMES
            .iter()
            .zip(self.values())
            .map(|(name, value)| format!("{name}={value:#x}"))
            .collect();
        format!("exception {} with {}", vector_name(self.field), registers.join(" "))
    }
}

/// An exception vector by its mnemonic (Intel SDM 3A, table 6-1).
fn vector_name(vector: u32) -> String {
    let name = match vector {
        0 => "#DE",
        1 => "#DB",
        3 => "#BP",
        6 => "#UD",
        8 => "#DF",
        12 => "#SS",
        13 => "#GP",
        14 => "#PF",
        17 => "#AC",
        19 => "#XM",
        20 => "#VE",
        _ => return format!("vector {vector}"),
    };
    name.to_owned()
}

impl<M: Memory, S: EventSink> Engine<M, S> {
    /// Takes a word that `vcpu` wrote to the guest channel.
    pub fn channel_word(&mut self, vcpu: u32, word: u32) -> Flow {
        let message = self.vcpus[vcpu as usize].channel.push(word);
        if let Message::Reply(told) = message {
            return self.request_told(vcpu, told);
        }
        if self.request_over(vcpu) == Flow::Stop {
            return Flow::Stop;
        }
        match message {
            Message::Incomplete | Message::Hello(VERSION) | Message::Reply(_) => Flow::Continue,
            Message::Hello(version) => self.odd(&format!(
                "the guest speaks version {version} of the channel, this VMM version {VERSION}"
            )),
            Message::Begin(to, pages) => {
                if pages.count == 0 {
                    return self.odd("a conversation of no pages was begun");
                }
                let interrupted = self.vcpus[vcpu as usize].open.is_some_and(|open| open.marked);
                if interrupted {
                    self.odd("a conversation was begun inside another");
                }
                self.close(vcpu, interrupted.then_some((false, 0)));
                let conversation = Conversation {
                    vcpu,
                    pages,
                    to,
                    requests: 0,
                    retries: 0,
                    no_progress: 0,
                    ns: 0,
                };
                let this = &mut self.vcpus[vcpu as usize];
                this.open = Some(Open::new(conversation, true));
                this.user.begin();
                self.emit(&Event::Begun { vcpu, pages, to })
            }
            Message::End { success, accepted } => {
                if self.vcpus[vcpu as usize].open.is_none() {
                    return self.odd("a conversation ended that was not begun");
                }
                self.book_accepts(vcpu, success, accepted);
                self.close(vcpu, Some((success, accepted)))
            }
            Message::Use(_, Pages { count: 0, .. }) => self.odd("no pages were said to be used"),
            Message::Use(alias, pages) => self.emit(&Event::Use { pages, alias }),
            Message::Panic(text) => {
                self.close(vcpu, Some((false, 0)));
                self.emit(&Event::Panic { text: &text });
                Flow::Stop
            }
            Message::Crash(detail) => {
                self.crash(&detail);
                Flow::Stop
            }
            Message::Exit { success } => {
                self.vcpus[vcpu as usize].ended = true;
                // In the middle of a conversation: what it says of all, it says of that one.
                if self.vcpus[vcpu as usize].open.is_some_and(|open| open.marked) {
                    self.close(vcpu, Some((success, 0)));
                }
                let flow = self.emit(&Event::Exit { vcpu, success });
                let all = self.vcpus.iter().all(|vcpu| vcpu.ended);
                if all || flow == Flow::Stop { Flow::Stop } else { Flow::Exit }
            }
            Message::Barrier => Flow::Barrier,
            Message::Data(values) => self.emit(&Event::Data { values: &values }),
            Message::Text(text) => self.emit(&Event::Text { text: &text }),
            Message::Unknown(word) => self.odd(&format!("channel: {word:#010x} begins no message")),
        }
    }

    /// Books a crash of the guest: an unhandled exception, a triple fault, an access to nowhere.
    pub fn crash(&mut self, detail: &str) {
        self.emit(&Event::Crash { detail });
    }

    /// Books what is worth a note.
    pub fn odd(&mut self, detail: &str) -> Flow {
        self.emit(&Event::Odd { detail })
    }
}
