//! qemu-nbd and nbdkit as children of the test, each on a Unix socket of its own.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::{
        Image,
        open::{OpenError, OpenOptions, open},
    },
    sys::io::Io,
};

/// A server that is killed with the test.
pub struct Server {
    child: Option<Child>,
    command: Vec<String>,
    pub socket: PathBuf,
}

impl Server {
    fn start(socket: &Path, command: Vec<String>) -> Server {
        let mut server = Server { child: None, command, socket: socket.to_owned() };
        server.again();
        server
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self) {
        let mut child = self.child.take().unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "{:?} does not end", self.command);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it (anew).
    pub fn again(&mut self) {
        self.kill();
        let (program, args) = self.command.split_first().unwrap();
        let child = Command::new(program).args(args).stdin(Stdio::null()).spawn();
        self.child = Some(child.unwrap_or_else(|e| {
            panic!("{program} cannot be run ({e}); these tests need it: apt-get install qemu-utils nbdkit libnbd-bin")
        }));
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&self.socket).is_err() {
            assert!(Instant::now() < end, "{:?} does not listen", self.command);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// kill -9, and its socket is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    pub fn uri(&self, query: &str) -> PathBuf {
        PathBuf::from(format!("nbd+unix:///?socket={}{query}", self.socket.display()))
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().unwrap().id() as i32
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// nbdkit with these arguments.
pub fn nbdkit(dir: &Path, args: &[&str]) -> Server {
    let socket = dir.join("nbdkit.sock");
    let mut command: Vec<String> =
        ["nbdkit", "--foreground", "--exit-with-parent", "--unix"].map(str::to_owned).into();
    command.push(socket.to_str().unwrap().to_owned());
    command.extend(args.iter().map(|a| (*a).to_owned()));
    Server::start(&socket, command)
}

/// qemu-nbd with these arguments, the image last.
pub fn qemu_nbd(dir: &Path, args: &[&str]) -> Server {
    let socket = dir.join("qemu-nbd.sock");
    let mut command: Vec<String> =
        ["qemu-nbd", "--persistent", "--shared=8", "--socket"].map(str::to_owned).into();
    command.push(socket.to_str().unwrap().to_owned());
    command.extend(args.iter().map(|a| (*a).to_owned()));
    Server::start(&socket, command)
}

pub async fn attach(io: &Io, uri: &Path) -> Image {
    try_attach(io, uri, false).await.unwrap_or_else(|e| panic!("{e}: {:?}", e.source))
}

pub async fn try_attach(io: &Io, uri: &Path, read_only: bool) -> Result<Image, OpenError> {
    open(io, uri, &OpenOptions { read_only, ..OpenOptions::default() }).await
}

/// A file of so many zeros.
pub fn file(dir: &Path, name: &str, len: u64) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    path
}
