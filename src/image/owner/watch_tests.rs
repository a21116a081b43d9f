//! Standbys: over a holder that dies, stands still, loses its way to the owner's file, lives; and over each other.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    rc::Rc,
    sync::{Arc, Mutex},
    thread,
    time::Instant,
};

use rustix::process::{Signal, kill_process};

use super::{
    super::{
        Holding, Keeper, read, share,
        tests::{
            OLD_LEASE, OLD_OWNER, SHORT, SIZE, be_the_old_owner, claim, fill, make, opened, stop as stopped,
            wait_for,
        },
    },
    *,
};
use crate::{
    image::Format,
    sys::{fence::Fence, io::Backend, mem::Buffer, run, run_on},
    volume::Volume,
};

/// Long enough for a holder that lives on a machine with much to do.
const LONG: Duration = Duration::from_millis(1600);

fn with_lease(host: u8, lease: Duration) -> Claim {
    Claim { lease, ..claim(host) }
}

/// An image of the first host's, and nobody else's.
fn shared(dir: &Path) -> PathBuf {
    let path = dir.join("a.raw");
    make(&path, Format::Raw);
    share(&path, &claim(1)).unwrap();
    path
}

fn never() -> AtomicBool {
    AtomicBool::new(false)
}

#[test]
fn a_host_that_lives_is_left_alone_and_one_that_stands_still_is_relieved_and_never_writes_again() {
    if let Some(path) = std::env::var_os(OLD_OWNER) {
        return be_the_old_owner(Path::new(&path));
    }
    for format in [Format::Raw, Format::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        make(&path, format);
        share(&path, &claim(1)).unwrap();
        // The standby is there first.
        let (stop, done) = (never(), AtomicBool::new(false));
        thread::scope(|s| {
            let standby = s.spawn(|| {
                let mut watch = Watch::of(&path, with_lease(2, LONG));
                let taken = watch.stand_by(None, &stop).unwrap().unwrap();
                done.store(true, Ordering::Release);
                taken
            });
            let name = "image::owner::watch::tests::a_host_that_lives_is_left_alone_and_one_that_stands_still_is_relieved_and_never_writes_again";
            let old = Command::new(std::env::current_exe().unwrap())
                .args([name, "--exact", "--nocapture"])
                .env(OLD_OWNER, &path)
                .env(OLD_LEASE, LONG.as_millis().to_string())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            wait_for(&path.with_extension("writing"));
            thread::sleep(LONG * 2);
            assert!(!done.load(Ordering::Acquire), "it lives");
            fs::write(path.with_extension("hold"), "").unwrap();
            wait_for(&path.with_extension("held"));
            let pid = stopped(&old);
            fs::remove_file(path.with_extension("hold")).unwrap();
            let taken = standby.join().unwrap();
            assert_eq!((taken.from.host.name.as_str(), taken.fenced), ("host-1", false));
            assert!(taken.silent >= LONG && taken.took >= LONG * 3 / 2, "{taken:?}");
            let at = path.clone();
            run(async move |io| {
                let image = opened(&io, &at, 2).await.unwrap();
                fill(&image, 0xbb).await.unwrap();
                image.flush().await.unwrap();
                let before = fs::read(&at).unwrap();
                kill_process(pid, Signal::CONT).unwrap();
                let ended = old.wait_with_output().unwrap();
                assert!(!ended.status.success(), "the old owner has gone on");
                assert!(fs::read(&at).unwrap() == before, "the old owner has written to a {format} image");
                image.close().await.unwrap();
            });
        });
    }
}

#[test]
fn a_holder_that_cannot_renew_has_begun_its_last_write_before_the_standby_has_the_image() {
    for backend in [Backend::Uring, Backend::Threads] {
        let dir = tempfile::tempdir().unwrap();
        let path = shared(dir.path());
        let mut holding = Holding::take(&path, &claim(1), None).unwrap().unwrap();
        let until = holding.look().unwrap().unwrap();
        let fence = Fence::default();
        fence.holds_until(until);
        // It writes as fast as it can, and nobody moves its fence on.
        let last = Arc::new(Mutex::new(Duration::ZERO));
        thread::scope(|s| {
            let writer = s.spawn(|| {
                let (fence, at, last) = (fence.clone(), path.clone(), last.clone());
                run_on(backend, async move |io| {
                    let file = Rc::new(fs::File::options().write(true).open(&at).unwrap());
                    io.set_fence(Some(fence));
                    let data = Buffer::from_slice(&[0xaa; 4096]);
                    while io.write(&file, 0, &data.sg(), false).await.is_ok() {
                        *last.lock().unwrap() = since_boot();
                    }
                })
            });
            let mut watch = Watch::of(&path, claim(2));
            watch.stand_by(None, &never()).unwrap().unwrap();
            let (have, last) = (since_boot(), *last.lock().unwrap());
            assert!(last < have, "{backend}: it wrote at {last:?}, and the image was taken at {have:?}");
            assert!(
                last > Duration::ZERO && last < until + SHORT,
                "{backend}: a write was begun after {until:?}: {last:?}"
            );
            // Now it is the other's.
            assert_eq!(holding.look().unwrap(), None);
            fence.lose();
            let _ = writer.join();
        });
        assert_eq!(read(&path).unwrap().unwrap().state, OwnerState::Released);
    }
}

