//! Spec strings: `chunk=2M,stall=2` to an [`Action`].

use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::status;

use super::r11::{Anchor, NAMED, R11};
use super::{AcceptAnswer, Action, Amount, DEFAULT_CHUNK, Mix, PRESETS, Say, Stall};
use crate::units;

/// A malformed spec string.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("policy \"{spec}\": at character {at}: expected {expected}, found {found}")]
pub struct SpecError {
    /// The whole spec.
    pub spec: String,
    /// Where, counted from 1.
    pub at: usize,
    /// What would have been right.
    pub expected: String,
    /// What was there.
    pub found: String,
}

/// The items of spec strings: form, and what it does. For `list policies` and docs.
pub const SPEC_HELP: &[(&str, &str)] = &[
    ("complete", "converts all of every request"),
    ("chunk=SIZE", "converts SIZE of each request, then says RETRY"),
    ("stall=N|forever", "answers each position RETRY-at-start N times before it progresses"),
    ("contention=P", "each reply makes no progress with probability P"),
    ("budget=T[,cost=T]", "converts what time T allows, at a cost a page (without: measured)"),
    (
        "r11=WHERE",
        "RETRY with a wrong R11: end, past-end, below, start-1, unaligned, strip-shared, flip, \
         skip, or start|next|end+-SIZE, or 0xVALUE",
    ),
    ("status=0xCODE", "an error status instead of a conversion; with r11= its R11 is that"),
    ("lie=success", "says SUCCESS without a conversion"),
    ("accept=already|mismatch|exit|busy|stuck", "how the TDX module answers an accept"),
    ("overlap=inuse", "GPA_INUSE while another vCPU converts an overlapping range"),
    ("after=N", "stall, contention, r11, status and lie begin after N replies in a conversation"),
    ("random", "a seeded mix of legal behaviour"),
    ("hostile-random", "a seeded mix of all behaviour"),
];

const ITEMS: &str = "complete, chunk=, stall=, contention=, budget=, cost=, r11=, status=, \
                     lie=success, accept=, overlap=inuse, after=, random, hostile-random or a preset";

type Failure = (usize, String, String);

/// Reads a spec string.
pub(super) fn parse(spec: &str) -> Result<Action, SpecError> {
    let mut reader = Reader::default();
    let mut offset = 0;
    let result = spec.split(',').try_for_each(|item| {
        let result = reader.item(item, offset);
        offset += item.len() + 1;
        result
    });
    result.and_then(|()| reader.finish()).map_err(|(byte, expected, found)| SpecError {
        spec: spec.to_owned(),
        // An item that ends without its value has it expected at the end.
        at: spec.get(..byte.min(spec.len())).map_or(byte, |before| before.chars().count()) + 1,
        expected,
        found: if found.is_empty() { "nothing".to_owned() } else { format!("\"{found}\"") },
    })
}

/// What has been read so far, with the place of what may turn out to be misplaced.
#[derive(Default)]
struct Reader {
    items: u32,
    seen: Vec<String>,
    complete: bool,
    chunk: Option<u64>,
    budget: Option<u64>,
    cost: Option<(usize, u64)>,
    stall: Option<Stall>,
    contention: Option<f64>,
    odd: Option<Say>,
    after: Option<(usize, u64)>,
    overlap: bool,
    accept: AcceptAnswer,
    mix: Option<(usize, Mix)>,
}

