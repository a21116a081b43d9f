//! A TLS connection without its socket.

use std::io::{self, BufRead, Write};

use rustls::{ClientConnection, Connection, ServerConnection};

use super::{Client, Role, Server, TlsError, words};
use std::path::{Path, PathBuf};

/// One end of a TLS connection: what the other side sends goes in with [`feed`](Session::feed), what is for it comes out with
/// [`write_to`](Session::write_to).
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    role: Role,
    dir: PathBuf,
}

impl Session {
    /// The client's end.
    ///
    /// # Errors
    /// That rustls does not begin.
    pub fn client(with: &Client) -> Result<Session, TlsError> {
        let (role, dir) = (Role::Client, with.dir.clone());
        let begun = ClientConnection::new(with.config.clone(), with.name.clone());
        Session::new(begun.map(Connection::Client), role, dir)
    }

    /// The server's end.
    ///
    /// # Errors
    /// That rustls does not begin.
    pub fn server(with: &Server) -> Result<Session, TlsError> {
        let (role, dir) = (Role::Server, with.dir.clone());
        Session::new(ServerConnection::new(with.config.clone()).map(Connection::Server), role, dir)
    }

    fn new(begun: Result<Connection, rustls::Error>, role: Role, dir: PathBuf) -> Result<Session, TlsError> {
        let mut connection = begun.map_err(|e| words::of_connection(&e, &dir, role))?;
        // Whoever gives plain data takes the encrypted ones out before he gives more.
        connection.set_buffer_limit(None);
        Ok(Session { connection, role, dir })
    }

    /// The directory of its certificates.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The handshake is not over.
    pub fn is_beginning(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Takes in some of what the other side has sent, and says how much. What has become plain has to be taken before there is more.
    ///
    /// # Errors
    /// That the other side is not believed, or sends what it may not; what it is to hear of that waits to be written.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, TlsError> {
        let wrong = |e: &io::Error| TlsError::new(format!("TLS: {e}"), "connect again");
        let mut rest = bytes;
        let taken = self.connection.read_tls(&mut rest).map_err(|e| wrong(&e))?;
        self.connection.process_new_packets().map_err(|e| words::of_connection(&e, &self.dir, self.role))?;
        // After its goodbye nothing counts.
        Ok(if taken == 0 { bytes.len() } else { taken })
    }

    /// The other side has said goodbye, and everything before that has been taken.
    pub fn is_over(&mut self) -> bool {
        matches!(self.connection.reader().fill_buf(), Ok([]))
    }

    /// Hands plain data on, as much as `to` takes of what is there; gives how much that was.
    pub fn plain(&mut self, mut to: impl FnMut(&[u8]) -> usize) -> usize {
        let mut done = 0;
        loop {
            let mut reader = self.connection.reader();
            let taken = match reader.fill_buf() {
                Ok(bytes) if !bytes.is_empty() => to(bytes),
                _ => return done,
            };
            if taken == 0 {
                return done;
            }
            reader.consume(taken);
            done += taken;
        }
    }

    /// Encrypts: the outcome waits to be written.
    ///
    /// # Errors
    /// That the connection can't any more.
    pub fn encrypt(&mut self, plain: &[u8]) -> io::Result<()> {
        self.connection.writer().write_all(plain)
    }

    /// Nothing more comes.
    pub fn say_goodbye(&mut self) {
        self.connection.send_close_notify();
    }

    /// Something waits to be written.
    pub fn has_to_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Writes some of what waits.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write_to(&mut self, to: &mut dyn Write) -> io::Result<usize> {
        self.connection.write_tls(to)
    }
}
