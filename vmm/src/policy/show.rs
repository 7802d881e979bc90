//! Actions and rules as text: what [`super::spec`] and [`super::toml_form`] read back to the same.

use std::fmt::{self, Write};

use super::r11::{Anchor, NAMED, R11, SharedBit};
use super::{AcceptAnswer, Action, Amount, Mix, Say, Stall};
use crate::units::show_size;
use mapgpa_abi::PAGE_SIZE;

impl fmt::Display for Action {
    /// The spec string of the action.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mix {
            Some(Mix::Legal) => return f.write_str("random"),
            Some(Mix::Hostile) => return f.write_str("hostile-random"),
            None => {}
        }
        let mut items = Items { f, any: false };
        let delayed = self.stall.is_some() || self.contention.is_some() || self.odd.is_some();
        match self.amount {
            Amount::All if delayed || self.overlap_inuse => items.put(format_args!("complete"))?,
            Amount::Pages(pages) if self.amount_given => {
                items.put(format_args!("chunk={}", show_size(pages * PAGE_SIZE)))?;
            }
            Amount::Budget { budget_ns, cost_ns } => {
                items.put(format_args!("budget={budget_ns}ns"))?;
                if let Some(cost) = cost_ns {
                    items.put(format_args!("cost={cost}ns"))?;
                }
            }
            // What the reader takes where nothing is said.
            Amount::All | Amount::Pages(_) => {}
        }
        match self.stall {
            Some(Stall::Times(times)) => items.put(format_args!("stall={times}"))?,
            Some(Stall::Forever) => items.put(format_args!("stall=forever"))?,
            None => {}
        }
        if let Some(probability) = self.contention {
            items.put(format_args!("contention={probability}"))?;
        }
        match self.odd {
            Some(Say::Retry(r11)) => items.put(format_args!("r11={r11}"))?,
            Some(Say::Status(code)) => items.put(format_args!("status={code:#x}"))?,
            Some(Say::StatusAt(code, r11)) => {
                items.put(format_args!("status={code:#x},r11={r11}"))?
            }
            Some(Say::Success) => items.put(format_args!("lie=success"))?,
            Some(Say::Truth) | None => {}
        }
        if self.after > 0 {
            items.put(format_args!("after={}", self.after))?;
        }
        if self.overlap_inuse {
            items.put(format_args!("overlap=inuse"))?;
        }
        match self.accept {
            AcceptAnswer::Truth => {}
            AcceptAnswer::Already => items.put(format_args!("accept=already"))?,
            AcceptAnswer::Mismatch => items.put(format_args!("accept=mismatch"))?,
            AcceptAnswer::Exit => items.put(format_args!("accept=exit"))?,
            AcceptAnswer::Busy => items.put(format_args!("accept=busy"))?,
            AcceptAnswer::Stuck => items.put(format_args!("accept=stuck"))?,
        }
        if items.any { Ok(()) } else { f.write_str("complete") }
    }
}

/// Items with commas between them.
struct Items<'a, 'b> {
    f: &'a mut fmt::Formatter<'b>,
    any: bool,
}

impl Items<'_, '_> {
    fn put(&mut self, item: fmt::Arguments<'_>) -> fmt::Result {
        if self.any {
            self.f.write_char(',')?;
        }
        self.any = true;
        self.f.write_fmt(item)
    }
}

impl fmt::Display for R11 {
    /// A name, an anchor with an offset, or the value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, ..)) = NAMED.iter().find(|(_, named, _)| named == self) {
            return f.write_str(name);
        }
        debug_assert!(self.bit == SharedBit::Keep && !self.in_range, "only named ones have those");
        let anchor = match self.anchor {
            Anchor::Zero => return write!(f, "{:#x}", self.offset),
            Anchor::Start => "start",
            Anchor::Next => "next",
            Anchor::End => "end",
        };
        let size = show_size(self.offset.unsigned_abs());
        match self.offset {
            0 => f.write_str(anchor),
            1.. => write!(f, "{anchor}+{size}"),
            _ => write!(f, "{anchor}-{size}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec::parse;

    #[test]
    fn what_is_shown_is_read_back_as_the_same() {
        for spec in [
            "complete",
            "chunk=4K",
            "chunk=2052K,stall=2",
            "complete,stall=3",
            "stall=forever,after=2",
            "stall=1,contention=0.1",
            "budget=50000ns,cost=200ns",
            "budget=7ns",
            "r11=end",
            "r11=start",
            "r11=next+2049",
            "r11=end-4K",
            "r11=0xfffffffffffff000",
            "r11=strip-shared",
            "chunk=8K,r11=skip,after=1",
            "complete,r11=start",
            "status=0x8000000000000001,after=3",
            "chunk=4K,lie=success",
            "accept=exit",
            "chunk=64K,accept=mismatch",
            "overlap=inuse",
            "random",
            "hostile-random",
        ] {
            let action = parse(spec).expect(spec);
            assert_eq!(action.to_string(), spec);
        }
        for (spec, shown) in
            [("hyperv", "budget=50000ns,cost=200ns"), ("r11=end+1G", "r11=past-end")]
        {
            assert_eq!(parse(spec).expect(spec).to_string(), shown);
        }
    }
}
