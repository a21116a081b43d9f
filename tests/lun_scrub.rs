//! A scrub of a LUN that serves, ordered over QMP as an administrator would: damage is found while guests write, and the
//! scrub can be paused, slowed down and cancelled, and goes on after a restart.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    os::unix::fs::FileExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use tcmu_dif::{
    control::{
        Registry,
        client::{Client, ClientError},
        qmp::Class,
        server::Server,
    },
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

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

struct Rig {
    dir: tempfile::TempDir,
    kernel: Kernel,
    luns: Registry,
    _server: Server,
    qmp: Client,
}

impl Rig {
    fn new(pi: bool) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.raw");
        sys::run(async move |io| {
            create_raw(&io, &image, SIZE).await.unwrap();
            let new = NewSidecar {
                block_size: BlockSize::B512,
                kind: PiType::Type1,
                mode: PiMode::Bitmap,
                capacity: Blocks(SIZE / 512),
                format: ImageFormat::Raw,
                stamp: Stamp::of(&image).unwrap(),
            };
            if pi {
                tools::create(&io, &image, &default_path(&image), new).await.unwrap();
            }
        });
        let luns = Registry::default();
        let socket = dir.path().join("qmp.sock");
        let server = Server::listen(&socket, luns.clone()).unwrap();
        let qmp = Client::connect(&socket).unwrap();
        let kernel = Kernel::new(Options::default()).unwrap();
        Rig { dir, kernel, luns, _server: server, qmp }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    fn start(&mut self, pi: bool) -> LunHandle {
        let config = DeviceConfig { pi: pi.then_some(PiType::Type1), ..DeviceConfig::new(self.image()) };
        let lun = start(LunParams {
            name: "vm1".into(),
            config,
            block_size: BlockSize::B512,
            capacity: SIZE,
            write_cache: true,
            serial: Some("0123456789".into()),
            neighbourhood: Default::default(),
            state_dir: Some(self.dir.path().join("state")),
            backend: Some(backend_from_env()),
            polling: true,
            device: self.kernel.device().unwrap(),
        })
        .unwrap();
        self.luns.insert("vm1", lun.remote().clone());
        // The unit attention of a power on.
        self.kernel.execute(&[0; 6], Data::None).unwrap();
        lun
    }

    fn write(&mut self, lba: u32, data: &[u8]) {
        let mut cdb = vec![0x2a, 0];
        cdb.extend(lba.to_be_bytes());
        cdb.push(0);
        cdb.extend(((data.len() / 512) as u16).to_be_bytes());
        cdb.push(0);
        assert_eq!(self.kernel.execute(&cdb, Data::Out(data)).unwrap().status, 0);
    }

    fn fill(&mut self) {
        for i in 0..SIZE / MIB {
            let data: Vec<u8> = (0..MIB).map(|b| (b / 512 + b + i) as u8).collect();
            self.write((i * MIB / 512) as u32, &data);
        }
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let Value::Object(arguments) = arguments else { panic!("{arguments}") };
        self.qmp.execute(command, arguments)
    }

    fn scrub(&mut self) -> Value {
        self.ask("query-pi", json!({ "device": "vm1" })).unwrap()[0]["scrub"].take()
    }

