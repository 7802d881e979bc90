//! A case as a file: what a run is made of, and how it went.
//!
//! ```toml
//! schema = "mapgpa.case/1"
//! mapgpa = "0.1.0"
//! class = "hostile"
//! found = 17
//! guest = "openvmm"
//!
//! [run]
//! backend = "hosted"
//! gpaw = 48
//! seed = 1
//! direction = "to-shared"
//! range = "8K"
//!
//! [expect]
//! class = "hostile"
//! result = "success"
//! checks = ["false-success", "wrong-alias"]
//! check = "false-success"
//! call = 1
//! gpa = "0x1001000"
//! detail = "1 pages are not converted"
//!
//! [[rule]]
//! do = "chunk=4K,r11=end"
//! ```

use serde::{Deserialize, Serialize};

use super::{ReplayError, target};
use crate::case::{Backend, KernelForm, Recipe, RunForm};
use crate::fuzz::{Outcome, Target};
use crate::judge::{Check, Class, GuestResult};
use crate::policy::{RuleForm, write_rules};
use crate::units;

/// The version of cases.
pub const CASE_SCHEMA: &str = "mapgpa.case/1";

/// All of a case but its rules, in the order in which it is written.
#[derive(Debug, Serialize)]
struct Head<'a> {
    schema: &'static str,
    mapgpa: &'static str,
    class: Class,
    #[serde(skip_serializing_if = "Option::is_none")]
    found: Option<u64>,
    guest: &'a str,
    run: &'a RunForm,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<&'a KernelForm>,
    expect: ExpectForm,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[expect(dead_code, reason = "looked at before the rest")]
    schema: String,
    mapgpa: String,
    class: Class,
    found: Option<u64>,
    guest: String,
    run: RunForm,
    kernel: Option<KernelForm>,
    expect: ExpectForm,
    rule: Vec<RuleForm>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectForm {
    class: Class,
    result: GuestResult,
    checks: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    call: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpa: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

/// How a case is expected to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// The judge's class.
    pub class: Class,
    /// How the guest ends.
    pub result: GuestResult,
    /// The checks that fail, in order of their list.
    pub checks: Vec<Check>,
    /// The check that the case is about.
    pub check: Option<Check>,
    /// The call in which it first fails.
    pub call: Option<u64>,
    /// The GPA at which it does.
    pub gpa: Option<u64>,
}

/// A case that was read.
#[derive(Debug)]
pub struct CaseFile {
    /// The version of mapgpa that wrote it.
    pub mapgpa: String,
    /// The class that was asked of the fuzzer.
    pub class: Class,
    /// The seed from which it was made.
    pub found: Option<u64>,
    /// The guest's name.
    pub guest: String,
    /// What is run.
    pub target: Target,
    /// How it is expected to go.
    pub expected: Expected,
}

/// Writes the case of `target` that went as `outcome` says; it is about `check`, and was found with
/// `seed` among policies of `class`.
#[must_use]
pub fn write_case(
    target: &Target,
    outcome: &Outcome,
    check: Option<Check>,
    class: Class,
    seed: Option<u64>,
) -> String {
    let (recipe, exact) = match target {
        Target::Test(case) => (Recipe::of_test(case), true),
        // A kernel's calls and addresses may be others in another run.
        Target::Kernel(case) => (Recipe::of_kernel(case), false),
    };
    let violation = outcome.violations.iter().find(|violation| Some(violation.check) == check);
    let head = Head {
        schema: CASE_SCHEMA,
        mapgpa: env!("CARGO_PKG_VERSION"),
        class,
        found: seed,
        guest: &recipe.guest,
        run: &recipe.run,
        kernel: recipe.kernel.as_ref(),
        expect: ExpectForm {
            class: outcome.class,
            result: outcome.result,
            checks: outcome.checks().iter().map(ToString::to_string).collect(),
            check: check.map(|check| check.to_string()),
            call: violation.filter(|_| exact).map(|violation| violation.call),
            gpa: violation
                .filter(|_| exact)
                .and_then(|violation| violation.gpa)
                .map(|gpa| format!("{gpa:#x}")),
            detail: violation.map(|violation| violation.detail.clone()),
        },
    };
    // Plain data, and numbers that TOML has: the command line sees to that. An empty text would be no
    // case, and a test reads each back.
    let mut text = toml::to_string(&head).unwrap_or_default();
    let _ = write_rules(&mut text, "rule", target.rules());
    text
}

