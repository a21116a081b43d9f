//! What libiscsi's `iscsi-test-cu -V` prints, and what of it is expected to fail or be skipped.
//!
//! The suite counts a skipped test as passed, so its log is read test by test. The expectations are a file with
//! a line for each test that may fail or be skipped, and the reason; every difference in either direction is reported.

use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// How a test of the suite ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed,
    /// At least a part of it was left out.
    Skipped,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::Failed => "fail",
            Self::Skipped => "skip",
        }
    }
}

/// A test's outcome, and the lines that say why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub outcome: Outcome,
    pub why: Vec<String>,
}

/// Reads the suite's log: `Family.Test` to how it ended. A log that stops early, or whose sum is another, is an error.
pub fn parse(log: &str) -> Result<BTreeMap<String, Ended>> {
    let mut ended = BTreeMap::new();
    let mut suite = String::new();
    let mut open: Option<(String, Vec<String>)> = None;
    let mut ran = None;
    for line in log.lines() {
        let trimmed = line.trim();
        if let Some(name) = line.strip_prefix("Suite: ") {
            suite = name.trim().to_owned();
            continue;
        }
        let mut rest = trimmed;
        if let Some(named) = trimmed.strip_prefix("Test: ") {
            let (name, after) = named.split_once(" ...").unwrap_or((named, ""));
            if let Some((unended, _)) = open.replace((format!("{suite}.{}", name.trim()), Vec::new())) {
                bail!("{unended} did not end");
            }
            rest = after.trim();
        }
        if let Some(sums) = trimmed.strip_prefix("tests ") {
            ran = sums.split_whitespace().nth(1).and_then(|word| word.parse::<usize>().ok());
        }
        let Some((_, why)) = &mut open else {
            continue;
        };
        match rest {
            "passed" | "FAILED" => {
                let Some((name, why)) = open.take() else {
                    continue;
                };
                let skipped = why.iter().any(|line| line.starts_with("[SKIPPED]"));
                let outcome = match (rest, skipped) {
                    ("FAILED", _) => Outcome::Failed,
                    (_, true) => Outcome::Skipped,
                    (_, false) => Outcome::Passed,
                };
                ended.insert(name, Ended { outcome, why });
            }
            _ if (rest.starts_with("[SKIPPED]") || rest.starts_with("[FAILED]"))
                && !why.iter().any(|known| known == rest) =>
            {
                why.push(rest.to_owned());
            }
            _ => {}
        }
    }
    if let Some((name, _)) = open {
        bail!("{name} did not end");
    }
    match ran {
        Some(ran) if ran == ended.len() => Ok(ended),
        Some(ran) => bail!("the suite says it ran {ran} tests, its log shows {}", ended.len()),
        None => bail!("the suite did not come to its end"),
    }
}

/// A line of the expectations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub outcome: Outcome,
    pub reason: String,
}

/// Reads expectations: lines `fail Family.Test: reason` or `skip Family.Test: reason`; `#` begins a comment line.
pub fn expectations(text: &str) -> Result<BTreeMap<String, Expected>> {
    let mut expected = BTreeMap::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parts = line.split_once(' ').and_then(|(word, rest)| Some((word, rest.split_once(": ")?)));
        let (outcome, name, reason) = match parts {
            Some(("fail", (name, reason))) => (Outcome::Failed, name, reason),
            Some(("skip", (name, reason))) => (Outcome::Skipped, name, reason),
            _ => bail!("not `fail|skip Family.Test: reason`: {line:?}"),
        };
        let known = expected.insert(name.to_owned(), Expected { outcome, reason: reason.trim().to_owned() });
        if known.is_some() || reason.trim().is_empty() {
            bail!("{name} stands there twice, or without a reason");
        }
    }
    Ok(expected)
}

