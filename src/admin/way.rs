//! The way to the host that a LUN goes to or comes from: a Unix socket of this host, which is root's alone, or TLS with certificates on both sides.
//!
//! Whoever gets through may have LUNs made, and so is as good as root. Over a Unix socket that is root here (or whoever root's tunnel leads to); over TLS
//! everybody who has a certificate of the CA, which should therefore be one for this alone.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    process::geteuid,
};

use crate::{
    sys::socket,
    tls::{
        self, Session, TlsError,
        duplex::{self, Reading, Writing},
    },
};

/// How long one side waits for the other. The kernel gives the commands of a frozen LUN up after a minute and a half.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a stranger may take to show who it is, since others wait behind it.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// How often who waits for a source looks whether it is to stop.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Where the other side is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket of this host. What goes over it is neither encrypted nor signed.
    Unix(PathBuf),
    /// A host and a port, with TLS.
    Tls {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

const FORMS: &str =
    "give unix:/PATH, or tls://HOST:PORT with certificates; nothing else is encrypted or asks who is there";

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            let absolute = path.is_absolute().then_some(Address::Unix(path));
            return absolute.ok_or_else(|| "the path of a socket is absolute: unix:/PATH".into());
        }
        let rest = text.strip_prefix("tls://").ok_or(FORMS)?;
        let (host, port) = rest.rsplit_once(':').ok_or("there is no port: tls://HOST:PORT")?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let is_host = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c) || bare.is_some() && c == ':';
        let host = bare.unwrap_or(host);
        if host.is_empty() || !host.chars().all(is_host) {
            return Err(format!("'{host}' is no host: tls://HOST:PORT, or tls://[ADDRESS]:PORT with IPv6"));
        }
        let port = port.parse().ok().filter(|p| *p > 0).ok_or_else(|| format!("'{port}' is no port"))?;
        Ok(Address::Tls { host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tls { host, port } if host.contains(':') => write!(f, "tls://[{host}]:{port}"),
            Address::Tls { host, port } => write!(f, "tls://{host}:{port}"),
        }
    }
}

/// The certificates of this side, and who the other one has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates {
    /// Their directory, in QEMU's layout.
    pub dir: PathBuf,
    /// The name that the destination's certificate has, if it is another than the host's.
    pub hostname: Option<String>,
}

impl Certificates {
    /// What goes with an address: TLS needs certificates, and a Unix socket has no use for them.
    ///
    /// # Errors
    /// In words, what is missing or too much.
    pub fn of(
        address: &Address,
        dir: Option<PathBuf>,
        hostname: Option<String>,
    ) -> Result<Option<Certificates>, String> {
        match (address, dir) {
            (Address::Tls { .. }, Some(dir)) if !dir.is_absolute() => {
                Err(format!("'{}' is not an absolute path", dir.display()))
            }
            (Address::Tls { .. }, Some(dir)) => Ok(Some(Certificates { dir, hostname })),
            (Address::Tls { .. }, None) => Err(format!(
                "{address} needs the directory of its certificates; whoever has one of that CA may have LUNs made, so use a CA for handovers alone"
            )),
            (Address::Unix(_), None) if hostname.is_none() => Ok(None),
            (Address::Unix(_), _) => Err(format!("{address} has no TLS, and no certificates")),
        }
    }
}

/// A connection to the other side.
pub enum Connection {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TLS.
    Tls(Box<Reading<TcpStream>>, Writing<TcpStream>),
}

impl Connection {
    fn unix(stream: UnixStream) -> io::Result<Connection> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Connection::Unix(stream))
    }

    fn tls(stream: TcpStream, session: Session) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(INTRODUCTION))?;
        stream.set_write_timeout(Some(INTRODUCTION))?;
        let begun = duplex::begin(session, stream.try_clone()?, stream.try_clone()?, INTRODUCTION);
        let (reading, writing) = begun.map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "it does not begin TLS"),
            _ => e,
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Connection::Tls(Box::new(reading), writing))
    }
}

impl Read for Connection {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Connection::Unix(stream) => stream.read(to),
            Connection::Tls(reading, _) => reading.read(to),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Connection::Unix(stream) => stream.write(from),
            Connection::Tls(_, writing) => writing.write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Connection::Unix(stream) => stream.flush(),
            Connection::Tls(_, writing) => writing.flush(),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Connection::Tls(_, writing) = self {
            // One that is gone needs no goodbye.
            let _ = writing.say_goodbye();
        }
    }
}

fn no_certificates() -> io::Error {
    TlsError::new("there are no certificates for TLS", "give the directory that they lie in").into()
}

