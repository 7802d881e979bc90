//! Lists of an axis as users write them: `4K,64K`, `4K..1G`, `0..8,none`.

use mapgpa_abi::params::{BOUND_NONE, BOUND_OWN};

use crate::units;

/// The most values that a range gives.
const VALUES_MAX: usize = 1000;

/// The values of an axis, in the order given, each once.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct List<T>(pub(super) Vec<T>);

/// What one item gives: values, or why it is malformed.
type Item<T> = Result<Vec<T>, String>;

fn list<T: PartialEq>(text: &str, item: impl Fn(&str) -> Item<T>) -> Result<List<T>, String> {
    let mut values = Vec::new();
    for part in text.split(',') {
        for value in item(part.trim())? {
            if !values.contains(&value) {
                values.push(value);
            }
        }
        if values.len() > VALUES_MAX {
            return Err(format!("expected at most {VALUES_MAX} values"));
        }
    }
    Ok(List(values))
}

/// Sizes; `A..B` gives A, 4A, 16A and so on up to B, and B.
pub(super) fn sizes(text: &str) -> Result<List<u64>, String> {
    let size = |text: &str| units::page_size(text).map_err(|error| error.to_string());
    list(text, |item| {
        let Some((first, last)) = item.split_once("..") else { return Ok(vec![size(item)?]) };
        let (first, last) = (size(first)?, size(last)?);
        if first > last {
            return Err(format!("expected A..B with A no more than B, found \"{item}\""));
        }
        let powers = std::iter::successors(Some(first), |size| size.checked_mul(4));
        Ok(powers.take_while(|size| *size < last).chain([last]).collect())
    })
}

/// Sizes, and `none` for 0.
pub(super) fn guest_chunks(text: &str) -> Result<List<u64>, String> {
    list(text, |item| if item == "none" { Ok(vec![0]) } else { Ok(sizes(item)?.0) })
}

fn numbers(item: &str) -> Item<u64> {
    const MOST: u64 = 1_000_000;
    let error = || format!("expected a number from 0 to {MOST}, or A..B, found \"{item}\"");
    let number = |text: &str| text.parse().ok().filter(|n| *n <= MOST).ok_or_else(error);
    let (first, last) = match item.split_once("..") {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(item)?, number(item)?),
    };
    if first > last || last - first >= VALUES_MAX as u64 {
        return Err(error());
    }
    Ok((first..=last).collect())
}

/// Numbers; `none` gives no value.
pub(super) fn stalls(text: &str) -> Result<List<u64>, String> {
    list(text, |item| if item == "none" { Ok(vec![]) } else { numbers(item) })
}

/// Numbers, `own` and `none`, as in the parameter page; 0 acts as 1, and becomes it.
pub(super) fn bounds(text: &str) -> Result<List<u64>, String> {
    list(text, |item| match item {
        "none" => Ok(vec![BOUND_NONE]),
        "own" => Ok(vec![BOUND_OWN]),
        _ => Ok(numbers(item)?.into_iter().map(|bound| bound.max(1)).collect()),
    })
}

/// Probabilities; `A..B` gives A, B, and 1, 2 and 5 of each power of ten between, from 0.01 on;
/// `none` gives no value.
pub(super) fn probabilities(text: &str) -> Result<List<f64>, String> {
    const STEPS: [f64; 6] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5];
    list(text, |item| {
        let error = || format!("expected a probability from 0 to 1, or A..B, found \"{item}\"");
        let number =
            |text: &str| text.parse().ok().filter(|p| (0.0..=1.0).contains(p)).ok_or_else(error);
        if item == "none" {
            return Ok(vec![]);
        }
        let Some((first, last)) = item.split_once("..") else { return Ok(vec![number(item)?]) };
        let (first, last): (f64, f64) = (number(first)?, number(last)?);
        if first > last {
            return Err(error());
        }
        let between = STEPS.into_iter().filter(|step| first < *step && *step < last);
        Ok([first].into_iter().chain(between).chain([last]).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    #[test]
    fn lists_are_read() {
        assert_eq!(sizes("4K..1M"), Ok(List(vec![4 * K, 16 * K, 64 * K, 256 * K, K * K])));
        assert_eq!(sizes("4K..20K,4K,2M"), Ok(List(vec![4 * K, 16 * K, 20 * K, 2 * K * K])));
        assert_eq!(guest_chunks("none,2M"), Ok(List(vec![0, 2 * K * K])));
        assert_eq!(stalls("0..2,5"), Ok(List(vec![0, 1, 2, 5])));
        assert_eq!(stalls("none"), Ok(List(vec![])));
        assert_eq!(bounds("0..2,own,none"), Ok(List(vec![1, 2, BOUND_OWN, BOUND_NONE])));
        assert_eq!(probabilities("0..0.5"), Ok(List(vec![0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])));
        assert_eq!(probabilities("0.3"), Ok(List(vec![0.3])));
    }

    #[test]
    fn what_is_malformed_is_refused() {
        for text in ["", "4K,", "1G..4K", "4K..", "5", "0", "x"] {
            assert!(sizes(text).is_err(), "{text}");
        }
        for text in ["", "-1", "3..1", "1..", "0..1000000", "9999999", "1.5"] {
            assert!(stalls(text).is_err() && bounds(text).is_err(), "{text}");
        }
        for text in ["", "1.1", "-0.1", "0.5..0.1", "nan", "inf", "0..2"] {
            assert!(probabilities(text).is_err(), "{text}");
        }
    }
}
