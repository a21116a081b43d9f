//! LUNs over images in a temporary directory, with guests' commands from an embedded kernel, and a QMP server before them.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tcmu_dif::{
    control::{Registry, server::Server},
    image::create::create_raw,
    lun::{LunHandle, LunParams, config::DeviceConfig, start},
    peer::kernel::{Data, Kernel, Options},
    pi::{
        PiMode, PiType,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    sys::{self, backend_from_env},
    units::{BlockSize, Blocks},
};

pub const MIB: u64 = 1 << 20;

/// A server, and where its files are.
pub struct Rig {
    pub dir: tempfile::TempDir,
    pub luns: Registry,
    pub server: Option<Server>,
}

/// A LUN with its guest.
pub struct Guest {
    pub kernel: Kernel,
    pub lun: LunHandle,
}

impl Rig {
    pub fn new(luns: Registry) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::listen(&dir.path().join("qmp.sock"), luns.clone()).unwrap();
        Rig { dir, luns, server: Some(server) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp.sock")
    }

    pub fn talk(&self) -> Talk {
        Talk::begin(&self.socket())
    }

    /// A LUN over a new raw image with protection.
    pub fn protected(&self, name: &str, size: u64) -> Guest {
        let image = self.dir.path().join(format!("{name}.raw"));
        let at = image.clone();
        sys::run(async move |io| {
            create_raw(&io, &at, size).await.unwrap();
            let new = NewSidecar {
                block_size: BlockSize::B512,
                kind: PiType::Type1,
                mode: PiMode::Bitmap,
                capacity: Blocks(size / 512),
                format: ImageFormat::Raw,
                stamp: Stamp::of(&at).unwrap(),
            };
            tools::create(&io, &at, &default_path(&at), new).await.unwrap();
        });
        self.start(name, DeviceConfig { pi: Some(PiType::Type1), ..DeviceConfig::new(image) }, size)
    }

    pub fn start(&self, name: &str, config: DeviceConfig, capacity: u64) -> Guest {
        let mut kernel = Kernel::new(Options::default()).unwrap();
        let lun = start(LunParams {
            name: name.into(),
            config,
            block_size: BlockSize::B512,
            capacity,
            write_cache: true,
            serial: Some(name.into()),
            neighbourhood: Default::default(),
            state_dir: Some(self.dir.path().join("state")),
            backend: Some(backend_from_env()),
            polling: true,
            device: kernel.device().unwrap(),
        })
        .unwrap();
        self.luns.insert(name, lun.remote().clone());
        // The unit attention of a power on.
        kernel.execute(&[0; 6], Data::None).unwrap();
        Guest { kernel, lun }
    }
}

impl Guest {
    fn cdb(op: u8, lba: u32, blocks: usize) -> Vec<u8> {
        let mut cdb = vec![op, 0];
        cdb.extend(lba.to_be_bytes());
        cdb.push(0);
        cdb.extend((blocks as u16).to_be_bytes());
        cdb.push(0);
        cdb
    }

    /// WRITE (10); the SCSI status.
    pub fn write(&mut self, lba: u32, data: &[u8]) -> u8 {
        self.kernel.execute(&Self::cdb(0x2a, lba, data.len() / 512), Data::Out(data)).unwrap().status
    }

    /// READ (10); the SCSI status.
    pub fn read(&mut self, lba: u32, blocks: usize) -> u8 {
        self.kernel.execute(&Self::cdb(0x28, lba, blocks), Data::In(blocks * 512)).unwrap().status
    }

    /// SYNCHRONIZE CACHE (10); the SCSI status.
    pub fn flush(&mut self) -> u8 {
        self.kernel.execute(&Self::cdb(0x35, 0, 0), Data::None).unwrap().status
    }
}

/// A connection, message by message.
pub struct Talk {
    pub stream: UnixStream,
    lines: std::io::Lines<BufReader<UnixStream>>,
    pub events: Vec<Value>,
}

impl Talk {
    pub fn connect(path: &Path) -> Talk {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        Talk { stream, lines, events: Vec::new() }
    }

    /// Connects and negotiates.
    pub fn begin(path: &Path) -> Talk {
        let mut talk = Talk::connect(path);
        assert!(talk.hear().unwrap()["QMP"].is_object());
        assert_eq!(talk.ask("qmp_capabilities", json!({})), json!({ "return": {} }));
        talk
    }

    /// The next message, if the connection has not ended.
    pub fn hear(&mut self) -> Option<Value> {
        let line = self.lines.next()?.ok()?;
        Some(serde_json::from_str(&line).unwrap())
    }

    /// Takes nothing until the server has ended the connection, which it has to.
    pub fn wait_until_it_is_hung_up(&self) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
        let mut look = [PollFd::new(&self.stream, PollFlags::empty())];
        let seen = poll(&mut look, Some(&limit)).unwrap();
        assert!(seen == 1 && look[0].revents().contains(PollFlags::HUP), "the connection goes on");
    }

    /// How many lines still come before the server ends the connection, which it has to.
    pub fn rest_until_it_ends(&mut self) -> usize {
        let mut lines = 0;
        loop {
            match self.lines.next() {
                None => return lines,
                Some(Ok(_)) => lines += 1,
                // It ended while bytes for the server were on the way.
                Some(Err(e)) if e.kind() == std::io::ErrorKind::ConnectionReset => return lines,
                Some(Err(e)) => panic!("the connection goes on: {e}"),
            }
        }
    }

    /// The answer to a command; events that come before it are kept.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.write_all(text.as_bytes()).unwrap();
        loop {
            let message = self.hear().expect("the connection goes on");
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// What a command returns.
    pub fn get(&mut self, command: &str, arguments: Value) -> Value {
        let mut answer = self.ask(command, arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    /// The next event of that name; those before it are passed over.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let event = match self.events.is_empty() {
                true => self.hear().unwrap_or_else(|| panic!("no {name} came")),
                false => self.events.remove(0),
            };
            if event["event"] == name {
                return event;
            }
        }
    }

    /// The statuses of a job, until it is no more.
    pub fn job(&mut self) -> Vec<String> {
        let mut statuses = Vec::new();
        while statuses.last().is_none_or(|s| s != "null") {
            let event = self.event("JOB_STATUS_CHANGE");
            statuses.push(event["data"]["status"].as_str().unwrap().to_owned());
        }
        statuses
    }
}