impl CaseFile {
    /// Reads the case in `text`, the contents of the file `path`, to be run on `backend` if that is
    /// not the recorded one.
    ///
    /// # Errors
    /// It is none, or of another version, or cannot be run.
    pub fn parse(path: &str, text: &str, backend: Option<Backend>) -> Result<Self, ReplayError> {
        let form = |error: toml::de::Error| ReplayError::Form {
            path: path.to_owned(),
            message: error.to_string(),
        };
        let table: toml::Table = text.parse().map_err(form)?;
        let found = table.get("schema").and_then(toml::Value::as_str).unwrap_or_default();
        if found != CASE_SCHEMA {
            let (path, found) = (path.to_owned(), found.to_owned());
            return Err(ReplayError::Schema { path, found, expected: CASE_SCHEMA });
        }
        let File { mapgpa, class, found, guest, run, kernel, expect, rule, .. } =
            toml::from_str(text).map_err(form)?;
        let recipe = Recipe { guest: guest.clone(), run, kernel, rule };
        let target = target(path, &recipe, backend)?;
        let check = |name: &String| {
            Check::by_name(name).ok_or_else(|| ReplayError::Value {
                path: path.to_owned(),
                key: "check",
                found: name.clone(),
                expected: "a check (`mapgpa list checks`)".to_owned(),
            })
        };
        let gpa = |text: &String| {
            units::hexadecimal(text).ok_or_else(|| ReplayError::Value {
                path: path.to_owned(),
                key: "gpa",
                found: text.clone(),
                expected: "an address such as 0x1000000".to_owned(),
            })
        };
        let expected = Expected {
            class: expect.class,
            result: expect.result,
            checks: expect.checks.iter().map(check).collect::<Result<_, _>>()?,
            check: expect.check.as_ref().map(check).transpose()?,
            call: expect.call,
            gpa: expect.gpa.as_ref().map(gpa).transpose()?,
        };
        Ok(Self { mapgpa, class, found, guest, target, expected })
    }

    /// In what `outcome` differs from what is expected, a line each: none, if it is reproduced.
    #[must_use]
    pub fn differences(&self, outcome: &Outcome) -> Vec<String> {
        let expected = &self.expected;
        let mut lines = Vec::new();
        let mut differ = |what: &str, expected: String, found: String| {
            if expected != found {
                lines.push(format!("{what}: expected {expected}, found {found}"));
            }
        };
        let names = |checks: &[Check]| match checks {
            [] => "none".to_owned(),
            checks => checks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        };
        differ("checks", names(&expected.checks), names(&outcome.checks()));
        if matches!(self.target, Target::Test(_)) {
            differ("class", expected.class.name().into(), outcome.class.name().into());
            differ("result", expected.result.name().into(), outcome.result.name().into());
        }
        let violation =
            outcome.violations.iter().find(|violation| Some(violation.check) == expected.check);
        if let Some(violation) = violation {
            let name = violation.check.info().name;
            if let Some(call) = expected.call {
                differ(&format!("{name}, call"), call.to_string(), violation.call.to_string());
            }
            if let Some(gpa) = expected.gpa {
                let found = violation.gpa.map_or("none".to_owned(), |gpa| format!("{gpa:#x}"));
                differ(&format!("{name}, GPA"), format!("{gpa:#x}"), found);
            }
        }
        lines
    }
}
