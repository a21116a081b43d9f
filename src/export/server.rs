//! The socket that clients come through: a thread that accepts, and a thread for each client with those that work for it.

use std::{
    fs, io,
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::AsFd,
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, Weak},
    thread::JoinHandle,
    time::Duration,
};

use rustix::{
    fs::{Mode, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};

use super::{Address, Shared, connection};
use crate::tls::TlsError;

/// How long a client may take for one message of the handshake, and to take a reply.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A client's end of a connection.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

macro_rules! either {
    ($self:expr, $s:ident => $call:expr) => {
        match $self {
            Socket::Unix($s) => $call,
            Socket::Tcp($s) => $call,
        }
    };
}

impl Socket {
    pub fn try_clone(&self) -> io::Result<Socket> {
        match self {
            Socket::Unix(s) => s.try_clone().map(Socket::Unix),
            Socket::Tcp(s) => s.try_clone().map(Socket::Tcp),
        }
    }

    /// How long the next read may take; for ever, if nothing is said.
    pub fn read_within(&self, limit: Option<Duration>) -> io::Result<()> {
        either!(self, s => s.set_read_timeout(limit))
    }

    /// How long the next write may take.
    pub fn write_within(&self, limit: Option<Duration>) -> io::Result<()> {
        either!(self, s => s.set_write_timeout(limit))
    }

    /// Ends it for both sides.
    pub fn end(&self) {
        // One that is gone need not be ended.
        let _ = either!(self, s => s.shutdown(Shutdown::Both));
    }
}

impl io::Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        either!(self, s => s.read(buf))
    }
}

impl io::Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        either!(self, s => s.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        either!(self, s => s.flush())
    }
}

/// Those who are connected: by a number, the export they use, and a way to end them.
#[derive(Default)]
pub(super) struct Clients(Mutex<ClientsInner>);

#[derive(Default)]
struct ClientsInner {
    next: u64,
    all: Vec<(u64, Option<String>, Socket)>,
}

impl Clients {
    fn with<T>(&self, f: impl FnOnce(&mut ClientsInner) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One has come, if there is room.
    fn enter(&self, most: usize, socket: Socket) -> Option<u64> {
        self.with(|inner| {
            if inner.all.len() >= most {
                return None;
            }
            inner.next += 1;
            inner.all.push((inner.next, None, socket));
            Some(inner.next)
        })
    }

    /// It uses that export.
    pub fn uses(&self, client: u64, export: &str) {
        self.with(|inner| {
            inner
                .all
                .iter_mut()
                .filter(|(n, ..)| *n == client)
                .for_each(|(_, of, _)| *of = Some(export.to_owned()));
        });
    }

    fn leave(&self, client: u64) {
        self.with(|inner| inner.all.retain(|(n, ..)| *n != client));
    }

    /// How many use an export.
    pub fn of(&self, export: &str) -> usize {
        self.with(|inner| inner.all.iter().filter(|(_, of, _)| of.as_deref() == Some(export)).count())
    }

    /// Ends those whose export is one of these; those who have chosen none yet have `None`.
    pub fn hang_up(&self, whose: impl Fn(Option<&str>) -> bool) {
        self.with(|inner| {
            let ended = inner.all.iter().filter(|(_, of, _)| whose(of.as_deref()));
            ended.for_each(|(.., socket)| socket.end());
        });
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix(l) => l.accept().map(|(s, _)| Socket::Unix(s)),
            Listener::Tcp(l) => {
                let (socket, _) = l.accept()?;
                socket.set_nodelay(true)?;
                Ok(Socket::Tcp(socket))
            }
        }
    }

    fn try_clone(&self) -> io::Result<Listener> {
        match self {
            Listener::Unix(l) => l.try_clone().map(Listener::Unix),
            Listener::Tcp(l) => l.try_clone().map(Listener::Tcp),
        }
    }

    /// Nobody is accepted any more, and who waits to accept is woken (shutdown(2) on a listening socket, as Linux has it).
    fn end(&self) {
        let fd = match self {
            Listener::Unix(l) => l.as_fd(),
            Listener::Tcp(l) => l.as_fd(),
        };
        let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
    }
}

/// Listens for as long as it lives.
pub(super) struct Server {
    address: Address,
    tls: bool,
    listener: Listener,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens; each client's certificates are looked at with those of the directory, if there is one.
    pub fn listen(
        address: Address,
        most: usize,
        certificates: Option<PathBuf>,
        shared: Weak<Shared>,
    ) -> io::Result<Server> {
        let tls = certificates.is_some();
        let (listener, address) = match address {
            Address::Unix(path) => (Listener::Unix(unix(&path)?), Address::Unix(path)),
            Address::Inet(at) => {
                let listener = TcpListener::bind(at)?;
                let at = listener.local_addr()?;
                (Listener::Tcp(listener), Address::Inet(at))
            }
        };
        let accepting = listener.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("nbd".into())
            .spawn(move || accept(&accepting, most, certificates.as_deref(), &shared))?;
        Ok(Server { address, tls, listener, thread: Some(thread) })
    }

    /// Clients without TLS are not served.
    pub fn has_tls(&self) -> bool {
        self.tls
    }

    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.listener.end();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
        if let Address::Unix(path) = &self.address {
            let _ = fs::remove_file(path);
        }
    }
}

/// A socket that its owner alone may use. One that a server left behind that is gone is replaced; anything else in its place is an error.
fn unix(path: &Path) -> io::Result<UnixListener> {
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket's path is not absolute"));
    }
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    {
        fs::remove_file(path)?;
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // What bind makes has no more permissions than this.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 16)?;
    Ok(UnixListener::from(socket))
}

fn accept(listener: &Listener, most: usize, certificates: Option<&Path>, shared: &Weak<Shared>) {
    loop {
        let socket = match listener.accept() {
            Ok(socket) => socket,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {
                continue;
            }
            // The listener has ended.
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => return,
            Err(error) => {
                tracing::warn!(%error, "an NBD client could not come in");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(shared) = shared.upgrade() else { return };
        let Ok(own) = socket.try_clone() else { continue };
        let Some(client) = shared.clients.enter(most, own) else {
            tracing::warn!(most, "an NBD client too many is sent away");
            socket.end();
            continue;
        };
        let (serving, certificates) = (shared.clone(), certificates.map(Path::to_owned));
        let thread = std::thread::Builder::new().name("nbd-client".into()).spawn(move || {
            let served = connection::serve(&serving, client, &socket, certificates.as_deref());
            socket.end();
            serving.clients.leave(client);
            match served.as_ref().map_err(|e| (e, TlsError::of(e))) {
                // It had come as far as to show who it is.
                Err((_, Some(e))) => tracing::warn!("an NBD client is sent away: {}", e.in_one_line()),
                Err((e, None)) => tracing::debug!("an NBD client is gone: {e}"),
                Ok(()) => {}
            }
        });
        if let Err(error) = thread {
            tracing::warn!(%error, "an NBD client cannot be served");
            shared.clients.leave(client);
        }
    }
}
