//! What is set for the daemon: by its command line, or else by `/etc/tcmu-dif/tcmu-dif.toml`, or else by nobody.
//!
//! The file's words are the daemon's options, without the dashes before them. A word that is not known, and a value that makes no sense, is
//! refused with its line; nothing is guessed. It is read when the daemon begins, and again at SIGHUP, when a file that makes no
//! sense leaves everything as it is.

use std::{fs, io, ops::Range, path::PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use toml::Spanned;

use super::{
    CliError, Done,
    args::Cli,
    daemon_args::{Daemon, IoWay},
    listen, logging, output, size,
};
use crate::{
    admin::declared::LUNS_D,
    daemon::{
        rundir::RunDir,
        settings::{Settings, port_advice, try_port},
    },
    sys::io::Backend,
};

/// The usual file.
pub const FILE: &str = "/etc/tcmu-dif/tcmu-dif.toml";

/// What a daemon logs if nobody says what.
const USUAL_LOG: &str = "info";

/// The words of the file, each with its place there.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Words {
    log: Option<Spanned<String>>,
    io: Option<Spanned<String>>,
    polling: Option<bool>,
    luns_d: Option<Spanned<PathBuf>>,
    metrics_listen: Option<Spanned<String>>,
    cache_size: Option<Spanned<Size>>,
}

/// Bytes, or as people write them.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a size: bytes, or as in \"36M\"")]
enum Size {
    Bytes(u64),
    Text(String),
}

/// What a file says.
#[derive(Debug, Default, PartialEq)]
struct Said {
    log: Option<String>,
    io: Option<IoWay>,
    polling: Option<bool>,
    luns_d: Option<PathBuf>,
    metrics_listen: Option<std::net::SocketAddr>,
    cache_size: Option<u64>,
}

/// Where the daemon's settings come from.
#[derive(Debug)]
pub struct Source {
    file: PathBuf,
    /// It was named, so it has to be there.
    named: bool,
    given: Said,
}

/// A setting, for who asks what counts.
#[derive(Debug, Serialize)]
struct Row {
    word: &'static str,
    /// A number for a size, true or false for a switch, a text otherwise; null: not set.
    value: Value,
    /// `command line`, `file`, `default`.
    from: &'static str,
}

impl Source {
    /// As the command line has it.
    pub fn of(cli: &Cli, args: &Daemon) -> Source {
        Source {
            file: args.config.clone().unwrap_or_else(|| FILE.into()),
            named: args.config.is_some(),
            given: Said {
                log: cli.log.clone(),
                io: args.io,
                polling: (args.polling || args.no_polling).then_some(args.polling),
                luns_d: args.luns_d.clone(),
                metrics_listen: args.metrics_listen,
                cache_size: args.cache_size,
            },
        }
    }

    /// What counts now.
    ///
    /// # Errors
    /// A file that cannot be read or makes no sense, with the line.
    pub fn read(&self) -> Result<Settings, CliError> {
        Ok(self.over(self.file()?))
    }

