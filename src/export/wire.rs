//! What a client is spoken to over: its socket, or TLS on it.

use std::{
    io::{self, Read, Write},
    path::Path,
    time::Duration,
};

use super::server::{PATIENCE, Socket};
use crate::tls::{
    self,
    duplex::{self, Reading, Writing},
};

/// A connection, encrypted or not.
pub(super) enum Wire {
    Plain(Socket),
    Tls {
        /// For its limits.
        socket: Socket,
        reading: Box<Reading<Socket>>,
        writing: Writing<Socket>,
    },
}

impl Wire {
    /// Has everything encrypted from here on, with the certificates of that directory.
    ///
    /// # Errors
    /// What is wrong with ours, why the client's is not believed, and the socket's.
    pub fn start_tls(&mut self, certificates: &Path) -> io::Result<()> {
        let Wire::Plain(socket) = self else { return Ok(()) };
        let session = tls::Session::server(&tls::Server::read(certificates)?)?;
        let (reading, writing) = duplex::begin(session, socket.try_clone()?, socket.try_clone()?, PATIENCE)?;
        *self = Wire::Tls { socket: socket.try_clone()?, reading: Box::new(reading), writing };
        Ok(())
    }

    /// It is encrypted.
    pub fn has_tls(&self) -> bool {
        matches!(self, Wire::Tls { .. })
    }

    /// Another handle for what is sent.
    pub fn writer(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(match self {
            Wire::Plain(socket) => Box::new(socket.try_clone()?),
            Wire::Tls { writing, .. } => Box::new(writing.clone()),
        })
    }

    /// How long the next read may take; for ever, if nothing is said.
    pub fn read_within(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Wire::Plain(socket) | Wire::Tls { socket, .. } => socket.read_within(limit),
        }
    }

    /// Ends it in order.
    pub fn say_goodbye(&self) {
        if let Wire::Tls { writing, .. } = self {
            // One that is gone needs no goodbye.
            let _ = writing.say_goodbye();
        }
    }
}

impl Read for Wire {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Plain(socket) => socket.read(to),
            Wire::Tls { reading, .. } => reading.read(to),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Wire::Plain(socket) => socket.write(from),
            Wire::Tls { writing, .. } => writing.write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Wire::Plain(socket) => socket.flush(),
            Wire::Tls { writing, .. } => writing.flush(),
        }
    }
}
