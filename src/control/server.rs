//! The daemon's end of the QMP socket: a thread that accepts, and a thread for each client.
//!
//! The socket is its owner's alone (mode 0600), because whoever can write to it can have LUNs read and their jobs ended. A
//! client can be slow, silent or hostile: it has a thread to itself, its messages are bounded, and an answer that it doesn't
//! take ends its connection. Called by the daemon at its start.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::{
    fs::{Mode, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};
use serde_json::{Map, Value, json};

use super::{
    Registry, commands,
    qmp::{Class, Error, Messages, Request, greeting, response},
};

/// Clients at a time.
const MAX_CLIENTS: usize = 32;

/// How long a client may take to take an answer.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// Listens for as long as it lives.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at that path. Something that stands there is taken for what an earlier daemon left: the caller holds the lock
    /// that says so.
    ///
    /// # Errors
    /// The socket's.
    pub fn listen(path: &Path, luns: Registry) -> io::Result<Server> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Before it has a name: there is no moment at which another could connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 16)?;
        let listener = std::os::unix::net::UnixListener::from(socket);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let clients = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                match stream {
                    Ok(stream) => admit(stream, &luns, &clients),
                    Err(e) => {
                        // Out of descriptors, most likely: they come back.
                        tracing::warn!("qmp: {e}");
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("qmp".to_owned()).spawn(accept)?;
        Ok(Server { path: path.to_owned(), stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        if UnixStream::connect(&self.path).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Counts a client for as long as it lives.
struct Admitted(Arc<AtomicUsize>);

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn admit(mut stream: UnixStream, luns: &Registry, clients: &Arc<AtomicUsize>) {
    let before = clients.fetch_add(1, Ordering::AcqRel);
    let admitted = Admitted(clients.clone());
    if let Err(e) = stream.set_write_timeout(Some(WRITE_PATIENCE)) {
        tracing::warn!("qmp: {e}");
        return;
    }
    if before >= MAX_CLIENTS {
        let words = format!("{MAX_CLIENTS} clients are connected, and there can be no more");
        let _ = say(&mut stream, &response(Err(Error::generic(words)), None));
        return;
    }
    let luns = luns.clone();
    let spawned = std::thread::Builder::new().name("qmp client".to_owned()).spawn(move || {
        let _admitted = admitted;
        if let Err(e) = converse(stream, &luns) {
            tracing::debug!("qmp: a client is gone: {e}");
        }
    });
    if let Err(e) = spawned {
        tracing::warn!("qmp: no thread for a client: {e}");
    }
}

/// Answers a client until it goes.
fn converse(stream: UnixStream, luns: &Registry) -> io::Result<()> {
    let mut out = stream.try_clone()?;
    say(&mut out, &greeting())?;
    let mut ready = false;
    for message in Messages::of(stream) {
        let message = match message {
            Ok(message) => message,
            Err(e) => {
                // Where the next message begins cannot be told.
                say(&mut out, &response(Err(Error::generic(format!("Invalid JSON syntax: {e}"))), None))?;
                return Ok(());
            }
        };
        let id = message.get("id").cloned();
        let answer = match serde_json::from_value::<Request>(message) {
            Ok(request) => execute(luns, request.execute, request.arguments, &mut ready),
            Err(e) => Err(Error::generic(format!("this is no QMP command: {e}"))),
        };
        say(&mut out, &response(answer, id))?;
    }
    Ok(())
}

fn execute(
    luns: &Registry,
    name: String,
    arguments: Map<String, Value>,
    ready: &mut bool,
) -> Result<Value, Error> {
    match (name.as_str(), *ready) {
        ("qmp_capabilities", false) => {
            if arguments.get("enable").and_then(Value::as_array).is_some_and(|wanted| !wanted.is_empty()) {
                return Err(Error::generic("there are no capabilities to enable"));
            }
            *ready = true;
            Ok(json!({}))
        }
        ("qmp_capabilities", true) => Err(Error::new(
            Class::CommandNotFound,
            "Capabilities negotiation is already complete, command ignored",
        )),
        (_, false) => Err(Error::new(
            Class::CommandNotFound,
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        )),
        (name, true) => commands::execute(luns, name, arguments),
    }
}

fn say(out: &mut UnixStream, message: &Value) -> io::Result<()> {
    let mut text = message.to_string();
    text.push_str("\r\n");
    out.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::unix::fs::PermissionsExt,
    };

    use super::*;

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
