//! What is set for the daemon as a whole, and what a running one takes up of a change.
//!
//! Where it comes from (command line, file) is the caller's business: [`super::serve`] asks for it anew at SIGHUP, and what
//! differs is applied or, where that cannot be, said in the log. What a LUN is started with is read from [`Shared`] when it is.

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::rundir::RunDir;
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

/// How long after a port for metrics could not be had the next try is.
const PORT_AGAIN: Duration = Duration::from_secs(30);

/// What to do about a port for metrics that cannot be had.
pub fn port_advice(at: SocketAddr, e: &io::Error) -> String {
    if e.kind() == io::ErrorKind::AddrInUse {
        return format!("choose another port, or see who has it: ss -ltnp sport = {}", at.port());
    }
    "permit it in the unit (RestrictAddressFamilies=, IPAddressAllow=): docs/metrics.md".to_owned()
}

/// Whether metrics could be served there. A port that the running daemon serves them at already counts as free.
///
/// # Errors
/// Why they could not.
pub fn try_port(at: SocketAddr, run: &RunDir) -> io::Result<()> {
    match TcpListener::bind(at) {
        Ok(_) => Ok(()),
        Err(e) => {
            let ours = e.kind() == io::ErrorKind::AddrInUse
                && run.daemon().is_ok_and(|pid| pid.is_some())
                && run.metrics_at() == Some(at);
            if ours { Ok(()) } else { Err(e) }
        }
    }
}

/// The settings of a daemon that runs, with what they have opened.
pub(super) struct InForce {
    shared: Shared,
    registry: Registry,
    run: RunDir,
    port: Option<http::Server>,
    /// The address for metrics that is set and cannot be had yet.
    owed: Option<Owed>,
}

/// An address that is tried again now and then.
struct Owed {
    at: SocketAddr,
    /// As it was said; the same is not said twice.
    why: String,
    next: Instant,
}

impl InForce {
    /// Opens what they ask for. A port that cannot be had keeps no LUN from its guests: that is said, and it is tried again by [`InForce::turn`].
    pub(super) fn begin(shared: Shared, registry: Registry, run: RunDir, now: Instant) -> InForce {
        let settings = shared.get();
        let wanted = settings.metrics_at;
        // What is in force is what is served.
        shared.set(Settings { metrics_at: None, ..settings });
        let mut begun = InForce { shared, registry, run, port: None, owed: None };
        begun.note();
        if let Some(at) = wanted {
            match begun.listen(Some(at)) {
                Ok(()) => tracing::info!("metrics are served at {at}"),
                Err((at, e)) => begun.put_off(at, &e, "metrics are not served at an address yet", now),
            }
        }
        begun
    }

    /// Serves metrics there, or at no address, from now on. The old port is let go of when the new one is there.
    fn listen(&mut self, at: Option<SocketAddr>) -> Result<(), (SocketAddr, io::Error)> {
        let port = at.map(|at| http::Server::tcp(at, self.registry.clone()).map_err(|e| (at, e)));
        self.port = port.transpose()?;
        self.owed = None;
        self.shared.set(Settings { metrics_at: at, ..self.shared.get() });
        self.note();
        Ok(())
    }

    /// Leaves word of what is served where, for `daemon --check`.
    fn note(&self) {
        if let Err(e) = self.run.note_metrics_at(self.shared.get().metrics_at) {
            tracing::warn!("the address of the metrics cannot be noted in the run directory: {e}");
        }
    }

    /// Says why an address cannot be had, if it was not said before, and has it tried again later.
    fn put_off(&mut self, at: SocketAddr, e: &io::Error, so: &str, now: Instant) {
        let why = e.to_string();
        if self.owed.as_ref().is_none_or(|owed| owed.at != at || owed.why != why) {
            tracing::error!(
                "metrics-listen: {so}: metrics can't be served at {at}: {why}; tried again every {} s; next: {}",
                PORT_AGAIN.as_secs(),
                port_advice(at, e)
            );
        }
        self.owed = Some(Owed { at, why, next: now + PORT_AGAIN });
    }

    /// To be called whenever the loop turns: tries again what could not be had, when it is time to.
    pub(super) fn turn(&mut self, now: Instant) {
        let Some(at) = self.owed.as_ref().filter(|owed| now >= owed.next).map(|owed| owed.at) else { return };
        match self.listen(Some(at)) {
            Ok(()) => tracing::info!("metrics are served at {at} from now on"),
            Err((at, e)) => self.put_off(at, &e, "as before", now),
        }
    }

