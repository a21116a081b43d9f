//! Where log lines go: to the journal with a field for each fact, if standard error is the journal's, and to standard
//! error as text otherwise.
//!
//! In the journal the facts have their own names: `LUN=vm1`, `LBA=2048`, `SENSE=…`, so that `journalctl LUN=vm1` finds all that
//! concerns one LUN.

use std::{
    ffi::OsStr,
    io::{self, IsTerminal},
    os::fd::AsFd,
};

use tracing_journald::{Layer, Priority, PriorityMappings};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

use super::{CliError, args::Cli};

/// Begins to log, `usual` unless the command line says what.
///
/// # Errors
/// A filter that makes no sense.
pub fn begin(cli: &Cli, usual: &str) -> Result<(), CliError> {
    let words = cli.log.as_deref().unwrap_or(usual);
    let filter = EnvFilter::try_new(words).map_err(|e| {
        CliError::usage("--log", words, e.to_string()).then("choose error, warn, info or debug")
    })?;
    // A journal that has gone since is no reason not to log.
    let journal = is_journal(std::env::var_os("JOURNAL_STREAM").as_deref(), io::stderr());
    if let Some(layer) = journal.then(layer).and_then(Result::ok) {
        tracing_subscriber::registry().with(filter).with(layer).init();
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}

/// The journal, with fields that have no prefix, and priorities as syslog(3) names them.
fn layer() -> io::Result<Layer> {
    let priorities =
        PriorityMappings { info: Priority::Informational, debug: Priority::Debug, ..PriorityMappings::new() };
    Ok(Layer::new()?
        .with_field_prefix(None)
        .with_priority_mappings(priorities)
        .with_syslog_identifier("tcmu-dif".to_owned()))
}

/// Whether that descriptor is the one that `JOURNAL_STREAM` (`DEVICE:INODE`, systemd.exec(5)) tells of. A program that was started
/// by a service, with its output sent elsewhere, inherits the variable and not the stream.
fn is_journal(stream: Option<&OsStr>, fd: impl AsFd) -> bool {
    let numbers = stream.and_then(OsStr::to_str).and_then(|s| s.split_once(':'));
    let Some((Ok(device), Ok(inode))) = numbers.map(|(d, i)| (d.parse::<u64>(), i.parse::<u64>())) else {
        return false;
    };
    rustix::fs::fstat(fd).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (device, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_stream_that_the_variable_names_is_the_journal() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let stat = rustix::fs::fstat(&a).unwrap();
        let stream = format!("{}:{}", stat.st_dev, stat.st_ino);
        assert!(is_journal(Some(OsStr::new(&stream)), &a));
        assert!(!is_journal(Some(OsStr::new(&stream)), &b));
        for odd in
            ["", ":", "1", "x:y", &format!("{stream}:"), &format!("{}:{}", stat.st_dev + 1, stat.st_ino)]
        {
            assert!(!is_journal(Some(OsStr::new(odd)), &a), "{odd}");
        }
        assert!(!is_journal(None, &a));
    }
}