/// Every difference between what happened and what was expected; empty if there is none.
pub fn differences(happened: &BTreeMap<String, Ended>, expected: &BTreeMap<String, Expected>) -> String {
    let mut text = String::new();
    for (name, ended) in happened {
        let wanted = expected.get(name).map_or(Outcome::Passed, |e| e.outcome);
        if ended.outcome == wanted {
            continue;
        }
        let _ = writeln!(text, "- {} {name}\n+ {} {name}", wanted.word(), ended.outcome.word());
        for why in ended.why.iter().take(6) {
            let _ = writeln!(text, "      {why}");
        }
    }
    for name in expected.keys().filter(|name| !happened.contains_key(*name)) {
        let _ = writeln!(text, "- {name}\n+ (the suite has no such test)");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
Suite: Read10
  Test: Simple ...
    Test READ10 of 1-256 blocks
    [OK] READ10 returned SUCCESS
passed
  Test: Async ...    [SKIPPED] Not now. Skipping test
passed
Suite: Verify10
  Test: Mismatch ...
    [FAILED] VERIFY10 returned SUCCESS
    [FAILED] VERIFY10 returned SUCCESS
FAILED
    1. verify.c:10  - ret == 0
  Test: Quiet ...passed

Run Summary:    Type  Total    Ran Passed Failed Inactive
              suites      2      2    n/a      0        0
               tests      4      4      3      1        0
";

    #[test]
    fn passed_failed_and_skipped_tests_are_told_apart() {
        let ended = parse(LOG).unwrap();
        let outcome = |name: &str| ended[name].outcome;
        assert_eq!(outcome("Read10.Simple"), Outcome::Passed);
        assert_eq!(outcome("Read10.Async"), Outcome::Skipped);
        assert_eq!(outcome("Verify10.Mismatch"), Outcome::Failed);
        assert_eq!(outcome("Verify10.Quiet"), Outcome::Passed);
        assert_eq!(ended["Verify10.Mismatch"].why.len(), 1);
    }

    #[test]
    fn a_suite_that_died_half_way_is_an_error() {
        assert!(parse(&LOG[..LOG.find("Run Summary").unwrap()]).is_err());
        assert!(parse(&LOG[..LOG.find("FAILED\n").unwrap()]).is_err());
        assert!(parse(&LOG.replace("tests      4      4", "tests      5      5")).is_err());
    }

    #[test]
    fn a_new_failure_a_new_skip_and_an_unexpected_pass_are_differences() {
        let ended = parse(LOG).unwrap();
        let right = "# why\nskip Read10.Async: needs a second path\nfail Verify10.Mismatch: the kernel's\n";
        assert_eq!(differences(&ended, &expectations(right).unwrap()), "");
        let new_failure = expectations("skip Read10.Async: x\n").unwrap();
        assert!(differences(&ended, &new_failure).contains("+ fail Verify10.Mismatch"));
        let new_skip = expectations("fail Verify10.Mismatch: x\n").unwrap();
        assert!(differences(&ended, &new_skip).contains("+ skip Read10.Async"));
        let mended = expectations(&format!("{right}fail Read10.Simple: x\n")).unwrap();
        assert!(differences(&ended, &mended).contains("+ pass Read10.Simple"));
        let renamed = expectations(&format!("{right}fail Gone.Test: x\n")).unwrap();
        assert!(differences(&ended, &renamed).contains("no such test"));
    }

    #[test]
    fn an_expectation_needs_a_reason_and_stands_once() {
        assert!(expectations("fail A.B\n").is_err());
        assert!(expectations("fail A.B: \n").is_err());
        assert!(expectations("fail A.B: x\nskip A.B: y\n").is_err());
        assert!(expectations("maybe A.B: x\n").is_err());
    }

    #[test]
    fn the_checked_in_expectations_can_be_read() {
        for text in [
            include_str!("../../../expect/iscsi-test-cu-512.txt"),
            include_str!("../../../expect/iscsi-test-cu-4096.txt"),
        ] {
            assert!(expectations(text).is_ok());
        }
    }
}