impl Reader {
    fn item(&mut self, item: &str, at: usize) -> Result<(), Failure> {
        self.items += 1;
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (item, None),
        };
        let group = match key {
            "complete" | "chunk" | "budget" => "chunk",
            other => other,
        };
        let excludes = |seen: &str| match group {
            "lie" => ["r11", "status", "lie"].contains(&seen),
            "r11" | "status" => seen == group || seen == "lie",
            _ => seen == group,
        };
        if self.seen.iter().any(|seen| excludes(seen)) {
            let expected = format!("no second \"{key}\", nor another item of its kind");
            return Err((at, expected, item.to_owned()));
        }
        let word = |yes: &mut bool| {
            *yes = value.is_none();
            if *yes { Ok(()) } else { Err((at, format!("\"{key}\" without a value"), item.into())) }
        };
        let place = at + key.len() + 1;
        let text = value.unwrap_or_default();
        let fail = |expected: &str| (place, expected.to_owned(), text.to_owned());
        match key {
            "complete" => {
                word(&mut self.complete)?;
                self.forget_amount();
            }
            "random" | "hostile-random" => {
                word(&mut false)?;
                let mix = if key == "random" { Mix::Legal } else { Mix::Hostile };
                self.mix = Some((at, mix));
            }
            "chunk" => {
                self.forget_amount();
                self.chunk = Some(pages(text).map_err(|e| fail(&e))?);
            }
            "budget" => {
                self.chunk = None;
                self.budget = Some(nanos(text).map_err(|e| fail(&e))?);
            }
            "cost" => self.cost = Some((at, nanos(text).map_err(|e| fail(&e))?)),
            "stall" => {
                self.stall = Some(match text {
                    "forever" => Stall::Forever,
                    _ => match units::number(text) {
                        Some(times) if times > 0 => Stall::Times(times),
                        _ => return Err(fail("a number from 1, or \"forever\"")),
                    },
                });
            }
            "contention" => {
                self.contention = match text.parse::<f64>() {
                    Ok(p) if p > 0.0 && p <= 1.0 && !text.starts_with('+') => Some(p),
                    _ => return Err(fail("a probability over 0, up to 1")),
                };
            }
            "r11" => {
                let r11 = r11(text).ok_or_else(|| fail(&r11_forms()))?;
                self.odd = Some(match self.odd {
                    Some(Say::Status(code)) => Say::StatusAt(code, r11),
                    _ => Say::Retry(r11),
                });
            }
            "status" => {
                let code = code(text).map_err(fail)?;
                self.odd = Some(match self.odd {
                    Some(Say::Retry(r11)) => Say::StatusAt(code, r11),
                    _ => Say::Status(code),
                });
            }
            "lie" if text == "success" => self.odd = Some(Say::Success),
            "lie" => return Err(fail("\"success\"")),
            "after" => {
                let after = units::number(text).ok_or_else(|| fail("a number of replies"))?;
                self.after = Some((at, after));
            }
            "accept" => {
                self.accept = match text {
                    "already" => AcceptAnswer::Already,
                    "mismatch" => AcceptAnswer::Mismatch,
                    "exit" => AcceptAnswer::Exit,
                    "busy" => AcceptAnswer::Busy,
                    "stuck" => AcceptAnswer::Stuck,
                    _ => {
                        return Err(fail(
                            "\"already\", \"mismatch\", \"exit\", \"busy\" or \"stuck\"",
                        ));
                    }
                };
            }
            "overlap" if text == "inuse" => self.overlap = true,
            "overlap" => return Err(fail("\"inuse\"")),
            _ => {
                let preset = PRESETS.iter().find(|preset| preset.name == item);
                let preset = preset.ok_or_else(|| (at, ITEMS.to_owned(), item.to_owned()))?;
                // What a preset sets can be set again, so its items are not marked as seen.
                let seen = self.seen.len();
                preset.spec.split(',').try_for_each(|item| {
                    let result = self.item(item, at);
                    self.seen.truncate(seen);
                    result
                })?;
            }
        }
        self.seen.push(group.to_owned());
        Ok(())
    }

    /// Forgets the amount that a preset set: one written after it takes its place.
    fn forget_amount(&mut self) {
        self.chunk = None;
        if self.budget.take().is_some() && !self.seen.iter().any(|seen| seen == "cost") {
            self.cost = None;
        }
    }

    fn finish(self) -> Result<Action, Failure> {
        if let Some((at, mix)) = self.mix {
            if self.items > 1 {
                let expected = "random or hostile-random alone".to_owned();
                return Err((at, expected, "other items with it".to_owned()));
            }
            return Ok(Action { mix: Some(mix), ..Action::COMPLETE });
        }
        let amount_given = self.complete || self.chunk.is_some() || self.budget.is_some();
        if let (Some((at, _)), None) = (self.cost, self.budget) {
            return Err((at, "\"budget=\" with it".to_owned(), "cost=".to_owned()));
        }
        let delayed = self.stall.is_some() || self.contention.is_some() || self.odd.is_some();
        let needs_chunk = delayed || self.overlap;
        if let (Some((at, _)), false) = (self.after, delayed) {
            let expected = "stall=, contention=, r11=, status= or lie= with it".to_owned();
            return Err((at, expected, "after=".to_owned()));
        }
        let amount = match (self.chunk, self.budget) {
            (Some(pages), _) => Amount::Pages(pages),
            (None, Some(budget_ns)) => {
                Amount::Budget { budget_ns, cost_ns: self.cost.map(|(_, cost)| cost.max(1)) }
            }
            (None, None) if needs_chunk && !self.complete => Amount::Pages(DEFAULT_CHUNK),
            (None, None) => Amount::All,
        };
        Ok(Action {
            amount,
            amount_given: amount_given && !self.complete,
            stall: self.stall,
            contention: self.contention,
            odd: self.odd,
            after: self.after.map_or(0, |(_, after)| after),
            overlap_inuse: self.overlap,
            accept: self.accept,
            mix: None,
        })
    }
}

fn pages(text: &str) -> Result<u64, String> {
    units::page_size(text).map(|bytes| bytes / PAGE_SIZE).map_err(|e| e.expected.to_owned())
}