fn resolved(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    (host, port).to_socket_addrs().map(Vec::from_iter)
}

impl Address {
    /// Connects; with TLS, to whoever shows a certificate for that host.
    ///
    /// # Errors
    /// The socket's, and a [`TlsError`] in one.
    pub fn connect(&self, with: Option<&Certificates>) -> io::Result<Connection> {
        let (host, port) = match self {
            Address::Unix(path) => return Connection::unix(UnixStream::connect(path)?),
            Address::Tls { host, port } => (host, *port),
        };
        let with = with.ok_or_else(no_certificates)?;
        // Before anybody is bothered.
        let client = tls::Client::read(&with.dir, with.hostname.as_deref().unwrap_or(host))?;
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for at in resolved(host, port)? {
            match TcpStream::connect_timeout(&at, INTRODUCTION) {
                Ok(stream) => return Connection::tls(stream, Session::client(&client)?),
                Err(e) => failed = e,
            }
        }
        Err(failed)
    }

    /// Listens.
    ///
    /// # Errors
    /// The socket's, and what is wrong with the certificates; a socket that is there is not replaced.
    pub fn listen(&self, with: Option<&Certificates>) -> io::Result<Listener> {
        let path = match self {
            Address::Unix(path) => path,
            Address::Tls { host, port } => {
                let dir = with.ok_or_else(no_certificates)?.dir.clone();
                // Read again for each source; what is wrong with them now is better told now.
                tls::Server::read(&dir)?;
                let listener = TcpListener::bind(&resolved(host, *port)?[..])?;
                return Ok(Listener::Tls(listener, dir));
            }
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // What bind makes has no more permissions than this.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        // From here on it goes with the listener, also if that fails.
        let listener = Listener::Unix(UnixListener::from(socket.try_clone()?), path.clone());
        listen(&socket, 4)?;
        Ok(listener)
    }
}

/// Where a destination listens; a Unix socket goes with it.
#[derive(Debug)]
pub enum Listener {
    /// On a Unix socket.
    Unix(UnixListener, PathBuf),
    /// With TLS, and the certificates of that directory.
    Tls(TcpListener, PathBuf),
}

impl Listener {
    /// The next source. Over a Unix socket, one that is not this process's user, or root, is sent away; over TLS, one without a certificate.
    ///
    /// # Errors
    /// The socket's.
    pub fn accept(&self) -> io::Result<Connection> {
        loop {
            if let Some(connection) = self.accept_one()? {
                return Ok(connection);
            }
        }
    }

    /// The same; none, if it is told to stop before one has come.
    ///
    /// # Errors
    /// The socket's.
    pub fn accept_unless(&self, stop: &AtomicBool) -> io::Result<Option<Connection>> {
        while !stop.load(Ordering::Acquire) {
            let fd = match self {
                Listener::Unix(listener, _) => listener.as_fd(),
                Listener::Tls(listener, _) => listener.as_fd(),
            };
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&LOOK)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                done => done?,
            };
            if let Some(connection) = self.accept_one()? {
                return Ok(Some(connection));
            }
        }
        Ok(None)
    }

    /// Whoever comes next; none, if that one is sent away.
    fn accept_one(&self) -> io::Result<Option<Connection>> {
        match self {
            Listener::Unix(listener, _) => {
                let (stream, _) = listener.accept()?;
                let peer = socket::peer(&stream)?;
                if peer.uid == 0 || peer.uid == geteuid().as_raw() {
                    return Connection::unix(stream).map(Some);
                }
                sent_away(&format!("uid {}", peer.uid), "LUNs are handed over by root alone");
            }
            Listener::Tls(listener, dir) => {
                let (stream, from) = listener.accept()?;
                let session = tls::Server::read(dir).and_then(|server| Session::server(&server));
                match session.map_err(io::Error::from).and_then(|s| Connection::tls(stream, s)) {
                    Ok(connection) => return Ok(Some(connection)),
                    Err(e) => sent_away(&from.ip().to_string(), &e.to_string()),
                }
            }
        }
        Ok(None)
    }
}

