//! `--shard`: which part of a campaign this process runs, as typed or as a CI system says in the
//! environment.

use crate::units;

/// A part of a campaign: `index` of `count`, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shard {
    pub(super) index: u64,
    pub(super) count: u64,
}

/// Where a system says which of its parallel jobs this is.
struct System {
    index: &'static str,
    /// The number of the first job.
    first: u64,
    /// How many there are, where it says so.
    count: Option<&'static str>,
}

/// The systems, each with the page that documents the variables.
const SYSTEMS: [System; 7] = [
    // https://kubernetes.io/docs/tasks/job/indexed-parallel-processing-static
    System { index: "JOB_COMPLETION_INDEX", first: 0, count: None },
    // https://docs.gitlab.com/ci/variables/predefined_variables
    System { index: "CI_NODE_INDEX", first: 1, count: Some("CI_NODE_TOTAL") },
    // https://circleci.com/docs/variables
    System { index: "CIRCLE_NODE_INDEX", first: 0, count: Some("CIRCLE_NODE_TOTAL") },
    // https://buildkite.com/docs/pipelines/configure/environment-variables
    System {
        index: "BUILDKITE_PARALLEL_JOB",
        first: 0,
        count: Some("BUILDKITE_PARALLEL_JOB_COUNT"),
    },
    // https://learn.microsoft.com/azure/devops/pipelines/build/variables
    System { index: "SYSTEM_JOBPOSITIONINPHASE", first: 1, count: Some("SYSTEM_TOTALJOBSINPHASE") },
    // https://docs.semaphoreci.com/reference/env-vars
    System { index: "SEMAPHORE_JOB_INDEX", first: 1, count: Some("SEMAPHORE_JOB_COUNT") },
    // https://support.atlassian.com/bitbucket-cloud/docs/variables-and-secrets
    System {
        index: "BITBUCKET_PARALLEL_STEP",
        first: 0,
        count: Some("BITBUCKET_PARALLEL_STEP_COUNT"),
    },
];

/// Reads `I/N`, `auto` or `auto/N`.
pub(super) fn shard(text: &str) -> Result<Shard, String> {
    read(text, |name| std::env::var(name).ok())
}

fn read(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Shard, String> {
    if text == "auto" {
        return of_environment(None, variable);
    }
    if let Some(count) = text.strip_prefix("auto/").and_then(units::number).filter(|n| *n > 0) {
        return of_environment(Some(count), variable);
    }
    let parts = text.split_once('/');
    let parts = parts.and_then(|(i, n)| Some((units::number(i)?, units::number(n)?)));
    match parts {
        Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index, count }),
        _ => Err(format!(
            "expected I/N with I from 1 to N, such as 1/4, or auto or auto/N, found \"{text}\""
        )),
    }
}

fn of_environment(
    count: Option<u64>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Shard, String> {
    let found = SYSTEMS.iter().find_map(|system| Some((system, variable(system.index)?)));
    let Some((system, index)) = found else {
        let names: Vec<_> = SYSTEMS.iter().map(|system| system.index).collect();
        return Err(format!("auto: none of {} is set", names.join(", ")));
    };
    let number = |name: &str, text: &str| {
        units::number(text).ok_or_else(|| format!("auto: {name} is \"{text}\", no number"))
    };
    let index = number(system.index, &index)?;
    let said = match system.count.and_then(|name| Some((name, variable(name)?))) {
        Some((name, text)) => Some((name, number(name, &text)?)),
        None => None,
    };
    let count = match (count, said) {
        (Some(count), Some((name, said))) if count != said => {
            return Err(format!("auto/{count}: {name} is {said}"));
        }
        (Some(count), _) | (None, Some((_, count))) => count,
        (None, None) => {
            return Err(format!(
                "auto: {} does not say how many there are: write auto/N",
                system.index
            ));
        }
    };
    let index = (index + 1).checked_sub(system.first).filter(|index| (1..=count).contains(index));
    match index {
        Some(index) => Ok(Shard { index, count }),
        None => Err(format!("auto: {} is out of the {count} that there are", system.index)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str, variables: &[(&str, &str)]) -> Result<(u64, u64), String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(of, _)| *of == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        read(text, variable).map(|shard| (shard.index, shard.count))
    }

    #[test]
    fn what_is_typed() {
        assert_eq!(with("2/3", &[]), Ok((2, 3)));
        for text in ["", "0/3", "4/3", "1", "1/0", "a/2", "auto/0", "auto/x", "1/2/3"] {
            assert!(with(text, &[]).is_err_and(|error| error.contains("I/N")), "{text}");
        }
    }

    #[test]
    fn what_systems_say() {
        assert_eq!(with("auto/16", &[("JOB_COMPLETION_INDEX", "0")]), Ok((1, 16)));
        assert_eq!(with("auto/16", &[("JOB_COMPLETION_INDEX", "15")]), Ok((16, 16)));
        let gitlab = [("CI_NODE_INDEX", "3"), ("CI_NODE_TOTAL", "4")];
        assert_eq!(with("auto", &gitlab), Ok((3, 4)));
        assert_eq!(with("auto/4", &gitlab), Ok((3, 4)));
        let circle = [("CIRCLE_NODE_INDEX", "0"), ("CIRCLE_NODE_TOTAL", "2")];
        assert_eq!(with("auto", &circle), Ok((1, 2)));
        for system in SYSTEMS.iter().filter(|system| system.count.is_some()) {
            let count = system.count.unwrap_or_default();
            let last = (5 - 1 + system.first).to_string();
            assert_eq!(with("auto", &[(system.index, &last), (count, "5")]), Ok((5, 5)));
        }
    }

    #[test]
    fn what_they_do_not_say() {
        let error = |text, variables: &[(&str, &str)]| with(text, variables).expect_err(text);
        assert!(error("auto", &[]).contains("JOB_COMPLETION_INDEX"));
        assert!(error("auto", &[("JOB_COMPLETION_INDEX", "0")]).contains("auto/N"));
        assert!(error("auto/4", &[("JOB_COMPLETION_INDEX", "4")]).contains("out of"));
        assert!(error("auto/4", &[("JOB_COMPLETION_INDEX", "x")]).contains("no number"));
        let gitlab = [("CI_NODE_INDEX", "0"), ("CI_NODE_TOTAL", "4")];
        assert!(error("auto", &gitlab).contains("out of"));
        assert!(error("auto/5", &gitlab).contains("CI_NODE_TOTAL is 4"));
    }
}
