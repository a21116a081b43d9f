//! `kill -9` in the midst of snapshots, streams and commits: whatever was answered is there afterwards, and the chain is whole.
//!
//! The test runs itself as another process, with a LUN that is written to all the time while its chain is changed, kills that at a random
//! moment, and starts the LUN again from what is left: under the name of its first image, as the kernel's `dev_config` would have it.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::Format,
    lun::{
        LunHandle, LunParams,
        config::DeviceConfig,
        jobs::{CommitOrder, JobOrder, Settings, SnapshotOrder, StreamOrder},
        start,
    },
    peer::kernel::{Data, Kernel, Options},
    pi::PiType,
    sys::backend_from_env,
    units::BlockSize,
};

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/known.rs"]
mod known;
#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use known::{SIZE, make, path, qemu_img, tcmu_dif};

/// Says to the test that it is the process to be killed, and where its files are.
const VICTIM: &str = "TCMU_DIF_TEST_CHAIN_VICTIM";

const PLACES: u64 = 256;
/// Bytes between the places, so that they lie in many clusters.
const STEP: u64 = SIZE / PLACES;

fn lun_in(dir: &Path) -> (Kernel, LunHandle) {
    let mut kernel = Kernel::new(Options::default()).unwrap();
    let config = DeviceConfig { pi: Some(PiType::Type1), ..DeviceConfig::new(dir.join("base.raw")) };
    let params = |kernel: &Kernel| LunParams {
        name: "vm1".into(),
        config: config.clone(),
        block_size: BlockSize::B512,
        capacity: SIZE,
        write_cache: true,
        serial: Some("vm1".into()),
        neighbourhood: Default::default(),
        state_dir: Some(dir.join("state")),
        backend: Some(backend_from_env()),
        polling: true,
        device: kernel.device().unwrap(),
    };
    // The kernel may hold a killed process's locks for a moment.
    let end = Instant::now() + Duration::from_secs(10);
    let lun = loop {
        match start(params(&kernel)) {
            Ok(lun) => break lun,
            Err(e) => assert!(Instant::now() < end, "{e:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // The unit attention of a power on.
    kernel.execute(&[0; 6], Data::None).unwrap();
    (kernel, lun)
}

fn command(opcode: u8, place: u64) -> Vec<u8> {
    let mut cdb = vec![opcode, 0];
    cdb.extend(((place * STEP / 512) as u32).to_be_bytes());
    cdb.extend([0, 0, 8, 0]);
    cdb
}

fn content(place: u64, turn: u64) -> Vec<u8> {
    [turn.to_be_bytes(), place.to_be_bytes()].concat().repeat(256)
}

/// Turns that were begun, and turns that were answered, of each place.
struct Turns {
    begun: File,
    answered: File,
}

impl Turns {
    fn in_dir(dir: &Path) -> Turns {
        let open = |name: &str| {
            let at = dir.join(name);
            let file = File::options().read(true).write(true).create(true).truncate(false).open(at).unwrap();
            file.set_len(PLACES * 8).unwrap();
            file
        };
        Turns { begun: open("begun"), answered: open("answered") }
    }

    fn put(file: &File, place: u64, turn: u64) {
        file.write_all_at(&turn.to_be_bytes(), place * 8).unwrap();
    }

    fn get(file: &File, place: u64) -> u64 {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, place * 8).unwrap();
        u64::from_be_bytes(bytes)
    }
}

/// Lives until it is killed.
fn victim(dir: &Path) -> ! {
    let (mut kernel, lun) = lun_in(dir);
    let remote = lun.remote().clone();
    let here = dir.to_owned();
    let changes = move || {
        let settle = || {
            let end = Instant::now() + Duration::from_secs(20);
            while let Some(job) = remote.job(JobOrder::Query).unwrap().first() {
                if job.ready {
                    // It may have ended meanwhile.
                    let _ = remote.job(JobOrder::Complete("vm1".into()));
                }
                assert!(Instant::now() < end, "{job:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        // A job of the one before goes on.
        settle();
        for turn in 0.. {
            let chain = remote.describe().unwrap();
            let id = "vm1".to_owned();
            let settings = Settings::default();
            match turn % 4 {
                2 if chain.len() > 1 => {
                    let base = (chain.len() > 2).then(|| chain.last().unwrap().path.clone());
                    remote.job(JobOrder::Stream(Box::new(StreamOrder { id, base, settings }))).unwrap();
                    settle();
                }
                3 if chain.len() > 1 => {
                    // By turns that of the LUN's image, and that of the one beneath it.
                    let top = (turn % 8 == 3 && chain.len() > 2).then(|| chain[1].path.clone());
                    let order = CommitOrder { id, top, base: None, settings };
                    remote.job(JobOrder::Commit(Box::new(order))).unwrap();
                    settle();
                }
                _ => {
                    let name = format!("over-{}-{turn}.qcow2", std::process::id());
                    let order = SnapshotOrder { file: here.join(name), existing: false, ballot: None };
                    remote.job(JobOrder::Snapshot(order)).unwrap();
                }
            }
        }
    };
    std::thread::spawn(move || {
        // A process in which nothing changes any more is none to be killed.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(changes));
        std::process::exit(3);
    });
    let turns = Turns::in_dir(dir);
    let mut turn = (0..PLACES).map(|place| Turns::get(&turns.begun, place)).max().unwrap();
    loop {
        turn += 1;
        let place = turn.wrapping_mul(2_654_435_761) % PLACES;
        Turns::put(&turns.begun, place, turn);
        let done = kernel.execute(&command(0x2a, place), Data::Out(&content(place, turn))).unwrap();
        assert_eq!(done.status, 0);
        Turns::put(&turns.answered, place, turn);
        if turn == 1 {
            std::fs::write(dir.join("serves"), "").unwrap();
        }
    }
}

#[test]
fn what_was_answered_survives_a_kill_in_a_snapshot_a_stream_or_a_commit() {
    if let Some(dir) = std::env::var_os(VICTIM) {
        victim(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(&dir.join("base.raw"), Format::Raw, true);
    let name = "what_was_answered_survives_a_kill_in_a_snapshot_a_stream_or_a_commit";
    let mut images = std::collections::BTreeSet::new();
    for round in 0..16u64 {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(VICTIM, dir)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        while round == 0 && !dir.join("serves").exists() {
            assert!(Instant::now() < end, "it does not serve");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(150 + round * 37 % 200));
        let alive = victim.try_wait().unwrap().is_none();
        let _ = victim.kill();
        let out = victim.wait_with_output().unwrap();
        assert!(alive, "it died by itself: {}", String::from_utf8_lossy(&out.stderr));

        let (mut kernel, lun) = lun_in(dir);
        let turns = Turns::in_dir(dir);
        for place in 0..PLACES {
            let read = kernel.execute(&command(0x28, place), Data::In(4096)).unwrap();
            assert_eq!(read.status, 0, "round {round}, place {place}");
            let turn = u64::from_be_bytes(read.data[..8].try_into().unwrap());
            let (answered, begun) = (Turns::get(&turns.answered, place), Turns::get(&turns.begun, place));
            assert!(
                (answered..=begun).contains(&turn),
                "round {round}, place {place}: {turn}, and not {answered} to {begun}"
            );
            if turn > 0 {
                assert_eq!(read.data, content(place, turn), "round {round}, place {place}");
            }
        }
        // What was under way is ended at once, so that the images can be judged.
        while let Some(job) = lun.remote().job(JobOrder::Query).unwrap().first() {
            let _ = lun.remote().job(JobOrder::Cancel { id: job.id.clone(), force: true });
            std::thread::sleep(Duration::from_millis(1));
        }
        let image = lun.remote().made().config.image.clone();
        lun.stop().unwrap();
        if image.extension().is_some_and(|e| e == "qcow2") {
            // A kill may leak clusters; nothing else is wrong with any image of the chain.
            let out =
                Command::new("qemu-img").args(["check", "--output=json", path(&image)]).output().unwrap();
            let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert!(said.get("corruptions").is_none() && said["check-errors"] == 0, "{said}");
            qemu_img(&["info", "--backing-chain", path(&image)]);
        }
        let (good, said) = tcmu_dif(&["pi", "verify", path(&image)], None);
        assert!(good, "round {round}: {said}");
        images.insert(image);
    }
    assert!(images.len() > 4, "hardly anything happened: {images:?}");
}
