//! What clap found wrong, in the form of everything else that fails.

use std::{error::Error, ffi::OsString};

use clap::error::{ContextKind, ContextValue};

use crate::control::client::ClientError;

pub use crate::admin::Refusal as CliError;

/// Why the daemon does not answer.
pub fn from_client(what: &str, value: &str, e: &ClientError) -> CliError {
    let next = match e {
        ClientError::NoDaemon(..) => Some("start it: tcmu-dif daemon (as root, in the foreground)"),
        ClientError::Io(_, e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Some("run it as root: the socket is root's alone")
        }
        _ => None,
    };
    CliError::from(what, value, e).maybe_next(next.map(str::to_owned))
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
        "export",
        "image",
        "pi",
        "scrub",
        "mirror",
        "backup",
        "bitmap",
        "stream",
        "commit",
        "handover",
        "receive",
        "owner",
        "job",
        "top",
        "support-bundle",
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
        "complete",
        "cancel",
        "pause",
        "resume",
        "speed",
    ];
    let chosen: Vec<_> = words.iter().skip(1).take(2).take_while(plain).filter_map(|w| w.to_str()).collect();
    let chosen: Vec<_> = chosen.into_iter().take_while(|w| commands.contains(w)).collect();
    let help = ["tcmu-dif"].into_iter().chain(chosen).chain(["--help"]).collect::<Vec<_>>().join(" ");
    let e = CliError::usage(what, value, reason).then(help);
    // There the status 2 says that the image is corrupt.
    let checks = |w: &[OsString]| w[0] == "image" && (w[1] == "check" || w[1] == "repair");
    if words.windows(2).any(checks) { e.with_status(1) } else { e }
}
