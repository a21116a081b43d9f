//! Asking a running daemon: the command line's end of the QMP socket.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value};

use super::qmp::{Error, Messages, Request};

/// How long an answer may take: longer than a LUN's thread is given for its own.
const PATIENCE: Duration = Duration::from_secs(40);

/// A connection that may ask.
pub struct Client {
    out: UnixStream,
    messages: Messages<UnixStream>,
    path: PathBuf,
}

/// Why there is no answer, or not the one that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no daemon listens at {}", .0.display())]
    NoDaemon(PathBuf, #[source] io::Error),
    /// The connection.
    #[error("the connection to {} failed", .0.display())]
    Io(PathBuf, #[source] io::Error),
    /// What came makes no sense.
    #[error("what came from {} is no QMP: {what}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What came instead.
        what: String,
    },
    /// The daemon refuses.
    #[error(transparent)]
    Refused(#[from] Error),
}

impl Client {
    /// Connects, and negotiates.
    ///
    /// # Errors
    /// [`ClientError::NoDaemon`], or the connection's.
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        let failed = |e| ClientError::Io(path.to_owned(), e);
        let out = UnixStream::connect(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoDaemon(path.to_owned(), e)
            }
            _ => failed(e),
        })?;
        out.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        out.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let messages = Messages::of(out.try_clone().map_err(failed)?);
        let mut client = Client { out, messages, path: path.to_owned() };
        let greeting = client.next()?;
        if greeting.get("QMP").is_none() {
            return Err(match error_in(&greeting) {
                Some(error) => ClientError::Refused(error),
                None => client.nonsense(&greeting),
            });
        }
        client.execute("qmp_capabilities", Map::new())?;
        Ok(client)
    }

    /// Waits that long for answers from now on.
    ///
    /// # Errors
    /// The connection's.
    pub fn wait_for(&mut self, time: Duration) -> Result<(), ClientError> {
        self.out.set_read_timeout(Some(time)).map_err(|e| ClientError::Io(self.path.clone(), e))
    }

    /// Executes a command; gives what it returns.
    ///
    /// # Errors
    /// [`ClientError::Refused`], or the connection's.
    pub fn execute(&mut self, command: &str, arguments: Map<String, Value>) -> Result<Value, ClientError> {
        let request = Request { execute: command.to_owned(), arguments, id: None };
        let text = serde_json::to_string(&request).map_err(|e| self.failed(e.into()))?;
        self.out.write_all(text.as_bytes()).map_err(|e| self.failed(e))?;
        loop {
            let mut answer = self.next()?;
            if answer.get("event").is_some() {
                continue;
            }
            if let Some(error) = error_in(&answer) {
                return Err(ClientError::Refused(error));
            }
            return match answer.get_mut("return") {
                Some(value) => Ok(value.take()),
                None => Err(self.nonsense(&answer)),
            };
        }
    }

    fn next(&mut self) -> Result<Value, ClientError> {
        match self.messages.next() {
            Some(Ok(value)) => Ok(value),
            Some(Err(e)) => Err(self.failed(e.into())),
            None => Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn failed(&self, e: io::Error) -> ClientError {
        ClientError::Io(self.path.clone(), e)
    }

    fn nonsense(&self, what: &Value) -> ClientError {
        ClientError::Protocol { path: self.path.clone(), what: what.to_string() }
    }
}

fn error_in(answer: &Value) -> Option<Error> {
    serde_json::from_value(answer.get("error")?.clone()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Registry, qmp::Class, server::Server};

    #[test]
    fn a_question_is_answered_refused_or_finds_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        assert!(matches!(Client::connect(&path), Err(ClientError::NoDaemon(..))));
        let server = Server::listen(&path, Registry::default()).unwrap();
        let mut client = Client::connect(&path).unwrap();
        assert_eq!(client.execute("query-jobs", Map::new()).unwrap(), Value::Array(Vec::new()));
        match client.execute("no-such-thing", Map::new()) {
            Err(ClientError::Refused(e)) => assert_eq!(e.class, Class::CommandNotFound),
            other => panic!("{other:?}"),
        }
        drop(server);
        assert!(matches!(Client::connect(&path), Err(ClientError::NoDaemon(..))));
    }
}
