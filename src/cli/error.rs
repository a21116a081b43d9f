//! The one way in which a command fails: what, on which value, why, and what to do next.

use std::{error::Error, ffi::OsString, fmt, process::ExitCode};

use clap::error::{ContextKind, ContextValue};

use crate::lun::chain;

/// A failed command. Printed as `tcmu-dif: WHAT: VALUE: REASON` and a line `  next: STEP`.
#[derive(Debug)]
pub struct CliError {
    /// What was being done, or with what: `create`, `image`, `--size`.
    pub what: String,
    /// The offending value; empty if there is none.
    pub value: String,
    /// Why, the whole chain in one line.
    pub reason: String,
    /// What to do next.
    pub next: Option<String>,
    /// The words on the command line were wrong, and nothing was tried: exit status 2 instead of 1.
    pub usage: bool,
    /// An exit status that stands for something else.
    pub status: Option<u8>,
}

impl CliError {
    /// A failure with a reason in words.
    pub fn new(what: impl Into<String>, value: impl fmt::Display, reason: impl Into<String>) -> CliError {
        CliError {
            what: what.into(),
            value: value.to_string(),
            reason: reason.into(),
            next: None,
            usage: false,
            status: None,
        }
    }

    /// A failure with an error; its sources are told too.
    pub fn from(
        what: impl Into<String>,
        value: impl fmt::Display,
        error: &(dyn Error + 'static),
    ) -> CliError {
        CliError::new(what, value, chain(error))
    }

    /// Wrong words on the command line.
    pub fn usage(what: impl Into<String>, value: impl fmt::Display, reason: impl Into<String>) -> CliError {
        CliError { usage: true, ..CliError::new(what, value, reason) }
    }

    /// With the next step.
    pub fn then(mut self, step: impl Into<String>) -> CliError {
        self.next = Some(step.into());
        self
    }

    /// With the next step, if there is one.
    pub fn maybe_next(mut self, step: Option<String>) -> CliError {
        self.next = step;
        self
    }

    /// With an exit status of its own.
    pub fn with_status(mut self, status: u8) -> CliError {
        self.status = Some(status);
        self
    }

    /// 1, or 2 for wrong words, if it has none of its own.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status.unwrap_or(if self.usage { 2 } else { 1 }))
    }
}

/// What clap found wrong, in our form: the word, its value, why, and where the right words are.
pub fn from_clap(e: &clap::Error, words: &[OsString]) -> CliError {
    let said = |kind| match e.get(kind) {
        Some(ContextValue::String(s)) => Some(s.clone()),
        Some(ContextValue::Strings(s)) => Some(s.join(", ")),
        _ => None,
    };
    let rendered = e.to_string();
    let first = rendered.split("\n\n").next().unwrap_or_default();
    let first = first.trim_start_matches("error: ").split_whitespace().collect::<Vec<_>>().join(" ");
    let reason = e.source().map_or(first, ToString::to_string);
    let arg = said(ContextKind::InvalidArg).or_else(|| said(ContextKind::InvalidSubcommand));
    // `--size <SIZE>` is `--size`, and `<NAME>` stays what it is.
    let what = match (&arg, e.source()) {
        (Some(arg), Some(_)) => arg.split(' ').next().unwrap_or(arg).to_owned(),
        _ => "usage".to_owned(),
    };
    let value = said(ContextKind::InvalidValue).filter(|_| e.source().is_some()).unwrap_or_default();
    let plain =
        |w: &&OsString| w.to_str().is_some_and(|w| w.chars().all(|c| c.is_ascii_lowercase() || c == '-'));
    let commands = [
        "daemon",
        "create",
        "delete",
        "list",
        "show",
        "resize",
        "image",
        "pi",
        "check-host",
        "demo",
        "info",
        "check",
        "repair",
        "map",
        "measure",
        "verify",
        "rebuild",
        "adopt",
        "status",
        "snapshot",
    ];
    let chosen: Vec<_> = words.iter().skip(1).take(2).take_while(plain).filter_map(|w| w.to_str()).collect();
    let chosen: Vec<_> = chosen.into_iter().take_while(|w| commands.contains(w)).collect();
    let help = ["tcmu-dif"].into_iter().chain(chosen).chain(["--help"]).collect::<Vec<_>>().join(" ");
    let e = CliError::usage(what, value, reason).then(help);
    // There the status 2 says that the image is corrupt.
    let checks = |w: &[OsString]| w[0] == "image" && (w[1] == "check" || w[1] == "repair");
    if words.windows(2).any(checks) { e.with_status(1) } else { e }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tcmu-dif: {}: ", self.what)?;
        if !self.value.is_empty() && !self.reason.starts_with(&format!("{}: ", self.value)) {
            write!(f, "{}: ", self.value)?;
        }
        f.write_str(&self.reason)?;
        match &self.next {
            Some(step) => write!(f, "\n  next: {step}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the outer fact")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_message_has_what_value_reason_and_next_step() {
        let e = CliError::new("image", "/a", "no such file").then("create it");
        assert_eq!(e.to_string(), "tcmu-dif: image: /a: no such file\n  next: create it");
        assert_eq!(CliError::new("daemon", "", "gone").to_string(), "tcmu-dif: daemon: gone");
        assert_eq!(CliError::new("image", "/a", "/a: gone").to_string(), "tcmu-dif: image: /a: gone");
    }

    #[test]
    fn the_chain_is_told_once() {
        let e = Outer(std::io::Error::other("the inner fact"));
        assert_eq!(chain(&e), "the outer fact: the inner fact");
    }
}
