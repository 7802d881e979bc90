//! A policy's rules as TOML, for people: what [`super::toml_form`] reads back to the same.

use std::fmt::{self, Write};

use mapgpa_abi::Direction;

use super::Rule;

/// Writes `rules` as `[[name]]` tables.
///
/// # Errors
/// `out` cannot be written.
pub fn write_rules(out: &mut impl Write, name: &str, rules: &[Rule]) -> fmt::Result {
    for Rule { when, action } in rules {
        writeln!(out, "\n[[{name}]]")?;
        if let Some(direction) = when.direction {
            let direction = match direction {
                Direction::ToShared => "to-shared",
                Direction::ToPrivate => "to-private",
            };
            writeln!(out, "direction = \"{direction}\"")?;
        }
        if let Some((first, last)) = when.calls {
            writeln!(out, "calls = [{first}, {last}]")?;
        }
        if let Some((first, last)) = when.gpa {
            writeln!(out, "gpa = [{first:#x}, {last:#x}]")?;
        }
        if let Some(vcpu) = when.vcpu {
            writeln!(out, "vcpu = {vcpu}")?;
        }
        writeln!(out, "do = \"{action}\"")?;
    }
    Ok(())
}
