//! TLS over a socket that blocks, with reading and writing apart: one thread may wait for what comes while another sends.

use std::{
    io::{self, Read, Write},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{Session, TlsError};

/// Bytes that are received at once, and plain bytes that are encrypted at once.
const PART: usize = 64 << 10;

struct Shared<S> {
    session: Mutex<Session>,
    out: Mutex<S>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Write> Shared<S> {
    /// Sends what waits, with what is encrypted first. Who has the socket's lock is alone in taking encrypted bytes out, so their order is kept; and nobody
    /// waits for a socket with the session's lock.
    fn send(&self, plain: &[u8]) -> io::Result<()> {
        let mut out = lock(&self.out);
        let mut parts = plain.chunks(PART);
        loop {
            let part = parts.next();
            let mut bytes = Vec::new();
            {
                let mut session = lock(&self.session);
                if let Some(part) = part {
                    session.encrypt(part)?;
                }
                while session.has_to_write() {
                    session.write_to(&mut bytes)?;
                }
            }
            out.write_all(&bytes)?;
            if part.is_none() {
                return out.flush();
            }
        }
    }
}

/// What comes.
pub struct Reading<S> {
    shared: Arc<Shared<S>>,
    socket: S,
    raw: Vec<u8>,
    unread: Range<usize>,
}

/// What goes. Clones are the same.
pub struct Writing<S>(Arc<Shared<S>>);

impl<S> Clone for Writing<S> {
    fn clone(&self) -> Writing<S> {
        Writing(self.0.clone())
    }
}

/// Does the handshake over a socket, of which there are two handles, within that time; a read or a write may take longer by what the socket's own limits allow.
///
/// # Errors
/// The socket's, and a [`TlsError`] in one.
pub fn begin<S: Read + Write>(
    session: Session,
    socket: S,
    out: S,
    within: Duration,
) -> io::Result<(Reading<S>, Writing<S>)> {
    let end = Instant::now() + within;
    let shared = Arc::new(Shared { session: Mutex::new(session), out: Mutex::new(out) });
    let mut reading = Reading { shared: shared.clone(), socket, raw: vec![0; PART], unread: 0..0 };
    loop {
        shared.send(&[])?;
        if !lock(&shared.session).is_beginning() {
            return Ok((reading, Writing(shared)));
        }
        if Instant::now() > end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if !reading.more()? {
            let why = "the other side has closed the connection before TLS had begun";
            return Err(TlsError::new(why, "see what it says of that").into());
        }
    }
}

impl<S: Read + Write> Reading<S> {
    /// Receives, and has the session look at it; says whether there was anything.
    fn more(&mut self) -> io::Result<bool> {
        if self.unread.is_empty() {
            let n = loop {
                match self.socket.read(&mut self.raw) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    other => break other?,
                }
            };
            if n == 0 {
                return Ok(false);
            }
            self.unread = 0..n;
        }
        let fed = lock(&self.shared.session).feed(&self.raw[self.unread.clone()]);
        match fed {
            Ok(n) => self.unread.start += n,
            Err(e) => {
                // It hears why, if it listens still.
                let _ = self.shared.send(&[]);
                return Err(e.into());
            }
        }
        Ok(true)
    }
}

impl<S: Read + Write> Read for Reading<S> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        loop {
            {
                let mut session = lock(&self.shared.session);
                let mut done = 0;
                session.plain(|bytes| {
                    let n = bytes.len().min(to.len() - done);
                    to[done..done + n].copy_from_slice(&bytes[..n]);
                    done += n;
                    n
                });
                if done > 0 || session.is_over() {
                    return Ok(done);
                }
            }
            if !self.more()? {
                return Ok(0);
            }
        }
    }
}

impl<S: Write> Write for Writing<S> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.send(from)?;
        Ok(from.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<S: Write> Writing<S> {
    /// Tells the other side that nothing more comes.
    ///
    /// # Errors
    /// The socket's.
    pub fn say_goodbye(&self) -> io::Result<()> {
        lock(&self.0.session).say_goodbye();
        self.0.send(&[])
    }
}