/// Told where whoever listens sees it, who may wait for a source that never gets in.
fn sent_away(who: &str, why: &str) {
    tracing::warn!(%who, "sent away: {why}");
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            // Gone already, if somebody has removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::certificates::Ca;

    #[test]
    fn an_address_is_a_unix_socket_or_has_tls_and_all_else_is_refused_with_the_way_there() {
        for good in ["unix:/run/a.sock", "tls://b.example.com:7000", "tls://192.0.2.1:1", "tls://[::1]:65535"]
        {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for wrong in ["host:1", "127.0.0.1:1", "/run/a.sock", "tcp://a:1", ""] {
            assert!(wrong.parse::<Address>().unwrap_err().contains("tls://HOST:PORT"), "{wrong}");
        }
        for wrong in ["tls://host", "tls://:1", "tls://a/b:1", "tls://::1:1", "tls://a:0", "tls://a:70000"] {
            wrong.parse::<Address>().unwrap_err();
        }
        assert!("unix:a.sock".parse::<Address>().unwrap_err().contains("absolute"));
    }

    #[test]
    fn tls_needs_certificates_and_a_unix_socket_has_none() {
        let (unix, tls) = ("unix:/run/a.sock".parse().unwrap(), "tls://a:1".parse().unwrap());
        let of = |address: &Address, dir: Option<&str>| {
            Certificates::of(address, dir.map(PathBuf::from), None).map(|c| c.is_some())
        };
        assert_eq!((of(&unix, None), of(&tls, Some("/pki"))), (Ok(false), Ok(true)));
        assert!(of(&tls, None).unwrap_err().contains("a CA for handovers alone"));
        assert!(of(&tls, Some("pki")).unwrap_err().contains("absolute"));
        assert!(of(&unix, Some("/pki")).unwrap_err().contains("no TLS"));
    }

    #[test]
    fn the_socket_is_its_owners_alone_is_not_replaced_and_goes_with_its_listener() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.sock");
        let address = Address::Unix(path.clone());
        let listener = address.listen(None).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(address.listen(None).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let stop = AtomicBool::new(true);
        assert!(listener.accept_unless(&stop).unwrap().is_none(), "told to stop");
        stop.store(false, Ordering::Release);
        let mut here = address.connect(None).unwrap();
        here.write_all(b"a").unwrap();
        let mut there = listener.accept_unless(&stop).unwrap().unwrap();
        assert_eq!(there.read(&mut [0; 4]).unwrap(), 1);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn over_tls_who_has_no_certificate_of_the_ca_is_sent_away_and_the_next_one_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let ours = Ca::new("handovers").directory(&dir.path().join("ours"));
        let theirs = Ca::new("others").directory(&dir.path().join("theirs"));
        let with = |dir: &PathBuf| Certificates { dir: dir.clone(), hostname: None };
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address: Address = format!("tls://127.0.0.1:{port}").parse().unwrap();
        assert!(TlsError::of(&address.listen(None).unwrap_err()).is_some());
        let listener = address.listen(Some(&with(&ours))).unwrap();
        let accepted = std::thread::spawn(move || {
            let mut there = listener.accept().unwrap();
            let mut said = [0; 4];
            there.read_exact(&mut said).unwrap();
            there.write_all(b"heard").unwrap();
            said
        });
        // One in the clear, one that does not believe us, one that we do not believe.
        TcpStream::connect(("127.0.0.1", port)).unwrap().write_all(&[1; 64]).unwrap();
        let e = address.connect(Some(&with(&theirs))).map(drop).unwrap_err();
        assert!(TlsError::of(&e).unwrap().why.contains("the server's certificate is not signed"), "{e}");
        let mixed = dir.path().join("theirs");
        std::fs::write(
            mixed.join("ca-cert.pem"),
            ["ours", "theirs"]
                .map(|d| std::fs::read_to_string(dir.path().join(d).join("ca-cert.pem")).unwrap())
                .concat(),
        )
        .unwrap();
        // With TLS 1.3 it hears of that when it reads.
        let refused = address.connect(Some(&with(&mixed))).and_then(|mut c| c.read(&mut [0; 1]));
        let e = refused.unwrap_err();
        let told = TlsError::of(&e).is_some_and(|e| e.why.contains("does not take our certificate"));
        assert!(told || e.kind() == io::ErrorKind::ConnectionReset, "{e}");
        let elsewhere = Certificates { dir: ours.clone(), hostname: Some("other.example.com".into()) };
        let e = address.connect(Some(&elsewhere)).map(drop).unwrap_err();
        assert!(e.to_string().contains("not for other.example.com"), "{e}");
        let mut here = address.connect(Some(&with(&ours))).unwrap();
        here.write_all(b"LUN?").unwrap();
        let mut answer = [0; 5];
        here.read_exact(&mut answer).unwrap();
        assert_eq!((&answer, accepted.join().unwrap()), (b"heard", *b"LUN?"));
        assert_eq!(here.read(&mut [0; 1]).unwrap(), 0);
    }
}
