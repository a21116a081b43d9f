//! The one way in which what an administrator asks for fails: what, on which value, why, and what to do next.

use std::{error::Error, fmt, process::ExitCode};

use crate::lun::chain;

/// A request that failed or was refused. Printed as `tcmu-dif: WHAT: VALUE: REASON` and a line `  next: STEP`.
#[derive(Debug, Clone)]
pub struct Refusal {
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

impl Refusal {
    /// A failure with a reason in words.
    pub fn new(what: impl Into<String>, value: impl fmt::Display, reason: impl Into<String>) -> Refusal {
        Refusal {
            what: what.into(),
            value: value.to_string(),
            reason: reason.into(),
            next: None,
            usage: false,
            status: None,
        }
    }

    /// A failure with an error; its sources are told too.
    pub fn from(what: impl Into<String>, value: impl fmt::Display, error: &(dyn Error + 'static)) -> Refusal {
        Refusal::new(what, value, chain(error))
    }

    /// Wrong words on the command line.
    pub fn usage(what: impl Into<String>, value: impl fmt::Display, reason: impl Into<String>) -> Refusal {
        Refusal { usage: true, ..Refusal::new(what, value, reason) }
    }

    /// With the next step.
    pub fn then(mut self, step: impl Into<String>) -> Refusal {
        self.next = Some(step.into());
        self
    }

    /// With the next step, if there is one.
    pub fn maybe_next(mut self, step: Option<String>) -> Refusal {
        self.next = step;
        self
    }

    /// With an exit status of its own.
    pub fn with_status(mut self, status: u8) -> Refusal {
        self.status = Some(status);
        self
    }

    /// In one line, without the command line's name before it: for those who ask over a socket.
    pub fn in_one_line(&self) -> String {
        let text = self.to_string().replacen("\n  next: ", "; next: ", 1);
        text.strip_prefix("tcmu-dif: ").map_or(text.clone(), str::to_owned)
    }

    /// 1, or 2 for wrong words, if it has none of its own.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status.unwrap_or(if self.usage { 2 } else { 1 }))
    }
}

impl fmt::Display for Refusal {
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
        let e = Refusal::new("image", "/a", "no such file").then("create it");
        assert_eq!(e.to_string(), "tcmu-dif: image: /a: no such file\n  next: create it");
        assert_eq!(e.in_one_line(), "image: /a: no such file; next: create it");
        assert_eq!(Refusal::new("daemon", "", "gone").to_string(), "tcmu-dif: daemon: gone");
        assert_eq!(Refusal::new("image", "/a", "/a: gone").to_string(), "tcmu-dif: image: /a: gone");
    }

    #[test]
    fn the_chain_is_told_once() {
        let e = Outer(std::io::Error::other("the inner fact"));
        assert_eq!(chain(&e), "the outer fact: the inner fact");
    }
}