fn nanos(text: &str) -> Result<u64, String> {
    let duration = units::duration(text).map_err(|e| e.expected.to_owned())?;
    u64::try_from(duration.as_nanos())
        .ok()
        .filter(|nanos| *nanos > 0)
        .ok_or_else(|| "a duration over 0".to_owned())
}

fn code(text: &str) -> Result<u64, &'static str> {
    const EXPECTED: &str = "a status code such as 0x8000000000000000";
    match units::hexadecimal(text).ok_or(EXPECTED) {
        Ok(status::SUCCESS) => Err("an error status; 0 is SUCCESS: use lie=success"),
        Ok(status::RETRY) => Err("an error status; 1 is RETRY: use stall= or r11="),
        code => code,
    }
}

fn r11_forms() -> String {
    let names: Vec<_> = NAMED.iter().map(|(name, ..)| *name).collect();
    format!("{}, start|next|end with +SIZE or -SIZE, or 0xVALUE", names.join(", "))
}

fn r11(text: &str) -> Option<R11> {
    if let Some((_, r11, _)) = NAMED.iter().find(|(name, ..)| *name == text) {
        return Some(*r11);
    }
    if let Some(value) = units::hexadecimal(text) {
        return Some(R11::new(Anchor::Zero, value.cast_signed()));
    }
    let (anchor, rest) = [("start", Anchor::Start), ("next", Anchor::Next), ("end", Anchor::End)]
        .into_iter()
        .find_map(|(name, anchor)| Some((anchor, text.strip_prefix(name)?)))?;
    let offset = match rest.split_at_checked(1) {
        None => 0,
        Some(("+", size)) => i64::try_from(units::size(size).ok()?).ok()?,
        Some(("-", size)) => -i64::try_from(units::size(size).ok()?).ok()?,
        Some(_) => return None,
    };
    Some(R11::new(anchor, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(spec: &str) -> String {
        parse(spec).expect_err(spec).to_string()
    }

    #[test]
    fn chunks_and_defaults() {
        let amount = |spec| parse(spec).expect(spec).amount;
        assert_eq!(amount("complete"), Amount::All);
        assert_eq!(amount("chunk=2M"), Amount::Pages(512));
        assert_eq!(amount("stall=2"), Amount::Pages(DEFAULT_CHUNK));
        assert_eq!(amount("overlap=inuse"), Amount::Pages(DEFAULT_CHUNK));
        assert_eq!(amount("accept=mismatch"), Amount::All);
        let budget = Amount::Budget { budget_ns: 50_000, cost_ns: Some(200) };
        assert_eq!(amount("hyperv"), budget);
        let dearer = Amount::Budget { budget_ns: 50_000, cost_ns: Some(400) };
        assert_eq!(amount("hyperv,cost=400ns"), dearer);
        assert_eq!(amount("kvm-7.2,chunk=4M"), Amount::Pages(1024));
    }

    #[test]
    fn every_item_that_the_help_names_is_read() {
        for spec in [
            "r11=past-end,after=1",
            "r11=start+6K",
            "r11=end-4K",
            "r11=0xdead000",
            "status=0x8000000000000000,after=3",
            "lie=success",
            "accept=already",
            "accept=busy",
            "accept=stuck",
            "status=0x8000000000000000,r11=skip",
            "r11=skip,status=0x8000000000000000",
            "overlap=inuse",
            "contention=0.1",
            "budget=50us",
            "random",
            "hostile-random",
            "chunk=2M,stall=forever",
        ] {
            parse(spec).expect(spec);
        }
        for preset in PRESETS {
            parse(preset.spec).expect(preset.spec);
            assert_eq!(parse(preset.name), parse(preset.spec));
        }
    }

    #[test]
    fn errors_show_position_and_expectation() {
        assert_eq!(
            error("chunk=64Q"),
            "policy \"chunk=64Q\": at character 7: expected a size such as 4K, 64K, 2M or 1G, \
             found \"64Q\""
        );
        assert!(error("chunk=64K,stall=0").contains("at character 17: expected a number from 1"));
        assert!(error("").contains("at character 1") && error("").contains("found nothing"));
        assert!(error("chunk=64K,").contains("at character 11"));
        assert!(error("chunk=64K,chunk=4K").contains("no second"));
        assert!(error("r11=end,lie=success").contains("at character 9"));
        assert!(error("lie=success,status=0x2").contains("at character 13"));
        assert!(error("status=0x2,r11=end,status=0x3").contains("at character 20"));
        assert!(error("cost=3us").contains("budget="));
        assert!(error("chunk=64K,after=3").contains("stall="));
        assert!(error("status=0x1").contains("RETRY"));
        assert!(error("contention=1.5").contains("probability"));
        assert!(error("contention=nan").contains("probability"));
        assert!(error("random,chunk=4K").contains("alone"));
        assert!(error("é,chunk=4Q").contains("at character 1"));
        assert!(error("chunk=4100").contains("multiple of 4K"));
        assert!(error("random=3").contains("without a value"));
    }
}
