//! The TOML form of a policy: ordered rules with conditions, for what a spec string cannot say.
//!
//! ```toml
//! schema = "mapgpa.policy/1"
//! name = "first retry wild"
//! [[rule]]
//! direction = "to-shared"
//! calls = [2, 2]
//! do = "r11=below"
//! [[rule]]
//! do = "chunk=64K"
//! ```

use mapgpa_abi::Direction;
use serde::{Deserialize, Serialize};

use super::{Conditions, Policy, Rule, SpecError, spec};

const SCHEMA: &str = "mapgpa.policy/1";

/// A TOML policy that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TomlError {
    /// The file cannot be read.
    #[error("policy file {path}: cannot be read")]
    Read {
        /// The file.
        path: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// It is not TOML, or has a key or value that a policy has not.
    #[error("policy file {path}: {}", message.trim_end().replace('\n', " | "))]
    Form {
        /// The file.
        path: String,
        /// Where and what.
        message: String,
    },
    /// The schema is another one.
    #[error("policy file {path}: schema is \"{found}\", expected \"{SCHEMA}\"")]
    Schema {
        /// The file.
        path: String,
        /// What was there.
        found: String,
    },
    /// A rule's `do` is malformed.
    #[error("policy file {path}: rule {rule}")]
    Rule {
        /// The file.
        path: String,
        /// Which rule, from 1.
        rule: usize,
        /// What is wrong with it.
        source: Box<SpecError>,
    },
    /// A condition names an empty range.
    #[error(
        "policy file {path}: rule {rule}: {key} = [{}, {}]: expected the first, from {least}, \
         and then the last", found.0, found.1
    )]
    Range {
        /// The file.
        path: String,
        /// Which rule, from 1.
        rule: usize,
        /// Which condition.
        key: &'static str,
        /// The least first value.
        least: u64,
        /// What was there.
        found: (u64, u64),
    },
    /// The name does not fit in a report.
    #[error("policy file {path}: name {name:?}: expected printable text without space around it")]
    Name {
        /// The file.
        path: String,
        /// What was there.
        name: String,
    },
    /// It has no rules.
    #[error("policy file {path}: expected at least one [[rule]]")]
    Empty {
        /// The file.
        path: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: String,
    name: Option<String>,
    #[serde(default)]
    rule: Vec<RuleForm>,
}

/// A rule as it is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleForm {
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<DirectionForm>,
    #[serde(skip_serializing_if = "Option::is_none")]
    calls: Option<(u64, u64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpa: Option<(u64, u64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu: Option<u32>,
    r#do: String,
}

impl From<&Rule> for RuleForm {
    fn from(rule: &Rule) -> Self {
        let Conditions { direction, calls, gpa, vcpu } = rule.when;
        let direction = direction.map(|direction| match direction {
            Direction::ToShared => DirectionForm::ToShared,
            Direction::ToPrivate => DirectionForm::ToPrivate,
        });
        Self { direction, calls, gpa, vcpu, r#do: rule.action.to_string() }
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DirectionForm {
    ToShared,
    ToPrivate,
}

/// Reads the policy file `path`.
pub(super) fn read(path: &str) -> Result<Policy, TomlError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| TomlError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// Reads the text of the policy file `path`.
pub(super) fn parse(path: &str, text: &str) -> Result<Policy, TomlError> {
    let path = || path.to_owned();
    let file: File = toml::from_str(text)
        .map_err(|error| TomlError::Form { path: path(), message: error.to_string() })?;
    if file.schema != SCHEMA {
        return Err(TomlError::Schema { path: path(), found: file.schema });
    }
    let printable =
        |name: &String| !name.is_empty() && name.trim() == name && !name.contains(char::is_control);
    if let Some(name) = file.name.clone().filter(|name| !printable(name)) {
        return Err(TomlError::Name { path: path(), name });
    }
    let rules = rules(&path(), &file.rule)?;
    Ok(Policy { name: file.name.unwrap_or_else(path), rules, script: None })
}

/// Reads the rules that the file `path` has.
///
/// # Errors
/// There are none, or one is malformed.
pub fn rules(path: &str, forms: &[RuleForm]) -> Result<Vec<Rule>, TomlError> {
    let path = || path.to_owned();
    if forms.is_empty() {
        return Err(TomlError::Empty { path: path() });
    }
    let rules = (1..).zip(forms).map(|(number, rule)| {
        for (key, range, least) in [("calls", rule.calls, 1), ("gpa", rule.gpa, 0)] {
            if let Some(found) = range.filter(|(first, last)| *first < least || last < first) {
                return Err(TomlError::Range { path: path(), rule: number, key, least, found });
            }
        }
        let when = Conditions {
            direction: rule.direction.as_ref().map(|direction| match direction {
                DirectionForm::ToShared => Direction::ToShared,
                DirectionForm::ToPrivate => Direction::ToPrivate,
            }),
            calls: rule.calls,
            gpa: rule.gpa,
            vcpu: rule.vcpu,
        };
        let action = spec::parse(&rule.r#do).map_err(|source| TomlError::Rule {
            path: path(),
            rule: number,
            source: Box::new(source),
        })?;
        Ok(Rule { when, action })
    });
    rules.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let error = parse("p.toml", text).expect_err(text);
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    }

    #[test]
    fn rules_are_read_in_order() {
        let text = r#"
            schema = "mapgpa.policy/1"
            name = "n"
            [[rule]]
            direction = "to-shared"
            calls = [2, 3]
            gpa = [0x1000, 0x2000]
            vcpu = 1
            do = "r11=below"
            [[rule]]
            do = "chunk=4K"
        "#;
        let policy = parse("p.toml", text).expect("a policy");
        assert_eq!((policy.name.as_str(), policy.rules.len()), ("n", 2));
        assert_eq!(policy.rules[0].when.calls, Some((2, 3)));
        assert_eq!(policy.rules[1].when, Conditions::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let rule = |rest: &str| format!("schema = \"mapgpa.policy/1\"\n[[rule]]\n{rest}");
        assert!(error("schema = \"x\"").contains("expected \"mapgpa.policy/1\""));
        assert!(error("schema = \"mapgpa.policy/1\"").contains("at least one"));
        assert!(error(&rule("do = \"complete\"\ncall = 3")).contains("unknown field `call`"));
        assert!(error(&rule("do = \"chunk=1\"")).contains("rule 1: policy \"chunk=1\": at char"));
        assert!(error(&rule("do = \"complete\"\ncalls = [3, 2]")).contains("calls = [3, 2]"));
        assert!(error(&rule("do = \"complete\"\ncalls = [0, 2]")).contains("from 1"));
        assert!(error("[").contains("p.toml"));
    }
}
