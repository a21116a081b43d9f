//! A door that clients come through: a thread that accepts, a thread for each client, and no more of these than were permitted.
//!
//! For every socket of the daemon. Clients can be slow, silent or hostile: whoever serves them sets a limit to what may take how long;
//! a client too many, and one who may not ask, is sent away by the thread that accepts.

use std::{
    io::{self, Read, Write},
    marker::PhantomData,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    process::geteuid,
};

use super::access;
use crate::{files, sys::socket};

/// A client.
pub(super) trait Connection: Read + Write + Send + Sized + 'static {
    /// How long the next read may take.
    fn read_within(&self, limit: Duration) -> io::Result<()>;
    /// How long the next write may take.
    fn write_within(&self, limit: Duration) -> io::Result<()>;
    /// Nothing more is written.
    fn end_writing(&self) -> io::Result<()>;
}

macro_rules! connection {
    ($stream:ty) => {
        impl Connection for $stream {
            fn read_within(&self, limit: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(limit))
            }

            fn write_within(&self, limit: Duration) -> io::Result<()> {
                self.set_write_timeout(Some(limit))
            }

            fn end_writing(&self) -> io::Result<()> {
                self.shutdown(Shutdown::Write)
            }
        }
    };
}

connection!(UnixStream);
connection!(TcpStream);

/// What is left until then, and an error if that is nothing: a limit of zero would be none.
pub(super) fn left_until(end: Instant) -> io::Result<Duration> {
    match end.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// Writes all of it, however slowly the client takes it, until then.
pub(super) fn write_until(to: &mut impl Connection, mut bytes: &[u8], end: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        to.write_within(left_until(end)?)?;
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// How clients that come by such a connection are served.
pub(super) trait Service<C: Connection>: Send + Sync + 'static {
    /// The threads' name, and the log's.
    const NAME: &'static str;
    /// Clients at a time.
    const MAX_CLIENTS: usize;

    /// Serves a client to its end, on the client's own thread.
    fn serve(&self, client: &mut C) -> io::Result<()>;
    /// Tells a client that it is not served, in these words. May not wait.
    fn refuse(&self, client: &mut C, busy: bool, words: &str);
}

/// Where it is.
#[derive(Debug)]
enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// Open for as long as it lives.
#[derive(Debug)]
pub(super) struct Door {
    place: Place,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    /// A Unix socket at that path, with that mode. Something that stands there is taken for what an earlier daemon left. Who comes
    /// is looked at once more ([`access`]).
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn unix(path: &Path, mode: u32, service: impl Service<UnixStream>) -> io::Result<Door> {
        files::remove(path)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Before it has a name: there is no moment at which another could connect. The umask may take the group's bits.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        listen(&socket, 16)?;
        let listener = UnixListener::from(socket);
        let checked = path.to_owned();
        let may_come = move |stream: &UnixStream| {
            let peer = socket::peer(stream).map_err(|e| format!("nobody knows who asks: {e}"))?;
            let socket =
                std::fs::symlink_metadata(&checked).map_err(|e| format!("the socket is gone: {e}"))?;
            access::check(&peer, geteuid().as_raw(), &socket)
        };
        let accept = move || listener.accept().map(|(stream, _)| stream);
        Door::open(Place::Unix(path.to_owned()), accept, may_come, service)
    }

    /// A TCP port.
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn tcp(address: SocketAddr, service: impl Service<TcpStream>) -> io::Result<Door> {
        let listener = TcpListener::bind(address)?;
        let place = Place::Tcp(listener.local_addr()?);
        let accept = move || listener.accept().map(|(stream, _)| stream);
        Door::open(place, accept, |_: &TcpStream| Ok(()), service)
    }

    /// The port, if it is one.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        match self.place {
            Place::Unix(_) => None,
            Place::Tcp(address) => Some(address),
        }
    }

    fn open<C: Connection, S: Service<C>>(
        place: Place,
        accept: impl Fn() -> io::Result<C> + Send + 'static,
        may_come: impl Fn(&C) -> Result<(), String> + Send + 'static,
        service: S,
    ) -> io::Result<Door> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let reception = Reception { service: Arc::new(service), inside: Arc::default(), by: PhantomData };
        let run = move || {
            loop {
                let client = accept();
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                match client {
                    Ok(client) => reception.admit(client, &may_come),
                    Err(e) => {
                        // Out of descriptors, most likely: they come back.
                        tracing::warn!("{}: {e}", S::NAME);
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name(S::NAME.to_owned()).spawn(run)?;
        Ok(Door { place, stop, thread: Some(thread) })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let woken = match &self.place {
            Place::Unix(path) => UnixStream::connect(path).is_ok(),
            Place::Tcp(address) => TcpStream::connect(address).is_ok(),
        };
        if woken && let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Place::Unix(path) = &self.place {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Counts somebody for as long as it lives.
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counted {
    /// One more; and how many there were before.
    pub(super) fn more(all: &Arc<AtomicUsize>) -> (usize, Counted) {
        let before = all.fetch_add(1, Ordering::AcqRel);
        (before, Counted(all.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Reception<C, S> {
    service: Arc<S>,
    inside: Arc<AtomicUsize>,
    by: PhantomData<fn(C)>,
}

impl<C: Connection, S: Service<C>> Reception<C, S> {
    fn admit(&self, mut client: C, may_come: &impl Fn(&C) -> Result<(), String>) {
        let (before, inside) = Counted::more(&self.inside);
        if let Err(words) = may_come(&client) {
            tracing::warn!("{}: refused: {words}", S::NAME);
            return self.send_away(&mut client, false, &words);
        }
        if before >= S::MAX_CLIENTS {
            let words = format!("{} clients are connected, and there can be no more", S::MAX_CLIENTS);
            return self.send_away(&mut client, true, &words);
        }
        let service = self.service.clone();
        let spawned = std::thread::Builder::new().name(S::NAME.to_owned()).spawn(move || {
            let _inside = inside;
            if let Err(e) = service.serve(&mut client) {
                tracing::debug!("{}: a client is gone: {e}", S::NAME);
            }
        });
        if let Err(e) = spawned {
            tracing::warn!("{}: no thread for a client: {e}", S::NAME);
        }
    }

    fn send_away(&self, client: &mut C, busy: bool, words: &str) {
        // A line fits into the socket's own buffer.
        if client.write_within(Duration::from_millis(100)).is_ok() {
            self.service.refuse(client, busy, words);
        }
    }
}
