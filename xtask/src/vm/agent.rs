//! The agent in the guest: runs bash scripts for the host, one after the other.
//!
//! It is this very program under another name (`xtask guest-agent`), started by the guest's init. It ends when
//! the host closes the port; init then powers the machine off.

use super::protocol::{Exit, Frame, PORT_NAME, Request, Tag};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How long output is still waited for when the script has ended but a child of it holds the pipe.
const GRACE: Duration = Duration::from_millis(300);
/// How long a killed script may take to be gone before it is reported as it is.
const DYING: Duration = Duration::from_secs(3);

type Port = Arc<Mutex<File>>;

/// Serves the host until it closes the port.
pub fn serve() -> Result<()> {
    let path = find_port()?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let mut from = file.try_clone()?;
    let to: Port = Arc::new(Mutex::new(file));
    send(&to, Tag::Hello, 0, Vec::new())?;
    loop {
        let frame = match Frame::read_from(&mut from) {
            Ok(frame) => frame,
            Err(error) => {
                let ended = error
                    .downcast_ref::<std::io::Error>()
                    .is_some_and(|e| e.kind() == ErrorKind::UnexpectedEof);
                return if ended { Ok(()) } else { Err(error) };
            }
        };
        if frame.tag != Tag::Run {
            bail!("the host sent a {:?}", frame.tag);
        }
        let request: Request = serde_json::from_slice(&frame.payload)?;
        let exit = run(&to, frame.number, &request)?;
        send(&to, Tag::Exit, frame.number, serde_json::to_vec(&exit)?)?;
    }
}

fn find_port() -> Result<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").context("no virtio-serial ports")?;
    for port in ports {
        let port = port?;
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(PathBuf::from("/dev").join(port.file_name()));
        }
    }
    bail!("no virtio-serial port is called {PORT_NAME}")
}

fn send(to: &Port, tag: Tag, number: u32, payload: Vec<u8>) -> Result<()> {
    let Ok(mut port) = to.lock() else {
        bail!("a thread died while it held the port");
    };
    Frame { tag, number, payload }.write_to(&mut *port)
}

fn run(to: &Port, number: u32, request: &Request) -> Result<Exit> {
    let mut bash = Command::new("/bin/bash");
    if request.strict {
        bash.args(["-e", "-u", "-o", "pipefail"]);
    }
    let mut child = bash
        .args(["-c", &request.script])
        .current_dir("/root")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("cannot start bash")?;
    let (done, ends) = mpsc::channel();
    if let Some(out) = child.stdout.take() {
        forward(to, Tag::Stdout, number, out, done.clone());
    }
    if let Some(err) = child.stderr.take() {
        forward(to, Tag::Stderr, number, err, done);
    }
    let (status, timed_out) = wait(&mut child, Duration::from_secs(request.timeout_s))?;
    drain(&ends);
    Ok(Exit { status: status.and_then(|s| s.code()), signal: status.and_then(|s| s.signal()), timed_out })
}

/// Passes a pipe on to the host from a thread of its own, and says on `done` when it is at its end.
fn forward(to: &Port, tag: Tag, number: u32, mut pipe: impl Read + Send + 'static, done: Sender<()>) {
    let to = Arc::clone(to);
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            if send(&to, tag, number, buffer[..count].to_vec()).is_err() {
                break;
            }
        }
        let _ = done.send(());
    });
}

fn drain(ends: &Receiver<()>) {
    let until = Instant::now() + GRACE;
    for _ in 0..2 {
        let left = until.saturating_duration_since(Instant::now());
        if ends.recv_timeout(left).is_err() {
            return;
        }
    }
}

/// Waits for the script, and kills its process group when its time is over.
fn wait(child: &mut Child, timeout: Duration) -> Result<(Option<ExitStatus>, bool)> {
    let started = Instant::now();
    let mut killed = None;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((Some(status), killed.is_some()));
        }
        match killed {
            None if started.elapsed() > timeout => {
                if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                    let _ = kill_process_group(group, Signal::KILL);
                }
                killed = Some(Instant::now());
            }
            Some(at) if at.elapsed() > DYING => return Ok((None, true)),
            _ => thread::sleep(if started.elapsed() < Duration::from_secs(1) {
                Duration::from_millis(2)
            } else {
                Duration::from_millis(20)
            }),
        }
    }
}