#[test]
fn a_standby_that_stood_still_itself_or_could_not_look_has_heard_nothing_and_missed_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = shared(dir.path());
    let lease = LONG;
    let holding = Holding::take(&path, &with_lease(1, lease), None).unwrap().unwrap();
    let keeper = Keeper::begin(holding, &path, || {}).unwrap();
    let mut watch = Watch::of(&path, with_lease(2, lease));
    watch.look().unwrap();
    thread::sleep(lease * 2);
    let Heard::Held(record, silent) = watch.look().unwrap() else { panic!() };
    assert!(silent < lease, "{silent:?}");
    assert_eq!(record.host.name, "host-1");
    // It has moved on meanwhile, and that is seen under the lock.
    thread::sleep(lease / 2);
    assert!(matches!(watch.take_over(false), Err(OwnerError::Alive(_))));
    drop(keeper);
    // The file is away for longer than a lease.
    watch.look().unwrap();
    let owner = path_of(&path);
    fs::rename(&owner, dir.path().join("away")).unwrap();
    thread::sleep(lease);
    assert!(matches!(watch.look(), Err(OwnerError::NotShared(_))));
    assert!(watch.take_over(false).is_err());
    fs::rename(dir.path().join("away"), &owner).unwrap();
    let Heard::Held(_, silent) = watch.look().unwrap() else { panic!() };
    assert_eq!(silent, Duration::ZERO, "it begins anew");
    assert_eq!(read(&path).unwrap().unwrap(), record, "nothing was taken");
}

#[test]
fn of_two_standbys_one_has_the_image_and_the_other_watches_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = shared(dir.path());
    drop(Holding::take(&path, &with_lease(1, LONG), None).unwrap());
    let stop = never();
    let winners = Mutex::new(Vec::new());
    thread::scope(|s| {
        for host in [2, 3] {
            let (path, stop, winners) = (&path, &stop, &winners);
            s.spawn(move || {
                let claim = with_lease(host, LONG);
                let mut watch = Watch::of(path, claim.clone());
                if watch.stand_by(None, stop).unwrap().is_none() {
                    return;
                }
                let holding = Holding::take(path, &claim, None).unwrap().unwrap();
                let keeper = Keeper::begin(holding, path, || {}).unwrap();
                winners.lock().unwrap().push(host);
                // For as long as the other would need.
                thread::sleep(LONG * 4);
                stop.store(true, Ordering::Release);
                keeper.release().unwrap();
            });
        }
    });
    assert_eq!(winners.lock().unwrap().len(), 1);
}

#[test]
fn with_a_fencing_agent_its_word_counts_and_nobody_waits() {
    let dir = tempfile::tempdir().unwrap();
    let path = shared(dir.path());
    drop(Holding::take(&path, &claim(1), None).unwrap());
    let asked = Mutex::new(Vec::new());
    let agent = |host: &str| {
        let mut asked = asked.lock().unwrap();
        asked.push((host.to_owned(), Instant::now(), read(&path).unwrap().unwrap().generation));
        if asked.len() < 3 { Err("the power switch does not answer".to_owned()) } else { Ok(()) }
    };
    let taken = Watch::of(&path, claim(2)).stand_by(Some(&agent), &never()).unwrap().unwrap();
    assert!(taken.fenced && taken.took < SHORT, "{taken:?}");
    let asked = asked.into_inner().unwrap();
    assert_eq!(asked.len(), 3);
    assert!(asked.iter().all(|(host, _, generation)| host == "host-1" && *generation == 2));
    assert!(asked.windows(2).all(|pair| pair[1].1 - pair[0].1 >= SHORT), "a lease between two calls");
    assert_eq!(read(&path).unwrap().unwrap().generation, 4);
    assert!(Holding::take(&path, &claim(2), None).is_ok());
}

#[test]
fn what_was_given_back_in_order_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = shared(dir.path());
    Holding::take(&path, &claim(1), None).unwrap().unwrap().release().unwrap();
    let stop = never();
    thread::scope(|s| {
        let standby = s.spawn(|| Watch::of(&path, claim(2)).stand_by(None, &stop).unwrap());
        thread::sleep(SHORT * 4);
        stop.store(true, Ordering::Release);
        assert_eq!(standby.join().unwrap(), None);
    });
    assert_eq!(read(&path).unwrap().unwrap().generation, 3);
    // And one of this host's needs no standby.
    drop(Holding::take(&path, &claim(2), None).unwrap());
    let e = Watch::of(&path, claim(2)).stand_by(None, &never()).unwrap_err();
    assert!(matches!(e, OwnerError::Ours(_)), "{e}");
}

#[test]
fn a_take_over_that_was_cut_off_is_ended_by_a_standby_that_has_given_it_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = shared(dir.path());
    let file = OwnerFile::open(&path).unwrap().unwrap();
    file.write_record(&claim(3).record(OwnerState::TakingOver, 2)).unwrap();
    let taken = Watch::of(&path, claim(2)).stand_by(None, &never()).unwrap().unwrap();
    assert!(taken.silent >= SHORT * 3, "{taken:?}");
    assert_eq!(read(&path).unwrap().unwrap().generation, 4);
    assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
}
