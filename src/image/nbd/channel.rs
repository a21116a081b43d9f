//! What a link speaks over: the socket itself, or TLS on it. Both never block, and wait where a LUN waits for everything (`sys/io`). Called by the link.
//!
//! Over the plain socket data go straight between the kernel and the caller's memory. With TLS they are encrypted and decrypted on the LUN's thread, by way
//! of buffers here.

use std::{
    cell::{RefCell, RefMut},
    io::{self, IoSlice},
    ops::Range,
};

use crate::{
    sys::{io::net::Stream, mem::Sg},
    tls::{Client, Session},
};

/// Bytes that are received at once, and plain bytes that are encrypted at once.
const PART: usize = 64 << 10;

/// A connection, encrypted or not.
pub(super) enum Channel {
    Plain(Stream),
    Tls(Box<Secure>),
}

impl Channel {
    /// Receives some bytes; 0 at the end.
    ///
    /// # Errors
    /// The socket's, and a [`TlsError`](crate::tls::TlsError) in one.
    pub async fn receive(&self, to: &Sg) -> io::Result<usize> {
        match self {
            Channel::Plain(stream) => stream.receive(to).await,
            Channel::Tls(secure) => secure.receive(to).await,
        }
    }

    /// Fills all of `to`.
    ///
    /// # Errors
    /// As [`receive`](Channel::receive), and that the stream ends before.
    pub async fn receive_all(&self, to: &Sg) -> io::Result<()> {
        let secure = match self {
            Channel::Plain(stream) => return stream.receive_all(to).await,
            Channel::Tls(secure) => secure,
        };
        let mut done = 0;
        while done < to.len() {
            match secure.receive(&to.slice(done, to.len() - done)).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Sends all of `from`.
    ///
    /// # Errors
    /// The socket's. Some of the bytes may have gone.
    pub async fn send(&self, from: &Sg) -> io::Result<()> {
        match self {
            Channel::Plain(stream) => stream.send(from).await,
            Channel::Tls(secure) => secure.send(from).await,
        }
    }

    /// Sends a last message, as far as that goes without waiting, and ends the connection.
    pub fn end_with(&self, last: &Sg) {
        match self {
            Channel::Plain(stream) => {
                // A server that is gone needs no goodbye.
                let _ = stream.try_send(last);
                stream.shut_down();
            }
            Channel::Tls(secure) => {
                let _ = secure.session.borrow_mut().encrypt(&last.to_vec());
                secure.say_goodbye();
                secure.stream.shut_down();
            }
        }
    }
}

/// What was received and is not decrypted yet.
struct Raw {
    bytes: Vec<u8>,
    unread: Range<usize>,
}

/// TLS on a socket.
pub(super) struct Secure {
    stream: Stream,
    session: RefCell<Session>,
    raw: RefCell<Raw>,
    /// Plain bytes of one part of what is sent.
    plain: RefCell<Vec<u8>>,
}

/// The socket, as what rustls writes to.
struct Sink<'a>(&'a Stream);

impl io::Write for Sink<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.try_send_bytes(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_send_bytes(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Secure {
    /// Who only hears the connection end cannot tell it from one that was cut off.
    fn drop(&mut self) {
        self.say_goodbye();
    }
}

impl Secure {
    /// Does the handshake on a socket.
    ///
    /// # Errors
    /// The socket's, and why the other side is not believed.
    pub async fn begin(stream: Stream, with: &Client) -> io::Result<Secure> {
        let secure = Secure {
            stream,
            session: RefCell::new(Session::client(with)?),
            raw: RefCell::new(Raw { bytes: vec![0; PART], unread: 0..0 }),
            plain: RefCell::new(Vec::with_capacity(PART)),
        };
        loop {
            secure.flush().await?;
            if !secure.session.borrow().is_beginning() {
                return Ok(secure);
            }
            if !secure.more().await? {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the server has closed the connection before TLS had begun",
                ));
            }
        }
    }

    /// The session that a server sees a certificate of.
    pub fn session(&self) -> RefMut<'_, Session> {
        self.session.borrow_mut()
    }

    /// Sends what waits, as far as that goes without waiting. Whoever does that takes the oldest bytes first, so it does not matter who does.
    fn try_flush(&self) -> io::Result<()> {
        let mut session = self.session.borrow_mut();
        while session.has_to_write() {
            match session.write_to(&mut Sink(&self.stream)) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    fn say_goodbye(&self) {
        self.session.borrow_mut().say_goodbye();
        let _ = self.try_flush();
    }

    async fn flush(&self) -> io::Result<()> {
        loop {
            match self.try_flush() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.stream.writable().await?,
                other => return other,
            }
        }
    }

    async fn send(&self, from: &Sg) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let part = PART.min(from.len() - done);
            {
                let mut plain = self.plain.borrow_mut();
                plain.clear();
                from.for_each(done, part, |bytes| plain.extend_from_slice(bytes));
                self.session.borrow_mut().encrypt(&plain)?;
            }
            done += part;
            self.flush().await?;
        }
        Ok(())
    }

    async fn receive(&self, to: &Sg) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        loop {
            {
                let mut session = self.session.borrow_mut();
                let mut done = 0;
                session.plain(|bytes| {
                    let n = bytes.len().min(to.len() - done);
                    to.copy_in(done, &bytes[..n]);
                    done += n;
                    n
                });
                if done > 0 || session.is_over() {
                    return Ok(done);
                }
            }
            if !self.more().await? {
                return Ok(0);
            }
        }
    }

    /// Receives, and has the session look at it; says whether there was anything.
    async fn more(&self) -> io::Result<bool> {
        loop {
            match self.try_more() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.stream.readable().await?,
                other => return other,
            }
        }
    }

    fn try_more(&self) -> io::Result<bool> {
        let mut raw = self.raw.borrow_mut();
        let Raw { bytes, unread } = &mut *raw;
        if Range::is_empty(unread) {
            match self.stream.try_receive_bytes(bytes)? {
                0 => return Ok(false),
                n => *unread = 0..n,
            }
        }
        let fed = self.session.borrow_mut().feed(&bytes[unread.clone()]);
        // What TLS itself has to say (an alert, another key); if the socket takes it not now, then with what is sent next.
        let _ = self.try_flush();
        unread.start += fed?;
        Ok(true)
    }
}
