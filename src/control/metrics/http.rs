//! `GET /metrics` over HTTP/1.1, on a Unix socket and, if one was asked for, on a port of the loopback interface.
//!
//! One request a connection. A client has [`PATIENCE`] for its request and as long for taking the answer, however it deals the bytes
//! out; a request has [`MAX_HEAD`] bytes at most. What makes no sense is refused with a status that says so.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use super::{collect, text::Format};
use crate::control::{
    Registry,
    door::{Connection, Door, Service, left_until, write_until},
};

/// Clients at a time, for each socket.
pub const MAX_CLIENTS: usize = 8;

/// How long a client may take for its request, and for taking the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long one that was refused may take to hear why.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Bytes of a request line and its headers.
pub const MAX_HEAD: usize = 8192;

/// Headers of a request.
const MAX_HEADERS: usize = 64;

/// The socket's mode: its owner's and, once an administrator gives it one, its group's.
const MODE: u32 = 0o660;

/// Listens for as long as it lives.
#[derive(Debug)]
pub struct Server(Door);

impl Server {
    /// Listens at that path. Something that stands there is taken for what an earlier daemon left.
    ///
    /// # Errors
    /// The socket's.
    pub fn unix(path: &Path, luns: Registry) -> io::Result<Server> {
        Door::unix(path, MODE, Exposition(luns)).map(Server)
    }

    /// Listens at that address, which everybody on this host can ask. Port 0 is any that is free.
    ///
    /// # Errors
    /// The socket's.
    pub fn tcp(address: SocketAddr, luns: Registry) -> io::Result<Server> {
        Door::tcp(address, Exposition(luns)).map(Server)
    }

    /// The address, if it has one.
    pub fn address(&self) -> Option<SocketAddr> {
        self.0.address()
    }
}

struct Exposition(Registry);

/// What a client wants.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Metrics {
        format: Format,
        /// HEAD: everything but the body.
        head_only: bool,
    },
    /// Refused with that status.
    Refused(&'static str, &'static str),
}

impl<C: Connection> Service<C> for Exposition {
    const NAME: &'static str = "metrics";
    const MAX_CLIENTS: usize = MAX_CLIENTS;

    fn serve(&self, client: &mut C) -> io::Result<()> {
        match hear(client, Instant::now() + PATIENCE)? {
            Asked::Metrics { format, head_only } => {
                let text = collect(&self.0).text(format);
                let body = if head_only { "" } else { &text };
                let answer = answer("200 OK", format.content_type(), text.len(), body);
                write_until(client, answer.as_bytes(), Instant::now() + PATIENCE)
            }
            Asked::Refused(status, words) => {
                write_until(client, refusal(status, words).as_bytes(), Instant::now() + PATIENCE)?;
                // What is not read would have the kernel take the answer back.
                client.end_writing()?;
                read_away(client, Instant::now() + LAST_WORDS)
            }
        }
    }

    fn refuse(&self, client: &mut C, busy: bool, words: &str) {
        let status = if busy { "503 Service Unavailable" } else { "403 Forbidden" };
        let _ = client.write_all(refusal(status, words).as_bytes());
    }
}

fn answer(status: &str, content_type: &str, length: usize, body: &str) -> String {
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{allow}Connection: close\r\n\r\n{body}"
    )
}

fn refusal(status: &str, words: &str) -> String {
    answer(status, "text/plain; charset=utf-8", words.len() + 1, &format!("{words}\n"))
}

/// Reads a request.
fn hear(client: &mut impl Connection, end: Instant) -> io::Result<Asked> {
    let mut head = Vec::with_capacity(1024);
    loop {
        let mut more = [0; 1024];
        client.read_within(left_until(end)?)?;
        let n = match client.read(&mut more) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&more[..n]);
        if let Some(asked) = parse(&head) {
            return Ok(asked);
        }
        if head.len() >= MAX_HEAD {
            return Ok(TOO_LONG);
        }
    }
}

const TOO_LONG: Asked =
    Asked::Refused("431 Request Header Fields Too Large", "the request is too long: ask for GET /metrics");

/// What a request wants; nothing if its end has not come yet.
fn parse(head: &[u8]) -> Option<Asked> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Some(TOO_LONG),
        Err(_) => return Some(Asked::Refused("400 Bad Request", "this is no HTTP: ask for GET /metrics")),
    }
    let path = request.path.unwrap_or_default();
    if path.split('?').next() != Some("/metrics") {
        return Some(Asked::Refused("404 Not Found", "there is nothing here but /metrics"));
    }
    let head_only = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Some(Asked::Refused("405 Method Not Allowed", "metrics are only read: ask with GET")),
    };
    let accept: Vec<_> = request
        .headers
        .iter()
        .filter(|h| h.name.eq_ignore_ascii_case("accept"))
        .filter_map(|h| std::str::from_utf8(h.value).ok())
        .collect();
    let accept = (!accept.is_empty()).then(|| accept.join(","));
    Some(Asked::Metrics { format: Format::of(accept.as_deref()), head_only })
}

fn read_away(client: &mut impl Connection, end: Instant) -> io::Result<()> {
    let mut away = [0; 4096];
    loop {
        client.read_within(left_until(end)?)?;
        if client.read(&mut away)? == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &str) -> &'static str {
        match parse(request.as_bytes()) {
            None => "more",
            Some(Asked::Metrics { .. }) => "200",
            Some(Asked::Refused(status, _)) => &status[..3],
        }
    }

    #[test]
    fn metrics_are_given_to_who_asks_for_them_and_nothing_else_to_anybody() {
        for (request, want) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "200"),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", "200"),
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", "200"),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n", "more"),
            ("GE", "more"),
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("GET /metrics/.. HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("GET /metrics HTTP/3\r\n\r\n", "400"),
            ("\0\0\0\0", "400"),
            ("{\"execute\":\"quit\"}\r\n", "400"),
        ] {
            assert_eq!(status(request), want, "{request:?}");
        }
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(status(&many), "431");
    }

    #[test]
    fn the_format_is_the_one_that_the_client_takes() {
        let request = "GET /metrics HTTP/1.1\r\naCCept: text/plain\r\n\r\n";
        let classic = Asked::Metrics { format: Format::Classic, head_only: false };
        assert_eq!(parse(request.as_bytes()), Some(classic));
    }
}
