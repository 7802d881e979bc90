//! Sizes and durations as users write them: `64K`, `2M`, `50us`, `10s`.

use std::time::Duration;

use mapgpa_abi::PAGE_SIZE;

/// A size or duration that is not one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected {expected}, found \"{found}\"")]
pub struct UnitError {
    /// What would have been right.
    pub expected: &'static str,
    /// What was there.
    pub found: String,
}

const SIZE: &str = "a size such as 4K, 64K, 2M or 1G";
const PAGES: &str = "a size that is a multiple of 4K and not 0, such as 4K, 64K, 2M or 1G";
const LIMIT: &str = "a duration over 0, such as 100ms or 10s";
const DURATION: &str = "a duration such as 200ns, 50us, 100ms or 10s";

/// A number: digits and nothing else.
#[must_use]
pub fn number(text: &str) -> Option<u64> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

/// A number in hexadecimal: 0x and digits.
#[must_use]
pub fn hexadecimal(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x")?;
    let hexadecimal = digits.bytes().all(|b| b.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16).ok().filter(|_| hexadecimal)
}

/// A size in bytes: a number, with K, M, G or T for powers of 1024; 0x for hexadecimal.
///
/// # Errors
/// The text is no size, or it does not fit in 64 bits.
pub fn size(text: &str) -> Result<u64, UnitError> {
    let error = || UnitError { expected: SIZE, found: text.to_owned() };
    if text.starts_with("0x") {
        return hexadecimal(text).ok_or_else(error);
    }
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number = number(digits).ok_or_else(error)?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// A size in bytes that is a whole number of 4 KiB pages, and at least one.
///
/// # Errors
/// The text is no such size.
pub fn page_size(text: &str) -> Result<u64, UnitError> {
    let bytes = size(text)?;
    if bytes == 0 || bytes % PAGE_SIZE != 0 {
        return Err(UnitError { expected: PAGES, found: text.to_owned() });
    }
    Ok(bytes)
}

/// A duration: a number and ns, us, ms or s, at most a day.
///
/// # Errors
/// The text is no duration.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    let error = || UnitError { expected: DURATION, found: text.to_owned() };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let nanos = match &text[digits.len()..] {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err(error()),
    };
    let number = number(digits).ok_or_else(error)?;
    let duration = Duration::from_nanos(number.checked_mul(nanos).ok_or_else(error)?);
    if duration > Duration::from_secs(86_400) { Err(error()) } else { Ok(duration) }
}

/// A duration over 0, at most a day.
///
/// # Errors
/// The text is no such duration.
pub fn time_limit(text: &str) -> Result<Duration, UnitError> {
    let limit = duration(text)?;
    if limit.is_zero() {
        return Err(UnitError { expected: LIMIT, found: text.to_owned() });
    }
    Ok(limit)
}

/// A size for people: the largest unit that gives a whole number.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Nanoseconds for people, to three digits.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "shown to three digits")]
pub fn show_nanos(nanos: u64) -> String {
    match nanos {
        0..1_000 => format!("{nanos} ns"),
        1_000..1_000_000 => format!("{:.1} us", nanos as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", nanos as f64 / 1e6),
        _ => format!("{:.2} s", nanos as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("4K", 4096), ("2M", 2 << 20), ("0x1000", 4096)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "64Q", "-1", "+1", "1.5M", "99999999999999999999", "16777216T", "é"]
        {
            assert!(size(text).is_err(), "{text}");
        }
        assert!(page_size("100").is_err() && page_size("0").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(duration("50us"), Ok(Duration::from_micros(50)));
        for text in ["", "5", "us", "5m", "99999999s", "-1s", "1.5s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_as_they_are_read() {
        for text in ["4K", "64K", "2M", "1G", "5", "1025"] {
            assert_eq!(size(text).map(show_size).as_deref(), Ok(text));
        }
    }
}
