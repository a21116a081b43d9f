//! What is set for the daemon as a whole, and what a running one takes up of a change.
//!
//! Where it comes from (command line, file) is the caller's business: [`super::serve`] asks for it anew at SIGHUP, and what
//! differs is applied or, where that cannot be, said in the log. What a LUN is started with is read from [`Shared`] when it is.

use std::{
    fmt, io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    control::{Registry, metrics::http},
    sys::io::Backend,
};

/// Everything that is set for the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What is logged, as a filter of `RUST_LOG`'s kind.
    pub log: String,
    /// The way of I/O; the best that the kernel permits if none is given.
    pub backend: Option<Backend>,
    /// LUNs may look at their rings for a moment before they sleep.
    pub polling: bool,
    /// The directory of the declared LUNs.
    pub luns_d: PathBuf,
    /// Where metrics are served besides their socket.
    pub metrics_at: Option<SocketAddr>,
    /// Memory for a qcow2 image's tables, in bytes, where a LUN has no setting of its own.
    pub cache_size: Option<u64>,
}

/// From when on a change counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    /// It is done with.
    Now,
    /// LUNs that serve go on as they were started.
    LunsThatStart,
}

/// One setting that has become another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// As the file names it.
    word: &'static str,
    /// What it is now.
    value: String,
    from: From,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} from now on", self.word, self.value)?;
        match self.from {
            From::Now => Ok(()),
            From::LunsThatStart => f.write_str(
                " for LUNs that are started; for those that serve it takes effect with the next start",
            ),
        }
    }
}

/// The way of I/O in the file's words.
pub fn backend_word(backend: Option<Backend>) -> &'static str {
    match backend {
        None => "auto",
        Some(Backend::Uring) => "uring",
        Some(Backend::Threads) => "threads",
    }
}

impl Settings {
    /// Every setting by its name in the file, in words; nothing for one that is not set.
    pub fn words(&self) -> [(&'static str, Option<String>); 6] {
        [
            ("log", Some(self.log.clone())),
            ("io", Some(backend_word(self.backend).to_owned())),
            ("polling", Some(self.polling.to_string())),
            ("luns-d", Some(self.luns_d.display().to_string())),
            ("metrics-listen", self.metrics_at.map(|at| at.to_string())),
            ("cache-size", self.cache_size.map(|bytes| bytes.to_string())),
        ]
    }

    /// What is otherwise in `new`.
    fn changes(&self, new: &Settings) -> Vec<Change> {
        let from = |word| match word {
            "io" | "polling" | "cache-size" => From::LunsThatStart,
            _ => From::Now,
        };
        let both = self.words().into_iter().zip(new.words());
        let other = both.filter(|(old, new)| old != new);
        let change = |(_, (word, value)): (_, (&'static str, Option<String>))| Change {
            word,
            value: value.unwrap_or_else(|| "not set".to_owned()),
            from: from(word),
        };
        other.map(change).collect()
    }
}

/// What is set now, for those who need it when they begin something. Clones are one.
#[derive(Debug, Clone)]
pub struct Shared(Arc<Mutex<Settings>>);

impl Shared {
    /// That, until it is changed.
    pub fn new(settings: Settings) -> Shared {
        Shared(Arc::new(Mutex::new(settings)))
    }

    /// As it is now.
    pub fn get(&self) -> Settings {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, settings: Settings) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }
}

/// The settings of a daemon that runs, with what they have opened.
pub(super) struct InForce {
    shared: Shared,
    registry: Registry,
    port: Option<http::Server>,
}

impl InForce {
    /// Opens what they ask for.
    ///
    /// # Errors
    /// The address at which metrics cannot be served, and why.
    pub(super) fn begin(shared: Shared, registry: Registry) -> Result<InForce, (SocketAddr, io::Error)> {
        let mut begun = InForce { shared, registry, port: None };
        begun.port = begun.listen(begun.shared.get().metrics_at)?;
        Ok(begun)
    }

