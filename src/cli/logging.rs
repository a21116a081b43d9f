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
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

use super::CliError;

/// What is logged, while it is.
#[derive(Debug, Clone)]
pub struct Filter(reload::Handle<EnvFilter, Registry>);

impl Filter {
    /// Logs by that filter from now on.
    ///
    /// # Errors
    /// In words: a filter that makes no sense.
    pub fn set(&self, words: &str) -> Result<(), String> {
        self.0.reload(filter(words)?).map_err(|e| e.to_string())
    }
}

/// The levels, as people write them.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// A filter of that name, or as in `RUST_LOG`.
///
/// A word alone is a level or a part of this program. To `RUST_LOG` any other would be somebody's part too, of which alone something is logged: a level that
/// is misspelt would silence us.
///
/// # Errors
/// In words: it makes no sense.
pub fn filter(words: &str) -> Result<EnvFilter, String> {
    let is_level = |word: &str| {
        LEVELS.iter().any(|l| l.eq_ignore_ascii_case(word)) || matches!(word.as_bytes(), [b'0'..=b'5'])
    };
    let is_ours = |target: &str| target == "tcmu_dif" || target.starts_with("tcmu_dif::");
    for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let sound = match word.rsplit_once('=') {
            // A filter for spans is RUST_LOG's business.
            _ if word.contains('[') => true,
            Some((target, level)) => !target.trim().is_empty() && is_level(level.trim()),
            None => is_level(word) || is_ours(word),
        };
        if !sound {
            let levels = LEVELS.join(", ");
            return Err(format!(
                "{word:?} is neither a level ({levels}) nor a part of this program (tcmu_dif::ring) nor such a part with a level (tcmu_dif::ring=debug)"
            ));
        }
    }
    EnvFilter::try_new(words).map_err(|e| e.to_string())
}

/// The words of a filter that makes sense.
///
/// # Errors
/// As [`filter`].
pub fn words(text: &str) -> Result<String, String> {
    filter(text).map(|_| text.to_owned())
}

/// Begins to log what `words` say.
///
/// # Errors
/// A filter that makes no sense.
pub fn begin(words: &str) -> Result<Filter, CliError> {
    let filter = filter(words)
        .map_err(|e| CliError::usage("--log", words, e).then("choose error, warn, info or debug"))?;
    let (filter, handle) = reload::Layer::new(filter);
    // A journal that has gone since is no reason not to log.
    let journal = is_journal(std::env::var_os("JOURNAL_STREAM").as_deref(), io::stderr());
    if let Some(layer) = journal.then(layer).and_then(Result::ok) {
        tracing_subscriber::registry().with(filter).with(layer).init();
        return Ok(Filter(handle));
    }
    let text = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        // no-color.org: set and not empty.
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
        .with_target(false);
    tracing_subscriber::registry().with(filter).with(text).init();
    Ok(Filter(handle))
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
    fn a_level_that_is_misspelt_is_refused_with_those_that_there_are() {
        for good in [
            "",
            "info",
            "WARN",
            "off",
            "2",
            "tcmu_dif",
            "tcmu_dif::ring",
            "info,tcmu_dif::ring=debug",
            "info,zbus=off",
            "tcmu_dif[lun{name=vm1}]=trace,warn",
        ] {
            filter(good).unwrap_or_else(|e| panic!("{good}: {e}"));
        }
        for (bad, word) in [
            ("warnn", "warnn"),
            ("=", "="),
            ("inof,debug", "inof"),
            ("debug,inof", "inof"),
            ("=debug", "=debug"),
            ("tcmu_dif=", "tcmu_dif="),
            ("tcmu_dif::ring=loud", "loud"),
            ("tcmu_difring", "tcmu_difring"),
            ("zbus", "zbus"),
        ] {
            let why = filter(bad).unwrap_err();
            for part in [word, "off, error, warn, info, debug, trace", "tcmu_dif::ring=debug"] {
                assert!(why.contains(part), "{bad:?} does not say {part:?}: {why}");
            }
        }
    }

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
