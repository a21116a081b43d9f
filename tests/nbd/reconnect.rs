//! Servers that go and come back: what they had not answered is done, what they had acknowledged and lost is there again, and who waits too
//! long is told.

use std::{
    cell::{Cell, RefCell},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::Image,
    nbd::export,
    sys::{self, exec::join, io::Io, mem::Buffer},
    units::ByteOffset,
    volume::{IoErrorKind, Volume, WriteFlags},
};

use crate::{
    fake::Fake,
    model::{BLOCK, Model, Settled},
    servers::{Server, attach, file, nbdkit},
    support::{Rng, scale},
    work::{Work, read_disk},
};

const SIZE: u64 = 2 << 20;
const MOMENT: Duration = Duration::from_millis(10);

pub async fn work(image: &Image, model: &Model, seed: u64, operations: u64) {
    let work = Work {
        volume: image,
        model,
        blocks: SIZE / BLOCK,
        longest: 200,
        rng: RefCell::new(Rng::new(seed)),
        left: Cell::new(operations),
        may_fail: false,
    };
    work.run(16).await;
}

/// Random work, so many operations at the default scale, on a server that dies all the time, and is reached at `uri`: what was acknowledged is there,
/// and on its medium after a flush.
pub fn work_while_it_dies(fake: &Arc<Fake>, uri: PathBuf, seed: u64, operations: u64) {
    fake.dies_once_in.store(60, Ordering::SeqCst);
    let server = fake.clone();
    sys::run(async move |io| {
        // It may die during the handshake of another connection, and nobody is waited for at the start.
        let image = attach(&io, &uri).await;
        let model = Model::new(vec![0; SIZE as usize]);
        work(&image, &model, seed, operations * scale()).await;
        let bytes = read_disk(&image).await.unwrap();
        model.judge_disk(&bytes, Settled::Ended).unwrap_or_else(|e| panic!("seed {seed}, as it is: {e}"));
        server.dies_once_in.store(0, Ordering::SeqCst);
        image.flush().await.unwrap();
        // What lies on its medium is all of it.
        model
            .judge_disk(&server.durable(), Settled::Ended)
            .unwrap_or_else(|e| panic!("seed {seed}, durable: {e}"));
        image.close().await.unwrap();
    });
}

/// Random work, so many operations at the default scale, on a server that is killed and started again each time that a pause is over; its
/// file, `disk`, keeps what was written.
pub fn work_while_it_is_killed(server: Server, uri: PathBuf, disk: &Path, pause: Duration, operations: u64) {
    let (server, disk) = (Arc::new(Mutex::new(server)), disk.to_owned());
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let model = Model::new(vec![0; SIZE as usize]);
        let done = Cell::new(false);
        let killing = async {
            let mut kills = 0;
            while !done.get() {
                io.sleep(pause).await;
                let server = server.clone();
                io.blocking(move || server.lock().unwrap().again()).await.unwrap();
                kills += 1;
            }
            kills
        };
        let working = async {
            work(&image, &model, 9, operations * scale()).await;
            done.set(true);
        };
        let (kills, ()) = join(killing, working).await;
        assert!(kills >= 3, "{kills}");
        let bytes = read_disk(&image).await.unwrap();
        model.judge_disk(&bytes, Settled::Ended).unwrap();
        image.close().await.unwrap();
        model.judge_disk(&std::fs::read(&disk).unwrap(), Settled::Ended).unwrap();
    });
}

/// A server that loses what was not flushed, each time it dies, which is all the time.
#[test]
fn nothing_that_was_acknowledged_is_lost_with_a_server_that_loses_its_cache() {
    for (seed, flags, query) in [
        (1, export::SEND_FUA, ""),
        (2, 0, ""),
        (3, export::SEND_FUA | export::CAN_MULTI_CONN, "&connections=3"),
        (4, export::SEND_FUA, "&retain=1M"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start(&dir.path().join("sock"), SIZE as usize, seed, flags, MOMENT);
        work_while_it_dies(&fake, fake.uri(query), seed, 600);
        assert!(fake.deaths.load(Ordering::SeqCst) > 5, "seed {seed}: it never died");
        fake.stop();
    }
}

/// What the kept writes take has a bound: beyond it they are flushed, without being asked.
#[test]
fn writes_that_nobody_flushes_are_flushed_before_they_take_too_much_memory() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(&dir.path().join("sock"), SIZE as usize, 7, 0, MOMENT);
    let uri = fake.uri("&retain=1M");
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let data = Buffer::from_slice(&vec![5; 256 << 10]).sg();
        for i in 0..20 {
            image.write(ByteOffset(i % 8 * (256 << 10)), &data, WriteFlags::default()).await.unwrap();
        }
    });
    assert_eq!(fake.flushes.load(Ordering::SeqCst), 3);
    fake.stop();
}