    /// Applies what differs, and says what it was. What cannot be had stays as it is, and is tried again by [`InForce::turn`].
    pub(super) fn take_up(&mut self, mut new: Settings, now: Instant) -> Vec<Change> {
        let old = self.shared.get();
        if new.metrics_at == old.metrics_at {
            self.owed = None;
        } else if let Err((at, e)) = self.listen(new.metrics_at) {
            // Who reloads is told, whatever was said before.
            self.owed = None;
            self.put_off(at, &e, "it stays as it is", now);
            new.metrics_at = old.metrics_at;
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

    fn begin(dir: &tempfile::TempDir, shared: &Shared, now: Instant) -> InForce {
        InForce::begin(shared.clone(), Registry::default(), RunDir::at(dir.path()), now)
    }

    #[test]
    fn metrics_move_to_another_port_while_the_daemon_runs_and_stay_where_they_are_if_that_is_taken() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let (first, second) = (free_port(), free_port());
        let shared = Shared::new(Settings { metrics_at: Some(first), ..settings() });
        let mut in_force = begin(&dir, &shared, now);
        assert!(serves(first) && !serves(second));
        assert_eq!(in_force.take_up(Settings { metrics_at: Some(second), ..settings() }, now).len(), 1);
        assert!(serves(second) && !serves(first));
        assert_eq!(shared.get().metrics_at, Some(second));

        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        // Another setting of the same file counts all the same.
        let both = Settings { metrics_at: Some(at), log: "warn".into(), ..settings() };
        assert_eq!(in_force.take_up(both.clone(), now).len(), 1);
        assert!(serves(second));
        assert_eq!((shared.get().metrics_at, shared.get().log), (Some(second), "warn".to_owned()));
        drop(taken);
        assert_eq!(in_force.take_up(both, now).len(), 1);
        assert!(serves(at) && !serves(second));

        in_force.take_up(settings(), now);
        assert!(!serves(at));
        assert_eq!(begin(&dir, &shared, now).take_up(settings(), now), []);
    }

    #[test]
    fn a_port_that_is_taken_keeps_no_daemon_from_beginning_and_is_had_as_soon_as_it_is_free() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let run = RunDir::at(dir.path());
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        let shared = Shared::new(Settings { metrics_at: Some(at), ..settings() });
        let mut in_force = begin(&dir, &shared, now);
        assert_eq!((shared.get().metrics_at, run.metrics_at()), (None, None));
        let said = in_force.owed.as_ref().unwrap().why.clone();
        assert!(said.contains("in use"), "{said}");
        in_force.turn(now + PORT_AGAIN);
        assert_eq!(in_force.owed.as_ref().unwrap().next, now + PORT_AGAIN * 2);
        drop(taken);
        in_force.turn(now + PORT_AGAIN * 2 - Duration::from_millis(1));
        assert!(!serves(at));
        in_force.turn(now + PORT_AGAIN * 2);
        assert!(serves(at) && in_force.owed.is_none());
        assert_eq!((shared.get().metrics_at, run.metrics_at()), (Some(at), Some(at)));
        // Nothing has changed for a reload.
        assert_eq!(in_force.take_up(Settings { metrics_at: Some(at), ..settings() }, now), []);
        assert!(serves(at));

        // After a reload that could not have it: the same, and the old one serves until then.
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = taken.local_addr().unwrap();
        assert_eq!(in_force.take_up(Settings { metrics_at: Some(other), ..settings() }, now), []);
        drop(taken);
        in_force.turn(now + PORT_AGAIN);
        assert!(serves(other) && !serves(at));
        // What is wanted no more is not tried again.
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        in_force.take_up(Settings { metrics_at: Some(taken.local_addr().unwrap()), ..settings() }, now);
        in_force.take_up(Settings { metrics_at: Some(other), ..settings() }, now);
        assert!(in_force.owed.is_none());
    }

    #[test]
    fn a_port_of_the_running_daemon_s_metrics_counts_as_free_and_one_of_anybody_else_s_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path());
        let shared = Shared::new(Settings { metrics_at: Some(free_port()), ..settings() });
        let at = shared.get().metrics_at.unwrap();
        try_port(at, &run).unwrap();
        let in_force = begin(&dir, &shared, Instant::now());
        // An earlier daemon has left the note, and another program has the port.
        assert_eq!(try_port(at, &run).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let _lock = run.lock().unwrap().unwrap();
        try_port(at, &run).unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = taken.local_addr().unwrap();
        let e = try_port(other, &run).unwrap_err();
        assert!(port_advice(other, &e).contains(&other.port().to_string()));
        drop(in_force);
        try_port(at, &run).unwrap();
    }
}
