//! The daemon's end of the QMP socket: a thread that accepts, and a thread for each client.
//!
//! The socket is its owner's alone (mode 0600) unless an administrator gives it to a group, because whoever can write to it can
//! have LUNs read and the daemon ended; who asks is looked at once more ([`super::access`]). A client can be slow, silent or hostile: it
//! has a thread to itself, and one for its events, its messages are bounded, and an answer or an event that it doesn't take ends its
//! connection. Called by the daemon at its start.

use std::{
    io::{self, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use super::{
    Registry, commands,
    door::{Connection, Counted, Door, Service},
    events::{Bus, Subscription},
    qmp::{Class, Error, Messages, Request, greeting, response},
};

/// Clients at a time.
const MAX_CLIENTS: usize = 32;

/// How long a client may take to take an answer.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// How long clients may take to hear the last events when the server ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Listens for as long as it lives.
#[derive(Debug)]
pub struct Server {
    door: Option<Door>,
    bus: Bus,
    /// Threads that write events.
    telling: Arc<AtomicUsize>,
}

impl Server {
    /// Listens at that path. Something that stands there is taken for what an earlier daemon left: the caller holds the lock
    /// that says so.
    ///
    /// # Errors
    /// The socket's.
    pub fn listen(path: &Path, luns: Registry) -> io::Result<Server> {
        let (bus, telling) = (luns.bus().clone(), Arc::new(AtomicUsize::new(0)));
        let door = Door::unix(path, 0o600, Qmp { luns, telling: telling.clone() })?;
        Ok(Server { door: Some(door), bus, telling })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody comes in any more.
        drop(self.door.take());
        // What has been published is still told, SHUTDOWN above all, to those who listen.
        self.bus.close();
        let end = Instant::now() + LAST_WORDS;
        while self.telling.load(Ordering::Acquire) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

struct Qmp {
    luns: Registry,
    telling: Arc<AtomicUsize>,
}

impl Service<UnixStream> for Qmp {
    const NAME: &'static str = "qmp";
    const MAX_CLIENTS: usize = MAX_CLIENTS;

    fn serve(&self, client: &mut UnixStream) -> io::Result<()> {
        let _counted = Counted::more(&self.luns.0.clients);
        client.write_within(WRITE_PATIENCE)?;
        let mut out = Out(Arc::new(Mutex::new(client.try_clone()?)));
        let conversed = converse(&mut out, &self.luns, &self.telling);
        out.end();
        conversed
    }

    fn refuse(&self, client: &mut UnixStream, _: bool, words: &str) {
        let answer = response(Err(Error::generic(words)), None);
        let _ = client.write_all(format!("{answer}\r\n").as_bytes());
    }
}

/// Where a client is written to: answers by the thread that reads from it, events by another, each whole.
#[derive(Clone)]
struct Out(Arc<Mutex<UnixStream>>);

impl Out {
    fn stream(&self) -> MutexGuard<'_, UnixStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&mut self, message: &Value) -> io::Result<()> {
        self.line(&format!("{message}\r\n"))
    }

    fn line(&mut self, line: &str) -> io::Result<()> {
        self.stream().write_all(line.as_bytes())
    }

    /// Ends the connection, whoever still holds a part of it.
    fn end(&self) {
        // One that is gone already need not be ended.
        let _ = self.stream().shutdown(Shutdown::Both);
    }
}

/// A client's place among those who are told; with it ends the thread that tells.
struct Listening {
    bus: Bus,
    id: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.bus.unsubscribe(self.id);
    }
}

/// Answers a client until it goes.
fn converse(out: &mut Out, luns: &Registry, telling: &Arc<AtomicUsize>) -> io::Result<()> {
    let stream = out.stream().try_clone()?;
    out.say(&greeting())?;
    let mut ready = false;
    let mut listening = None;
    for message in Messages::of(stream) {
        let message = match message {
            Ok(message) => message,
            Err(e) => {
                // Where the next message begins cannot be told.
                out.say(&response(Err(Error::generic(format!("Invalid JSON syntax: {e}"))), None))?;
                break;
            }
        };
        let id = message.get("id").cloned();
        let answer = match serde_json::from_value::<Request>(message) {
            Ok(request) if ready => commands::execute(luns, &request.execute, request.arguments),
            Ok(request) => negotiate(&request.execute, request.arguments).map(|value| {
                ready = true;
                (value, None)
            }),
            Err(e) => Err(Error::generic(format!("this is no QMP command: {e}"))),
        };
        let (answer, after) = match answer {
            Ok((value, after)) => (Ok(value), after),
            Err(e) => (Err(e), None),
        };
        out.say(&response(answer, id))?;
        if ready && listening.is_none() {
            let subscription = luns.bus().subscribe();
            listening = Some(Listening { bus: luns.bus().clone(), id: subscription.id() });
            tell(subscription, out.clone(), telling)?;
        }
        if let Some(after) = after {
            after(luns);
        }
    }
    Ok(())
}

/// Writes events to a client from now on. One that takes none for [`WRITE_PATIENCE`] loses the connection.
fn tell(events: Subscription, mut out: Out, telling: &Arc<AtomicUsize>) -> io::Result<()> {
    let (_, counted) = Counted::more(telling);
    std::thread::Builder::new().name("qmp events".to_owned()).spawn(move || {
        let _counted = counted;
        while let Ok(line) = events.queue.recv() {
            if let Err(e) = out.line(&line) {
                tracing::debug!("qmp: a client takes no events: {e}");
                return out.end();
            }
        }
    })?;
    Ok(())
}

/// What comes before everything else.
fn negotiate(name: &str, arguments: Map<String, Value>) -> Result<Value, Error> {
    if name != "qmp_capabilities" {
        let words = "Expecting capabilities negotiation with 'qmp_capabilities'";
        return Err(Error::new(Class::CommandNotFound, words));
    }
    let (_, arguments) = commands::parse(name, arguments)?;
    if arguments.elements("enable") > 0 {
        return Err(Error::generic("there are no capabilities to enable"));
    }
    Ok(json!({}))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::unix::fs::PermissionsExt,
    };

    use super::*;
    use std::path::PathBuf;

    struct Talk {
        stream: UnixStream,
        lines: std::io::Lines<BufReader<UnixStream>>,
    }

    impl Talk {
        fn begin(path: &Path) -> Talk {
            let stream = UnixStream::connect(path).unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            Talk { stream, lines }
        }

        fn hear(&mut self) -> Value {
            serde_json::from_str(&self.lines.next().unwrap().unwrap()).unwrap()
        }

        fn ask(&mut self, text: &str) -> Value {
            self.stream.write_all(text.as_bytes()).unwrap();
            self.hear()
        }
    }

    fn server() -> (tempfile::TempDir, PathBuf, Server) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        std::fs::write(&path, "left by an earlier one").unwrap();
        let server = Server::listen(&path, Registry::default()).unwrap();
        (dir, path, server)
    }

    #[test]
    fn a_client_is_greeted_and_has_to_negotiate_before_it_asks() {
        let (_dir, path, server) = server();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut talk = Talk::begin(&path);
        assert!(talk.hear()["QMP"]["version"]["qemu"]["major"].is_u64());
        let early = talk.ask(r#"{"execute":"query-version","id":1}"#);
        assert_eq!((&early["error"]["class"], &early["id"]), (&json!("CommandNotFound"), &json!(1)));
        assert_eq!(talk.ask(r#"{"execute":"qmp_capabilities"}"#), json!({ "return": {} }));
        assert!(talk.ask(r#"{"execute":"query-version"}"#)["return"]["package"].is_string());
        assert_eq!(
            talk.ask(r#"{"execute":"query-jobs","id":{"a":1}}"#),
            json!({ "return": [], "id": { "a": 1 } })
        );
        let again = talk.ask(r#"{"execute":"qmp_capabilities"}"#);
        assert_eq!(again["error"]["class"], "CommandNotFound");
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn nonsense_is_answered_and_harms_only_the_one_who_says_it() {
        let (_dir, path, _server) = server();
        let mut good = Talk::begin(&path);
        good.hear();
        good.ask(r#"{"execute":"qmp_capabilities"}"#);
        for text in ["{]", "}", "\"", "[[[[\u{7}"] {
            let mut bad = Talk::begin(&path);
            bad.hear();
            bad.stream.write_all(text.as_bytes()).unwrap();
            bad.stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(bad.hear()["error"]["class"], "GenericError", "{text}");
            assert!(bad.lines.next().is_none(), "{text}: the connection ends");
        }
        for text in [r#"{"execute":1}"#, "[]", "3\n", r#"{"execute":"query-jobs","control":1}"#] {
            assert_eq!(good.ask(text)["error"]["class"], "GenericError", "{text}");
        }
        assert_eq!(good.ask(r#"{"execute":"query-jobs"}"#), json!({ "return": [] }));
    }

    #[test]
    fn clients_beyond_the_limit_are_told_so_and_a_place_that_gets_free_is_given_again() {
        let (_dir, path, _server) = server();
        let mut all: Vec<Talk> = (0..MAX_CLIENTS).map(|_| Talk::begin(&path)).collect();
        all.iter_mut().for_each(|t| assert!(t.hear()["QMP"].is_object()));
        assert!(Talk::begin(&path).hear()["error"]["desc"].as_str().unwrap().contains("32 clients"));
        all.pop();
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while Talk::begin(&path).hear()["QMP"].is_null() {
            assert!(std::time::Instant::now() < end, "no place gets free");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