    fn wait(&mut self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let scrub = self.scrub();
            if done(&scrub) {
                return scrub;
            }
            assert!(Instant::now() < end, "{what}: {scrub}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn refused(result: Result<Value, ClientError>) -> (Class, String) {
    match result {
        Err(ClientError::Refused(e)) => (e.class, e.desc),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flipped_bit_is_found_while_the_lun_is_written_to() {
    let mut rig = Rig::new(true);
    let lun = rig.start(true);
    rig.fill();
    let file = std::fs::File::options().read(true).write(true).open(rig.image()).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 33 * MIB + 100).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 33 * MIB + 100).unwrap();

    assert_eq!(rig.scrub(), Value::Null);
    rig.ask("pi-scrub", json!({ "device": "vm1", "speed": 0 })).unwrap();
    // Guests write all the while.
    for i in 0..200u32 {
        rig.write(i * 300 % 60_000, &[i as u8; 4096]);
    }
    let scrub = rig.wait("ends", |s| s["status"] == "concluded");
    assert_eq!((&scrub["mismatches"], &scrub["unreadable"]), (&json!(1), &json!(0)), "{scrub}");
    let bad = &scrub["bad"][0];
    assert_eq!(bad["lba"], json!(33 * MIB / 512));
    assert_eq!(bad["host_offset"], json!(33 * MIB));
    assert_eq!((bad["tag"].as_str(), bad["file"].as_str()), (Some("guard"), rig.image().to_str()));
    assert_eq!(scrub["verified"], json!(SIZE / 512 - 1));
    assert_eq!((&scrub["current-progress"], &scrub["total-progress"]), (&json!(SIZE), &json!(SIZE)));
    // Written anew, it is whole.
    rig.write((33 * MIB / 512) as u32, &[1; 512]);
    rig.ask("pi-scrub", json!({ "device": "vm1", "speed": 0 })).unwrap();
    let scrub = rig.wait("ends again", |s| s["status"] == "concluded");
    assert_eq!((&scrub["mismatches"], &scrub["bad"]), (&json!(0), &json!([])));
    lun.stop().unwrap();
}

#[test]
fn a_scrub_keeps_to_its_speed_waits_when_paused_and_goes_on_where_it_was_after_a_restart() {
    let mut rig = Rig::new(true);
    let lun = rig.start(true);
    rig.fill();
    rig.ask("pi-scrub", json!({ "device": "vm1", "speed": MIB })).unwrap();
    let again = refused(rig.ask("pi-scrub", json!({ "device": "vm1" })));
    assert_eq!(again.1, "a scrub of this LUN is under way already");
    let jobs = rig.ask("query-jobs", json!({})).unwrap();
    assert_eq!((jobs[0]["id"].as_str(), jobs[0]["type"].as_str()), (Some("scrub-vm1"), Some("pi-scrub")));
    let began = Instant::now();
    let scrub = rig.wait("goes on", |s| s["read_bytes"].as_u64() >= Some(MIB / 2));
    // The first step is not waited for; the next are, each for its quarter of a second.
    assert!(began.elapsed() >= Duration::from_millis(200), "faster than it may: {scrub}");

    rig.ask("job-pause", json!({ "id": "scrub-vm1" })).unwrap();
    lun.stop().unwrap();
    let lun = rig.start(true);
    let paused = rig.scrub();
    assert_eq!(paused["status"], "paused");
    let before = paused["next_lba"].as_u64().unwrap();
    assert!(before > 0 && before < SIZE / 512, "{paused}");

    rig.ask("job-resume", json!({ "id": "scrub-vm1" })).unwrap();
    lun.stop().unwrap();
    // One that was running goes on by itself.
    let lun = rig.start(true);
    assert_eq!(rig.scrub()["status"], "running");
    rig.ask("block-job-set-speed", json!({ "device": "scrub-vm1", "speed": 0 })).unwrap();
    let scrub = rig.wait("ends", |s| s["status"] == "concluded");
    assert_eq!(scrub["verified"], json!(SIZE / 512), "each block once, across two restarts");
    assert_eq!(refused(rig.ask("job-resume", json!({ "id": "scrub-vm1" }))).0, Class::DeviceNotActive);

    rig.ask("pi-scrub", json!({ "device": "vm1", "speed": MIB })).unwrap();
    rig.ask("job-cancel", json!({ "id": "scrub-vm1" })).unwrap();
    let scrub = rig.scrub();
    assert_eq!((scrub["status"].as_str(), scrub["job"].as_str()), (Some("cancelled"), None));
    assert_eq!(rig.ask("query-jobs", json!({})).unwrap(), json!([]));
    lun.stop().unwrap();
    let gone = refused(rig.ask("pi-scrub", json!({ "device": "vm1" })));
    assert!(gone.1.contains("has been stopped"), "{gone:?}");
}

#[test]
fn a_paused_scrub_stands_where_its_saved_account_says() {
    let mut rig = Rig::new(true);
    let lun = rig.start(true);
    rig.fill();
    // Without a limit a step is always under way.
    rig.ask("pi-scrub", json!({ "device": "vm1", "speed": 0 })).unwrap();
    for _ in 0..30 {
        rig.ask("job-pause", json!({ "id": "scrub-vm1" })).unwrap();
        let saved = std::fs::read_dir(rig.dir.path().join("state/scrub")).unwrap().next().unwrap().unwrap();
        let saved: Value = serde_json::from_slice(&std::fs::read(saved.path()).unwrap()).unwrap();
        // The step has ended by then.
        std::thread::sleep(Duration::from_millis(10));
        let now = rig.scrub();
        assert_eq!((&now["status"], &now["next_lba"]), (&json!("paused"), &saved["next_lba"]), "{saved}");
        rig.ask("job-resume", json!({ "id": "scrub-vm1" })).unwrap();
    }
    let scrub = rig.wait("ends", |s| s["status"] == "concluded");
    assert_eq!(scrub["verified"], json!(SIZE / 512), "each block once, whatever the pauses were");
    lun.stop().unwrap();
}

#[test]
fn a_lun_without_protection_says_so_and_what_to_do() {
    let mut rig = Rig::new(false);
    let lun = rig.start(false);
    let (class, words) = refused(rig.ask("pi-scrub", json!({ "device": "vm1" })));
    assert_eq!(class, Class::GenericError);
    assert!(words.contains("no protection information") && words.contains("--pi type1"), "{words}");
    let all = rig.ask("query-pi", Value::Object(Map::new())).unwrap();
    assert_eq!(all, json!([{ "device": "vm1", "protected": false }]));
    let slow = refused(rig.ask("pi-scrub", json!({ "device": "vm1", "speed": 1 })));
    assert!(!slow.1.is_empty());
    lun.stop().unwrap();
}