    fn file(&self) -> Result<Said, CliError> {
        let at = self.file.display();
        match fs::read_to_string(&self.file) {
            Ok(text) => parse(&text).map_err(|why| {
                CliError::usage("config", at, why).then(format!(
                    "mend the file; its words are the options of: tcmu-dif daemon --help ({})",
                    self.file.display()
                ))
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !self.named => Ok(Said::default()),
            Err(e) => {
                let why =
                    if e.kind() == io::ErrorKind::NotFound { "no such file".into() } else { e.to_string() };
                Err(CliError::new("config", at, why)
                    .then("name a file that can be read, or none for the defaults"))
            }
        }
    }

    /// The command line over the file over the defaults.
    fn over(&self, file: Said) -> Settings {
        let given = &self.given;
        Settings {
            log: given.log.clone().or(file.log).unwrap_or_else(|| USUAL_LOG.to_owned()),
            backend: match given.io.or(file.io).unwrap_or(IoWay::Auto) {
                IoWay::Auto => None,
                IoWay::Uring => Some(Backend::Uring),
                IoWay::Threads => Some(Backend::Threads),
            },
            polling: given.polling.or(file.polling).unwrap_or(true),
            luns_d: given.luns_d.clone().or(file.luns_d).unwrap_or_else(|| LUNS_D.into()),
            metrics_at: given.metrics_listen.or(file.metrics_listen),
            cache_size: given.cache_size.or(file.cache_size),
        }
    }

    /// Tries what a daemon would only find when it begins or reloads: whether the port for metrics can be had.
    ///
    /// # Errors
    /// That it cannot; and as [`Source::read`].
    pub fn try_out(&self, run: &RunDir) -> Result<(), CliError> {
        let Some(at) = self.read()?.metrics_at else { return Ok(()) };
        try_port(at, run).map_err(|e| {
            CliError::new("metrics-listen", at, format!("metrics can't be served there: {e}"))
                .then(port_advice(at, &e))
        })
    }

    /// Prints what counts, and where it comes from.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn tell(&self, json: bool) -> Done {
        let file = self.file()?;
        let from = |given: bool, file: bool| match (given, file) {
            (true, _) => "command line",
            (false, true) => "file",
            (false, false) => "default",
        };
        let g = &self.given;
        let origins = [
            from(g.log.is_some(), file.log.is_some()),
            from(g.io.is_some(), file.io.is_some()),
            from(g.polling.is_some(), file.polling.is_some()),
            from(g.luns_d.is_some(), file.luns_d.is_some()),
            from(g.metrics_listen.is_some(), file.metrics_listen.is_some()),
            from(g.cache_size.is_some(), file.cache_size.is_some()),
        ];
        let settings = self.over(file);
        let words = settings.words().into_iter().zip(origins);
        if json {
            let typed = |word, text: Option<String>| match word {
                "polling" => settings.polling.into(),
                "cache-size" => settings.cache_size.into(),
                _ => text.into(),
            };
            let row = |((word, text), from)| Row { word, value: typed(word, text), from };
            return output::json(&words.map(row).collect::<Vec<_>>());
        }
        let cells = |((word, text), from): ((&str, Option<String>), &str)| {
            vec![word.to_owned(), text.unwrap_or_else(|| "–".to_owned()), from.to_owned()]
        };
        output::print(&output::table(&["SETTING", "VALUE", "FROM"], words.map(cells)))
    }
}

/// What the file's text says.
fn parse(text: &str) -> Result<Said, String> {
    let line = |span: &Range<usize>| {
        text.as_bytes().iter().take(span.start.min(text.len())).filter(|b| **b == b'\n').count() + 1
    };
    let words: Words = toml::from_str(text).map_err(|e| {
        let reason = e.message().lines().collect::<Vec<_>>().join(": ");
        format!("line {}: {reason}", e.span().map_or(1, |span| line(&span)))
    })?;
    let log = value(words.log, "log", line, |text| match logging::filter(&text) {
        Ok(_) => Ok(text),
        Err(why) => Err(format!("{text:?}: {why}")),
    })?;
    let io = value(words.io, "io", line, |text| {
        IoWay::from_str(&text, false).map_err(|_| format!("{text:?} is none of auto, uring and threads"))
    })?;
    let luns_d = value(words.luns_d, "luns-d", line, |path: PathBuf| {
        // The service's folder is not the administrator's.
        if path.is_absolute() { Ok(path) } else { Err(format!("{} is not an absolute path", path.display())) }
    })?;
    let metrics_listen = value(words.metrics_listen, "metrics-listen", line, |text| listen::loopback(&text))?;
    let cache_size = value(words.cache_size, "cache-size", line, |given| {
        let text = match given {
            Size::Bytes(bytes) => bytes.to_string(),
            Size::Text(text) => text,
        };
        size::parse(&text).map_err(|why| format!("{text:?}: {why}"))
    })?;
    Ok(Said { log, io, polling: words.polling, luns_d, metrics_listen, cache_size })
}

/// A word's value, or what is wrong with it and where.
fn value<T, V>(
    given: Option<Spanned<T>>,
    word: &str,
    line: impl Fn(&Range<usize>) -> usize,
    check: impl Fn(T) -> Result<V, String>,
) -> Result<Option<V>, String> {
    given
        .map(|given| {
            let at = line(&given.span());
            check(given.into_inner()).map_err(|why| format!("line {at}: {word}: {why}"))
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn source(file: &Path) -> Source {
        Source { file: file.to_owned(), named: false, given: Said::default() }
    }

    #[test]
    fn without_a_file_the_defaults_count_and_one_that_was_named_has_to_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let source = source(&dir.path().join("none.toml"));
        let settings = source.read().unwrap();
        assert_eq!((settings.log.as_str(), settings.backend, settings.polling), ("info", None, true));
        assert_eq!((settings.luns_d.as_path(), settings.metrics_at), (Path::new(LUNS_D), None));
        let e = Source { named: true, ..source }.read().unwrap_err();
        assert!(e.reason.contains("none.toml") || e.value.contains("none.toml"), "{e}");
        assert!(e.next.is_some());
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let said =
            parse("log = 'debug'\nio = 'uring'\nluns-d = '/a'\ncache-size = '1M'\npolling = true\n").unwrap();
        let given = Said {
            io: Some(IoWay::Threads),
            polling: Some(false),
            luns_d: Some("/b".into()),
            ..Said::default()
        };
        let settings = Source { file: PathBuf::new(), named: false, given }.over(said);
        assert_eq!((settings.log.as_str(), settings.backend), ("debug", Some(Backend::Threads)));
        assert_eq!((settings.polling, settings.cache_size), (false, Some(1 << 20)));
        assert_eq!(settings.luns_d, Path::new("/b"));
    }

    #[test]
    fn what_makes_no_sense_is_named_with_its_line_and_the_words_that_there_are() {
        for (text, parts) in [
            (
                "log = 'info'\n\ncolour = 'red'\n",
                &["line 3", "colour", "`log`, `io`, `polling`, `luns-d`"][..],
            ),
            ("io = 'fast'", &["line 1", "io", "fast", "auto, uring and threads"]),
            ("\nio = 1", &["line 2", "string"]),
            ("polling = 'yes'", &["line 1", "boolean"]),
            ("luns-d = 'luns'", &["line 1", "luns-d", "absolute"]),
            ("# a\n# b\nmetrics-listen = '0.0.0.0:9'", &["line 3", "metrics-listen", "reached by others"]),
            ("cache-size = '1X'", &["line 1", "cache-size", "1X"]),
            ("cache-size = 0", &["line 1", "cache-size"]),
            ("cache-size = true", &["line 1", "a size"]),
            ("log = '='", &["line 1", "log", "="]),
            ("log = 'info'\nlog = 'warn'\n", &["line 2", "duplicate"]),
            ("log = ", &["line 1"]),
        ] {
            let why = parse(text).unwrap_err();
            for part in parts {
                assert!(why.contains(part), "{text:?} does not say {part:?}: {why}");
            }
        }
    }

    #[test]
    fn the_packaged_file_says_nothing_and_without_its_comment_signs_all_words_with_their_defaults() {
        let text = include_str!("../../dist/tcmu-dif.toml");
        assert_eq!(parse(text).unwrap(), Said::default());
        let set =
            |line: &str| line.starts_with('#') && line.chars().nth(1).is_some_and(|c| c.is_ascii_lowercase());
        let bare: String = text
            .lines()
            .map(|line| if set(line) { format!("{}\n", &line[1..]) } else { format!("{line}\n") })
            .collect();
        let said = parse(&bare).unwrap();
        let (with, without) = (source(Path::new("")).over(said), source(Path::new("")).over(Said::default()));
        for ((word, value), (_, default)) in with.words().into_iter().zip(without.words()) {
            assert!(value.is_some(), "{word} is not in the file");
            assert!(
                default.is_none() || value == default,
                "{word}: {value:?} is not the default {default:?}"
            );
        }
        assert_eq!(with.cache_size, Some(crate::image::qcow2::CACHE_SIZE));
        assert!(text.lines().all(|l| l.is_empty() || l.starts_with('#')), "something is set");
    }
}
