//! `kill -9` of a whole LUN whose answers came out of order: what was answered is not run again, and what was not is.
//!
//! The LUN serves an NBD export of the test's own in another process, on the ring of an embedded kernel whose memory it shares with
//! the test. So the test sees every read and write that the LUN makes, may leave any of them unanswered for as long as it likes, and kills the LUN's process
//! then. The next one finds the same ring and the same in-flight record, as the next daemon does.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs::{File, OpenOptions},
    io::{IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tcmu_dif::{
    image::Format,
    lun::{LunParams, config::DeviceConfig, continued::ContinuedFile, start_where},
    nbd::{
        chunk, command, export,
        handshake::{BlockSizes, Export},
        reply::{chunk_head, simple},
        request::{LEN, Request},
    },
    peer::kernel::{Data, Descriptors, Ended, Kernel, Options},
    ring::Device,
    sys::backend_from_env,
    units::BlockSize,
};

#[allow(dead_code)] // Other tests use more of it.
#[path = "nbd/fake.rs"]
mod fake;
#[allow(dead_code)] // Other tests use more of it.
#[path = "qcow2/support.rs"]
mod support;

/// Says to the test that it is the process to be killed, and where its files are.
const VICTIM: &str = "TCMU_DIF_TEST_REPLAY_VICTIM";

const SIZE: usize = 1 << 20;
/// The kernel's number for this instance of the device.
const INSTANCE: u64 = 7;
const PATIENCE: Duration = Duration::from_secs(30);

/// The disk, and everything that was asked of it.
#[derive(Default)]
struct Storage {
    bytes: Vec<u8>,
    /// Blocks (LBAs) whose writes are done and not answered, until the process that asked is gone.
    mute: Vec<u64>,
    /// Every read and write: which, at which LBA, how many blocks.
    seen: Vec<(u16, u64, u64)>,
}

type Shared = Arc<Mutex<Storage>>;

/// Serves it, to one client after the other or to several.
fn serve(storage: Shared, listener: UnixListener) {
    for client in listener.incoming().map_while(Result::ok) {
        let storage = storage.clone();
        std::thread::spawn(move || drop(converse(&storage, client)));
    }
}

fn converse(storage: &Mutex<Storage>, mut client: UnixStream) -> std::io::Result<()> {
    let flags = export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_FUA | export::SEND_WRITE_ZEROES;
    fake::shake_hands(&mut client, Export { size: SIZE as u64, flags }, BlockSizes::default())?;
    loop {
        let mut head = [0; LEN];
        client.read_exact(&mut head)?;
        let request = Request::parse(&head).unwrap();
        let (at, len) = (request.offset as usize, request.length as usize);
        let mut data = vec![0; if request.kind == command::WRITE { len } else { 0 }];
        client.read_exact(&mut data)?;
        let mut disk = storage.lock().unwrap();
        let (lba, blocks) = (request.offset / 512, u64::from(request.length) / 512);
        if matches!(request.kind, command::READ | command::WRITE) {
            disk.seen.push((request.kind, lba, blocks));
        }
        let mut out = Vec::new();
        match request.kind {
            command::READ => {
                out.extend(chunk_head(chunk::DONE, chunk::OFFSET_DATA, request.cookie, 8 + len as u32));
                out.extend(request.offset.to_be_bytes());
                out.extend(&disk.bytes[at..at + len]);
            }
            command::WRITE => disk.bytes[at..at + len].copy_from_slice(&data),
            command::WRITE_ZEROES => disk.bytes[at..at + len].fill(0),
            command::FLUSH => {}
            _ => return Ok(()),
        }
        if request.kind == command::WRITE && disk.mute.contains(&lba) {
            continue;
        }
        drop(disk);
        if out.is_empty() {
            out.extend(simple(0, request.cookie));
        }
        client.write_all(&out)?;
    }
}

/// The ring, its storage, and the process that serves it.
struct Rig {
    kernel: Kernel,
    storage: Shared,
    dir: tempfile::TempDir,
    process: Option<Child>,
    /// The process ends when this does.
    tether: Option<UnixStream>,
    test: &'static str,
}

impl Rig {
    fn new(test: &'static str) -> Rig {
        if let Some(dir) = std::env::var_os(VICTIM) {
            victim(Path::new(&dir));
        }
        let dir = tempfile::tempdir().unwrap();
        let storage = Shared::new(Mutex::new(Storage { bytes: vec![0; SIZE], ..Storage::default() }));
        let listener = UnixListener::bind(dir.path().join("nbd")).unwrap();
        let served = storage.clone();
        std::thread::spawn(move || serve(served, listener));
        let kernel = Kernel::new(Options::default()).unwrap();
        let mut rig = Rig { kernel, storage, dir, process: None, tether: None, test };
        rig.begin();
        // The unit attention of a power on; nothing of it is left when the commands come that matter.
        rig.kernel.execute(&[0; 6], Data::None).unwrap();
        let continued = ContinuedFile { path: rig.dir.path().join("uio0.json"), device: INSTANCE };
        let end = Instant::now() + PATIENCE;
        while continued.load().unwrap().is_none_or(|kept| !kept.attentions.is_empty()) {
            assert!(Instant::now() < end, "the unit attention is kept for ever");
            std::thread::sleep(Duration::from_millis(10));
        }
        rig
    }

    /// Starts the process that serves the LUN, and gives it the ring.
    fn begin(&mut self) {
        let at = self.dir.path().join("ring");
        let _ = std::fs::remove_file(&at);
        let listener = UnixListener::bind(&at).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", self.test, "--nocapture"])
            .env(VICTIM, self.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.process = Some(process);
        let (mut stream, _) = listener.accept().unwrap();
        let Descriptors { memory, len, doorbell, kick } = self.kernel.descriptors().unwrap();
        let given = [memory.as_fd(), doorbell.as_fd(), kick.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&given)));
        let text = (len as u64).to_ne_bytes();
        sendmsg(&stream, &[IoSlice::new(&text)], &mut ancillary, SendFlags::empty()).unwrap();
        // It answers when it serves.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        self.tether = Some(stream);
    }

    /// `kill -9`, and the next one comes.
    fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        assert!(process.try_wait().unwrap().is_none(), "it has ended by itself");
        process.kill().unwrap();
        process.wait().unwrap();
        self.storage().mute.clear();
        self.begin();
    }

    fn storage(&self) -> MutexGuard<'_, Storage> {
        self.storage.lock().unwrap()
    }

    /// How often that was asked of the storage at that LBA.
    fn count(&self, kind: u16, lba: u64) -> usize {
        self.storage()
            .seen
            .iter()
            .filter(|(k, l, blocks)| *k == kind && (*l..l + blocks).contains(&lba))
            .count()
    }

    fn wait_for(&self, kind: u16, lba: u64, times: usize) {
        let end = Instant::now() + PATIENCE;
        while self.count(kind, lba) < times {
            assert!(Instant::now() < end, "{:?}", self.storage().seen);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The ends of that many commands, in the order of their ids.
    fn ends(&mut self, count: usize) -> Vec<Ended> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.kernel.wait(PATIENCE).unwrap());
        }
        all.sort_by_key(|e| e.id);
        all
    }

    fn read(&mut self, lba: u64) -> Vec<u8> {
        self.kernel.execute(&rw16(0x88, lba), Data::In(512)).unwrap().data
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// One block.
fn rw16(opcode: u8, lba: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[13] = 1;
    cdb
}

const WRITE16: u8 = 0x8a;
const COMPARE_AND_WRITE: u8 = 0x89;
const MISCOMPARE: (u8, u8, u8) = (0xe, 0x1d, 0);

fn block(fill: u8) -> [u8; 512] {
    [fill; 512]
}

fn given(stream: &UnixStream) -> (u64, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 8];
    recvmsg(stream, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let rights = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    (u64::from_ne_bytes(text), rights.collect())
}

/// Serves the ring that it is given until it is killed.
fn victim(dir: &Path) -> ! {
    let mut stream = UnixStream::connect(dir.join("ring")).unwrap();
    let (len, fds) = given(&stream);
    let [memory, doorbell, kick] = fds.try_into().unwrap();
    let record: PathBuf = dir.join("uio0");
    let record = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(record).unwrap();
    let device = Device::embedded(File::from(memory), len as usize, doorbell, kick);
    let uri = format!("nbd+unix:///?socket={}", dir.join("nbd").display());
    let params = LunParams {
        name: "vm1".into(),
        config: DeviceConfig { format: Some(Format::Raw), ..DeviceConfig::new(uri) },
        block_size: BlockSize::B512,
        capacity: SIZE as u64,
        write_cache: true,
        serial: Some("vm1".into()),
        neighbourhood: Default::default(),
        state_dir: None,
        backend: Some(backend_from_env()),
        polling: true,
        device: device.with_record(record, INSTANCE),
    };
    let continued = ContinuedFile { path: dir.join("uio0.json"), device: INSTANCE };
    let _lun = start_where(params, Some(continued)).unwrap();
    stream.write_all(&[1]).unwrap();
    // Until the test dies, should it die first.
    let _ = stream.read(&mut [0]);
    std::process::exit(1);
}

#[test]
fn of_two_answered_writes_to_one_block_neither_is_run_again_when_an_earlier_command_was_still_under_way() {
    let name = "of_two_answered_writes_to_one_block_neither_is_run_again_when_an_earlier_command_was_still_under_way";
    let mut rig = Rig::new(name);
    const SLOW: u64 = 100;
    const LBA: u64 = 200;
    for round in 1..=3u8 {
        let before = [rig.count(command::WRITE, SLOW), rig.count(command::WRITE, LBA)];
        rig.storage().mute = vec![SLOW];
        let slow = rig.kernel.submit(&rw16(WRITE16, SLOW), Data::Out(&block(round))).unwrap();
        rig.wait_for(command::WRITE, SLOW, before[0] + 1);
        // Both are answered before the first, so their answers go over its request, and over their own.
        for fill in [0x10 + round, 0x20 + round] {
            let id = rig.kernel.submit(&rw16(WRITE16, LBA), Data::Out(&block(fill))).unwrap();
            let ended = rig.ends(1).remove(0);
            assert_eq!((ended.id, ended.status), (id, 0));
        }
        assert_eq!(rig.kernel.in_flight(), 1);
        rig.kill();
        // The unanswered one is run, by the next process, and nothing else is.
        let ended = rig.ends(1).remove(0);
        assert_eq!((ended.id, ended.status), (slow, 0), "round {round}");
        assert_eq!(rig.kernel.in_flight(), 0);
        assert_eq!(rig.read(LBA), block(0x20 + round), "round {round}: the second write's data");
        assert_eq!(rig.read(SLOW), block(round));
        let after = [rig.count(command::WRITE, SLOW), rig.count(command::WRITE, LBA)];
        assert_eq!(after, [before[0] + 2, before[1] + 2], "round {round}: {:?}", rig.storage().seen);
    }
}

#[test]
fn answered_writes_among_many_unanswered_ones_are_not_run_again() {
    let mut rig = Rig::new("answered_writes_among_many_unanswered_ones_are_not_run_again");
    // Every third is slow; the others write to one block, one after the other.
    const LBA: u64 = 1000;
    rig.storage().mute = (0..20).collect();
    let (mut slow, mut answered) = (Vec::new(), 0);
    for i in 0..60u8 {
        if i % 3 == 0 {
            let lba = u64::from(i / 3);
            slow.push(rig.kernel.submit(&rw16(WRITE16, lba), Data::Out(&block(i))).unwrap());
            rig.wait_for(command::WRITE, lba, 1);
        } else {
            rig.kernel.submit(&rw16(WRITE16, LBA), Data::Out(&block(i))).unwrap();
            assert_eq!(rig.ends(1)[0].status, 0);
            answered += 1;
        }
    }
    rig.kill();
    let ended = rig.ends(slow.len());
    assert!(ended.iter().all(|e| e.status == 0));
    assert_eq!(ended.iter().map(|e| e.id).collect::<Vec<_>>(), slow);
    assert_eq!(rig.read(LBA), block(59));
    assert_eq!(rig.count(command::WRITE, LBA), answered);
    for lba in 0..20 {
        assert_eq!(rig.count(command::WRITE, lba), 2, "LBA {lba}");
    }
}

#[test]
fn a_compare_and_write_that_was_cut_off_after_its_write_compares_once_and_is_answered_good() {
    let name = "a_compare_and_write_that_was_cut_off_after_its_write_compares_once_and_is_answered_good";
    let mut rig = Rig::new(name);
    const LBA: u64 = 300;
    let change = |from: u8, to: u8| [block(from), block(to)].concat();
    rig.storage().mute = vec![LBA];
    let id = rig.kernel.submit(&rw16(COMPARE_AND_WRITE, LBA), Data::Out(&change(0, 1))).unwrap();
    rig.wait_for(command::WRITE, LBA, 1);
    // A write to the same block waits for it, and for the next process.
    let after = rig.kernel.submit(&rw16(WRITE16, LBA), Data::Out(&block(2))).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((rig.count(command::READ, LBA), rig.count(command::WRITE, LBA)), (1, 1));
    assert_eq!(rig.storage().bytes[LBA as usize * 512..][..512], block(1), "it has written");
    rig.kill();
    let ended = rig.ends(2);
    // Compared again it would find its own data, and end in MISCOMPARE.
    assert_eq!([(ended[0].id, ended[0].status), (ended[1].id, ended[1].status)], [(id, 0), (after, 0)]);
    assert_eq!(rig.count(command::READ, LBA), 1, "it has compared once");
    assert_eq!(rig.read(LBA), block(2), "the write came after it");
    // The id is used again, and the mark is not: the next ones compare.
    let done = rig.kernel.execute(&rw16(COMPARE_AND_WRITE, LBA), Data::Out(&change(0, 9))).unwrap();
    assert_eq!(done.key_asc_ascq(), MISCOMPARE);
    let done = rig.kernel.execute(&rw16(COMPARE_AND_WRITE, LBA), Data::Out(&change(2, 9))).unwrap();
    assert_eq!((done.status, rig.read(LBA)), (0, block(9).to_vec()));
}
