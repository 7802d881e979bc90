//! The commands `host`, `list`, `explain` and `run`.

use std::io::{self, Write};

use mapgpa_guests::{GUESTS, Guest};

use super::args::{DirectionArg, Format, Listed, RunArgs};
use super::{CliError, Found, firmware, linux, output, resolve};
use crate::case::{Case, GuestSource, Ran};
use crate::engine::FrontEnd;
use crate::explain::explain as explain_policy;
use crate::express::express;
use crate::host;
use crate::judge::CHECKS;
use crate::policy::{PRESETS, Policy, SPEC_HELP};
use crate::report::{Verdict, text};
use crate::suite::POLICIES;

fn stdout_error(source: io::Error) -> CliError {
    CliError::Io("stdout", source)
}

fn print_json(value: &serde_json::Value) -> Result<(), CliError> {
    writeln!(io::stdout().lock(), "{value:#}").map_err(stdout_error)
}

/// `mapgpa host`
pub(super) fn host(format: Format) -> Result<Found, CliError> {
    let facts = host::look();
    match format {
        Format::Json => print_json(&facts.to_json())?,
        Format::Text => facts.write(&mut io::stdout().lock()).map_err(stdout_error)?,
    }
    Ok(if facts.runs_guest_tests() { Found::Expected } else { Found::HostCannot })
}

/// `mapgpa list`
pub(super) fn list(what: Listed, format: Format) -> Result<Found, CliError> {
    let rows: Vec<Vec<(&str, String)>> = match what {
        Listed::Guests => GUESTS
            .iter()
            .map(|guest| {
                let bound = match (guest.retries, guest.own_bound) {
                    (false, _) => "no retry".to_owned(),
                    (true, Some(bound)) => format!("bound {bound}"),
                    (true, None) => "no bound".to_owned(),
                };
                vec![
                    ("name", guest.name.to_owned()),
                    ("retries", bound),
                    ("models", guest.models.to_owned()),
                    ("summary", guest.summary.to_owned()),
                ]
            })
            .collect(),
        Listed::Checks => CHECKS
            .iter()
            .map(|check| {
                vec![
                    ("letter", check.letter.to_string()),
                    ("name", check.name.to_owned()),
                    ("sentence", check.sentence.to_owned()),
                    ("reason", check.reason.to_owned()),
                ]
            })
            .collect(),
        Listed::Policies => {
            let items = SPEC_HELP.iter().map(|(item, does)| ("item", *item, *does));
            let presets = PRESETS.iter().map(|preset| ("preset", preset.name, preset.models));
            items
                .chain(presets)
                .map(|(kind, name, does)| {
                    vec![
                        ("kind", kind.to_owned()),
                        ("name", name.to_owned()),
                        ("does", does.to_owned()),
                    ]
                })
                .collect()
        }
    };
    match format {
        Format::Json => {
            let objects = rows.into_iter().map(|row| {
                row.into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect()
            });
            print_json(&serde_json::Value::Array(
                objects.map(serde_json::Value::Object).collect(),
            ))?;
        }
        Format::Text => {
            list_text(what, &rows, &mut io::stdout().lock()).map_err(stdout_error)?;
        }
    }
    Ok(Found::Expected)
}

fn list_text(what: Listed, rows: &[Vec<(&str, String)>], out: &mut impl Write) -> io::Result<()> {
    for row in rows {
        let short = row.len().min(match what {
            Listed::Guests | Listed::Checks | Listed::Policies => 2,
        });
        for (at, (_, value)) in row[..short].iter().enumerate() {
            let width = rows.iter().map(|row| row[at].1.len()).max().unwrap_or(0);
            write!(out, "{value:<width$}  ")?;
        }
        let rest: Vec<_> = row[short..].iter().map(|(_, value)| value.as_str()).collect();
        writeln!(out, "{}", rest.join("\n      "))?;
    }
    if what == Listed::Policies {
        writeln!(
            out,
            "\nA policy is items with commas between them, or a file (*.toml). Those of the suite:"
        )?;
        for policy in POLICIES {
            writeln!(out, "  {policy}")?;
        }
    }
    Ok(())
}

/// `mapgpa explain`
pub(super) fn explain(
    policy: &str,
    front_end: FrontEnd,
    range: u64,
    direction: DirectionArg,
    seed: u64,
    calls: usize,
) -> Result<Found, CliError> {
    let policy = Policy::parse(policy)?;
    if let FrontEnd::Kvm(kernel) = front_end {
        express(&policy, kernel)?;
    }
    // The same is refused as for a guest.
    let guest = GuestSource::BuiltIn(Guest::Reference);
    Case { plan: direction.into(), range, ..Case::new(guest, policy.clone()) }.check()?;
    let explained = explain_policy(&policy, front_end, direction.into(), range, seed)?;
    output::stdout(|out| text::explain(out, &explained, calls))?;
    Ok(Found::Expected)
}

/// What is said to the options of kernels without one.
pub(super) const NEEDS_KERNEL: &str = "--initrd, --cmdline, --swiotlb, --module, --kexec, --until and --console \
                            are about a kernel: they need --kernel";

/// `mapgpa run`
pub(super) fn run(args: &RunArgs) -> Result<Found, CliError> {
    let ran = match (&args.firmware.firmware, &args.linux.kernel, &args.guest) {
        (Some(firmware), ..) => firmware::run(args, firmware)?,
        (None, ..) if !args.firmware.scenario.is_empty() => {
            return Err(CliError::Conflict("--scenario is about a firmware: it needs --firmware"));
        }
        (None, Some(kernel), _) => linux::run(args, kernel)?,
        (None, None, _) if args.linux.any() => return Err(CliError::Conflict(NEEDS_KERNEL)),
        (None, None, guest) => run_guest(args, guest.as_deref().unwrap_or_default())?,
    };
    report(args, ran)
}

fn run_guest(args: &RunArgs, guest: &str) -> Result<Ran, CliError> {
    let guest = resolve::guest(guest)?;
    let policy = Policy::parse(&args.policy)?;
    let ground = resolve::ground(&args.case)?;
    let policy =
        resolve::policy(policy, ground, args.case.nearest).map_err(|error| ground.refuse(error))?;
    let mut case = resolve::case(guest, policy, &args.case, ground);
    case.guest_chunk = args.guest_chunk.unwrap_or(0);
    case.trace.clone_from(&args.trace);
    case.check()?;
    case.run().map_err(|error| match error {
        error if error.is_bad_image() => CliError::Elf { file: case.guest.name(), source: error },
        error => error.into(),
    })
}

/// Writes the report of a run; what the exit code is made of.
fn report(args: &RunArgs, ran: Ran) -> Result<Found, CliError> {
    output::stdout(|out| match args.format {
        Format::Text => text::run(out, &ran.report),
        Format::Json => output::json(out, &ran.report),
    })?;
    if let Some(error) = ran.error {
        return Err(error.into());
    }
    if ran.interrupted {
        return Ok(Found::Interrupted);
    }
    Ok(match ran.report.verdict {
        Verdict::Fail => Found::Violations,
        Verdict::NotExercised if args.git_bisect => Found::HostCannot,
        _ => Found::Expected,
    })
}