/// nbdkit, killed and started again beside the work; its file keeps what was written.
#[test]
fn random_work_goes_on_over_a_server_that_is_killed_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", SIZE);
    let args = ["--filter=delay", "file", disk.to_str().unwrap(), "rdelay=2ms", "wdelay=2ms"];
    let server = nbdkit(dir.path(), &args);
    let uri = server.uri("&connections=2");
    work_while_it_is_killed(server, uri, &disk, Duration::from_millis(60), 800);
}

#[test]
fn a_server_that_exits_with_its_last_client_sees_all_connections_of_a_volume_go() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", SIZE);
    let mut server = nbdkit(dir.path(), &["--filter=exitlast", "file", disk.to_str().unwrap()]);
    let uri = server.uri("&connections=3");
    for byte in [3, 4] {
        let uri = uri.clone();
        sys::run(async move |io| {
            let image = attach(&io, &uri).await;
            let data = Buffer::from_slice(&[byte; 4096]).sg();
            image.write(ByteOffset(0), &data, WriteFlags::default()).await.unwrap();
            image.close().await.unwrap();
        });
        server.wait();
        assert_eq!(std::fs::read(&disk).unwrap()[..4096], [byte; 4096]);
        server.again();
    }
}

async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let began = Instant::now();
    (future.await, began.elapsed())
}

#[test]
fn who_waits_longer_than_was_agreed_is_told_and_the_volume_works_when_the_server_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", SIZE);
    let mut server = nbdkit(dir.path(), &["file", disk.to_str().unwrap()]);
    let uri = server.uri("&reconnect=1");
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let data = Buffer::from_slice(&[3; 4096]).sg();
        image.write(ByteOffset(0), &data, WriteFlags::default()).await.unwrap();
        server.kill();
        let (e, took) = timed(image.read(ByteOffset(0), &data)).await;
        assert_eq!(e.unwrap_err().kind, IoErrorKind::Unreachable);
        assert!(took >= Duration::from_millis(900) && took < Duration::from_secs(5), "{took:?}");
        // The flush cannot be vouched for, and nobody waits as long again.
        let (e, took) = timed(image.flush()).await;
        assert_eq!(e.unwrap_err().kind, IoErrorKind::Unreachable);
        assert!(took < Duration::from_secs(4), "{took:?}");
        server.again();
        image.flush().await.unwrap();
        let back = Buffer::zeroed(4096).sg();
        image.read(ByteOffset(0), &back).await.unwrap();
        assert_eq!(back.to_vec(), [3; 4096]);
        image.close().await.unwrap();
    });
}

#[test]
fn a_volume_is_closed_soon_while_its_server_is_away_and_says_what_may_be_lost() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", SIZE);
    let mut server = nbdkit(dir.path(), &["file", disk.to_str().unwrap()]);
    let uri = server.uri("&reconnect=3600");
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let data = Buffer::from_slice(&[3; 4096]).sg();
        image.write(ByteOffset(0), &data, WriteFlags::default()).await.unwrap();
        server.kill();
        let (e, took) = timed(image.close()).await;
        assert_eq!(e.unwrap_err().kind, IoErrorKind::Unreachable);
        assert!(took < Duration::from_secs(10), "{took:?}");
    });
}

async fn with_fake(io: &Io, fake: &Fake, query: &str) -> Image {
    let image = attach(io, &fake.uri(query)).await;
    image.write(ByteOffset(0), &Buffer::from_slice(&[1; 512]).sg(), WriteFlags::default()).await.unwrap();
    image
}

#[test]
fn another_export_under_the_same_name_is_never_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(&dir.path().join("sock"), SIZE as usize, 11, 0, MOMENT);
    let server = fake.clone();
    sys::run(async move |io| {
        let image = with_fake(&io, &server, "").await;
        image.flush().await.unwrap();
        server.size.store(SIZE / 2, Ordering::SeqCst);
        server.die();
        let data = Buffer::from_slice(&[9; 512]).sg();
        let e = image.write(ByteOffset(512), &data, WriteFlags::default()).await.unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Failed, "{e}");
        assert!(e.to_string().contains("another export"), "{e}");
        assert_eq!(image.flush().await.unwrap_err().kind, IoErrorKind::Failed);
    });
    assert_eq!(fake.durable()[512..1024], [0; 512]);
    fake.stop();
}

#[test]
fn a_server_that_stops_answering_is_given_up_and_tried_anew() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", SIZE);
    let server = nbdkit(dir.path(), &["file", disk.to_str().unwrap()]);
    let uri = server.uri("&timeout=1&reconnect=60");
    let pid = rustix::process::Pid::from_raw(server.pid()).unwrap();
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let data = Buffer::from_slice(&[3; 4096]).sg();
        let waking = async {
            io.sleep(Duration::from_millis(2500)).await;
            rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        };
        let (written, ()) = join(image.write(ByteOffset(0), &data, WriteFlags::default()), waking).await;
        written.unwrap();
        image.close().await.unwrap();
    });
    drop(server);
    assert_eq!(std::fs::read(&disk).unwrap()[..4096], [3; 4096]);
}