    fn listen(&self, at: Option<SocketAddr>) -> Result<Option<http::Server>, (SocketAddr, io::Error)> {
        at.map(|at| http::Server::tcp(at, self.registry.clone()).map_err(|e| (at, e))).transpose()
    }

    /// Applies what differs, and says what it was. What cannot be had stays as it is, and is tried again the next time.
    pub(super) fn take_up(&mut self, mut new: Settings) -> Vec<Change> {
        let old = self.shared.get();
        if new.metrics_at != old.metrics_at {
            match self.listen(new.metrics_at) {
                // The old one is let go of when the new one is there.
                Ok(port) => self.port = port,
                Err((at, e)) => {
                    tracing::error!("metrics-listen stays as it is: metrics can't be served at {at}: {e}");
                    new.metrics_at = old.metrics_at;
                }
            }
        }
        let changes = old.changes(&new);
        changes.iter().for_each(|change| tracing::info!("{change}"));
        self.shared.set(new);
        changes
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    pub(crate) fn settings() -> Settings {
        Settings {
            log: "info".into(),
            backend: None,
            polling: true,
            luns_d: "/etc/tcmu-dif/luns.d".into(),
            metrics_at: None,
            cache_size: None,
        }
    }

    fn free_port() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    fn serves(at: SocketAddr) -> bool {
        let Ok(mut client) = TcpStream::connect(at) else { return false };
        client.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text.starts_with("HTTP/1.1 200") && text.contains("tcmu_dif_luns")
    }

    #[test]
    fn what_differs_is_told_and_what_luns_were_started_with_stays_until_the_next_start() {
        let old = settings();
        assert_eq!(old.changes(&old), []);
        let new = Settings {
            log: "debug".into(),
            backend: Some(Backend::Threads),
            polling: false,
            luns_d: "/srv/luns".into(),
            cache_size: Some(1 << 20),
            ..settings()
        };
        let told: Vec<String> = old.changes(&new).iter().map(ToString::to_string).collect();
        assert_eq!(told[0], "log is debug from now on");
        assert_eq!(told[3], "luns-d is /srv/luns from now on");
        for (at, begins) in [
            (1, "io is threads from now on for LUNs"),
            (2, "polling is false "),
            (4, "cache-size is 1048576 "),
        ] {
            assert!(told[at].starts_with(begins), "{told:?}");
            assert!(told[at].ends_with("takes effect with the next start"), "{told:?}");
        }
        let back: Vec<String> = new.changes(&old).iter().map(ToString::to_string).collect();
        assert!(back[4].starts_with("cache-size is not set from now on"), "{back:?}");
    }

    #[test]
    fn metrics_move_to_another_port_while_the_daemon_runs_and_stay_where_they_are_if_that_is_taken() {
        let (first, second) = (free_port(), free_port());
        let shared = Shared::new(Settings { metrics_at: Some(first), ..settings() });
        let mut in_force = InForce::begin(shared.clone(), Registry::default()).unwrap();
        assert!(serves(first) && !serves(second));
        assert_eq!(in_force.take_up(Settings { metrics_at: Some(second), ..settings() }).len(), 1);
        assert!(serves(second) && !serves(first));
        assert_eq!(shared.get().metrics_at, Some(second));

        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        // Another setting of the same file counts all the same.
        let both = Settings { metrics_at: Some(at), log: "warn".into(), ..settings() };
        assert_eq!(in_force.take_up(both.clone()).len(), 1);
        assert!(serves(second));
        assert_eq!((shared.get().metrics_at, shared.get().log), (Some(second), "warn".to_owned()));
        drop(taken);
        assert_eq!(in_force.take_up(both).len(), 1);
        assert!(serves(at) && !serves(second));

        in_force.take_up(settings());
        assert!(!serves(at));
        assert_eq!(InForce::begin(shared, Registry::default()).unwrap().take_up(settings()), []);
    }
}
