//! Commands of a LUN as they pass, for `tcmu-dif trace`, on a Unix socket of their own.
//!
//! A client says which LUN in one line, `{"device": "vm1"}`, and gets a line of JSON for each command until it goes or the LUN ends:
//! first `{"tracing": "vm1"}`, or `{"error": "…"}` and the end; then [`Traced`] commands, `{"missed": 3}` where the client was too slow
//! for three of them, and `{"ended": "vm1"}`. The socket is root's alone, as QMP's is: it tells what guests do.

use std::{
    io,
    path::Path,
    sync::mpsc::RecvTimeoutError,
    time::{Duration, Instant, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{
    Registry,
    door::{Connection, Door, Service, left_until, write_until},
    without_nulls,
};
use crate::lun::trace::{Trace, Traced};

/// The socket's name in the run directory.
pub const SOCKET: &str = "trace.sock";

/// How long a client may take to say which LUN, and to take what it is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked whether a client of a LUN that does nothing is still there.
const LOOK: Duration = Duration::from_millis(500);

/// Bytes of the question.
const MAX_QUESTION: usize = 1024;

/// Commands that are told in one write.
const BATCH: usize = 256;

/// Listens for as long as it lives.
#[derive(Debug)]
pub struct Server(#[allow(dead_code)] Door);

impl Server {
    /// Listens at that path. Something that stands there is taken for what an earlier daemon left.
    ///
    /// # Errors
    /// The socket's.
    pub fn listen(path: &Path, luns: Registry) -> io::Result<Server> {
        Door::unix(path, 0o600, Tracing(luns)).map(Server)
    }
}

struct Tracing(Registry);

impl<C: Connection> Service<C> for Tracing {
    const NAME: &'static str = "trace";
    const MAX_CLIENTS: usize = 4;

    fn serve(&self, client: &mut C) -> io::Result<()> {
        let device = match question(client, Instant::now() + PATIENCE)? {
            Ok(device) => device,
            Err(words) => return say(client, &line(&json!({ "error": words }))),
        };
        let found = self.0.find(&device).ok_or_else(|| format!("LUN '{device}' is not served"));
        match found.and_then(|lun| lun.trace().map_err(|e| e.to_string())) {
            Ok(trace) => {
                say(client, &line(&json!({ "tracing": device })))?;
                tell(client, &trace)?;
                say(client, &line(&json!({ "ended": device })))
            }
            Err(words) => say(client, &line(&json!({ "error": words }))),
        }
    }

    fn refuse(&self, client: &mut C, _: bool, words: &str) {
        let _ = client.write_all(line(&json!({ "error": words })).as_bytes());
    }
}

fn line(value: &Value) -> String {
    format!("{value}\n")
}

fn say(client: &mut impl Connection, text: &str) -> io::Result<()> {
    write_until(client, text.as_bytes(), Instant::now() + PATIENCE)
}

/// Reads which LUN is meant, or why that cannot be told.
fn question(client: &mut impl Connection, end: Instant) -> io::Result<Result<String, String>> {
    let mut text = Vec::new();
    while !text.contains(&b'\n') {
        let mut more = [0; MAX_QUESTION];
        client.read_within(left_until(end)?)?;
        let n = client.read(&mut more)?;
        text.extend_from_slice(&more[..n]);
        if n == 0 || text.len() > MAX_QUESTION {
            break;
        }
    }
    let asked: Option<Value> = serde_json::from_slice(&text).ok();
    let device = asked.as_ref().and_then(|v| v.get("device")?.as_str());
    Ok(device.map(str::to_owned).ok_or_else(|| "say which LUN: {\"device\": \"NAME\"}".to_owned()))
}

/// Tells of commands until the LUN ends.
///
/// # Errors
/// The client is gone, or takes nothing.
fn tell(client: &mut impl Connection, trace: &Trace) -> io::Result<()> {
    loop {
        let mut text = String::new();
        let mut ended = false;
        match trace.commands.recv_timeout(LOOK) {
            Ok(first) => {
                let more = trace.commands.try_iter().take(BATCH);
                std::iter::once(first).chain(more).for_each(|t| text.push_str(&line(&described(&t))));
            }
            Err(RecvTimeoutError::Timeout) => is_there(client)?,
            Err(RecvTimeoutError::Disconnected) => ended = true,
        }
        match trace.missed() {
            0 => {}
            n => text.push_str(&line(&json!({ "missed": n }))),
        }
        say(client, &text)?;
        if ended {
            return Ok(());
        }
    }
}

/// A client has nothing more to say: what can be read is that it is gone.
fn is_there(client: &mut impl Connection) -> io::Result<()> {
    client.read_within(Duration::from_millis(1))?;
    match client.read(&mut [0; 64]) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other.map(drop),
    }
}

fn described(traced: &Traced) -> Value {
    let since_1970 = traced.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let sense = traced.sense.map(|(key, asc, ascq)| json!({ "key": key, "asc": asc, "ascq": ascq }));
    without_nulls(json!({
        "time-us": u64::try_from(since_1970.as_micros()).unwrap_or(u64::MAX), "opcode": traced.opcode,
        "name": traced.name, "lba": traced.range.map(|r| r.0), "blocks": traced.range.map(|r| r.1),
        "status": traced.status, "sense": sense, "microseconds": traced.took.as_nanos() as f64 / 1000.0,
    }))
}
