//! Images that change hands: in order, by force, and under an old owner that was stopped and goes on.

use std::{
    fs, io,
    os::unix::fs::FileExt,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use rustix::process::{Pid, Signal, kill_process};

use super::*;
use crate::{
    image::{
        Format, Image,
        create::{create_qcow2, create_raw},
        open::{OpenErrorKind, OpenOptions, open},
        qcow2::CreateOptions,
    },
    sys::{mem::Buffer, run},
    units::ByteOffset,
    volume::{Volume, WriteFlags},
};

pub(super) const SIZE: u64 = 1 << 20;
pub(super) const SHORT: Duration = Duration::from_millis(400);

pub(super) fn claim(host: u8) -> Claim {
    Claim { host: HostId { id: [host; 16], name: format!("host-{host}") }, lease: SHORT }
}

fn own(host: u8) -> Option<Own> {
    let lease = std::env::var(OLD_LEASE).ok().map(|ms| Duration::from_millis(ms.parse().unwrap()));
    let claim = Claim { lease: lease.unwrap_or(SHORT), ..claim(host) };
    Some(Own { claim, expected: None, lost: Arc::new(|| {}) })
}

pub(super) fn make(path: &Path, format: Format) {
    let path = path.to_owned();
    run(async move |io| match format {
        Format::Raw => create_raw(&io, &path, SIZE).await.unwrap(),
        Format::Qcow2 => create_qcow2(&io, &path, &CreateOptions::new(SIZE)).await.unwrap(),
    });
}

pub(super) async fn opened(io: &Io, path: &Path, host: u8) -> Result<Image, OpenError> {
    open(io, path, &OpenOptions { own: own(host), ..OpenOptions::default() }).await
}

pub(super) async fn fill(image: &Image, byte: u8) -> crate::volume::Result<()> {
    let data = Buffer::from_slice(&[byte; 65536]);
    for at in (0..SIZE).step_by(65536) {
        image.write(ByteOffset(at), &data.sg(), WriteFlags::default()).await?;
    }
    Ok(())
}

#[test]
fn an_image_goes_from_host_to_host_with_a_higher_generation_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    make(&path, Format::Raw);
    assert!(read(&path).unwrap().is_none());
    assert_eq!(share(&path, &claim(1)).unwrap().generation, 1);
    assert_eq!(share(&path, &claim(2)).unwrap().generation, 1, "it is shared already");
    run(async move |io| {
        for (host, generation) in [(1, 2), (2, 4), (1, 6)] {
            let image = opened(&io, &path, host).await.unwrap();
            assert_eq!(image.generation(), Some(generation));
            let there = read(&path).unwrap().unwrap();
            assert_eq!((there.state, there.host.name), (OwnerState::Held, format!("host-{host}")));
            fill(&image, host).await.unwrap();
            image.close().await.unwrap();
            assert_eq!(read(&path).unwrap().unwrap().state, OwnerState::Released);
        }
        // The generation that was told, and no other.
        let holding = Holding::take(&path, &claim(2), Some(5));
        assert!(matches!(holding, Err(OwnerError::Generation { expected: 5, found: 7 })));
        assert_eq!(Holding::take(&path, &claim(2), Some(7)).unwrap().unwrap().record().generation, 8);
    });
}

#[test]
fn what_another_host_holds_is_refused_and_ones_own_is_taken_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    make(&path, Format::Raw);
    share(&path, &claim(1)).unwrap();
    // Died, and left it held.
    let holding = Holding::take(&path, &claim(1), None).unwrap().unwrap();
    drop(holding);
    let at = path.clone();
    run(async move |io| {
        let e = opened(&io, &at, 2).await.unwrap_err();
        assert!(matches!(e.what, OpenErrorKind::Owned(_)), "{e}");
        assert!(e.next_step().unwrap().contains("tcmu-dif image owner --take-over"), "{:?}", e.next_step());
        assert_eq!(
            crate::lun::chain(&e),
            format!("{}: cannot be taken: host host-1 has it (generation 2)", at.display())
        );
        // Whoever only wants to change the file is refused too.
        assert!(open(&io, &at, &OpenOptions::default()).await.is_err());
        let began = Instant::now();
        let image = opened(&io, &at, 1).await.unwrap();
        assert!(began.elapsed() < SHORT);
        image.close().await.unwrap();
    });
}

#[test]
fn what_could_not_be_opened_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path, Format::Qcow2);
    share(&path, &claim(1)).unwrap();
    // An L1 table that lies nowhere.
    fs::File::options().write(true).open(&path).unwrap().write_all_at(&[0x7f; 8], 40).unwrap();
    let at = path.clone();
    run(async move |io| {
        assert!(opened(&io, &at, 1).await.is_err());
        assert!(!io.is_fenced_off());
    });
    assert_eq!(read(&path).unwrap().unwrap().state, OwnerState::Released);
}

#[test]
fn one_that_lives_is_not_taken_from_unless_by_force_and_then_it_stops() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    make(&path, Format::Raw);
    share(&path, &claim(1)).unwrap();
    static LOST: AtomicUsize = AtomicUsize::new(0);
    let holding = Holding::take(&path, &claim(1), None).unwrap().unwrap();
    let keeper = Keeper::begin(holding, &path, || {
        LOST.fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    let alive = take_over(&path, &claim(2), false).unwrap_err();
    assert!(matches!(alive, OwnerError::Alive(_)), "{alive}");
    let began = Instant::now();
    let free = take_over(&path, &claim(2), true).unwrap();
    assert!(began.elapsed() > SHORT, "an old holder may have gone on for as long");
    assert_eq!((free.state, free.generation), (OwnerState::Released, 4));
    assert_eq!(keeper.fence().standing(), crate::sys::fence::Standing::Lost);
    assert_eq!(LOST.load(Ordering::SeqCst), 1);
    assert!(keeper.release().is_err());
    assert_eq!(read(&path).unwrap().unwrap(), free, "the old holder changes nothing");
}

#[test]
fn a_take_over_that_was_cut_off_leaves_the_image_to_nobody_until_it_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    make(&path, Format::Raw);
    share(&path, &claim(1)).unwrap();
    drop(Holding::take(&path, &claim(1), None).unwrap());
    let file = OwnerFile::open(&path).unwrap().unwrap();
    file.write_record(&claim(2).record(OwnerState::TakingOver, 3)).unwrap();
    for host in [1, 2] {
        assert!(matches!(Holding::take(&path, &claim(host), None), Err(OwnerError::HalfTaken(_))));
    }
    let began = Instant::now();
    assert_eq!(take_over(&path, &claim(2), false).unwrap().generation, 5);
    assert!(began.elapsed() > SHORT);
    assert!(Holding::take(&path, &claim(2), None).is_ok());
}

/// The name of the image, for the process that is the old owner.
pub(super) const OLD_OWNER: &str = "TCMU_DIF_TEST_OLD_OWNER";
/// Its lease, in milliseconds, if it is not the usual one.
pub(super) const OLD_LEASE: &str = "TCMU_DIF_TEST_OLD_LEASE";

/// Writes for as long as it may. Its locks are gone, as a server drops those of a host that it does not hear of. Between two writes it stands still while it is told
/// to: what the kernel has been given before it is stopped is the kernel's, and no look of ours brings it back.
pub(super) fn be_the_old_owner(path: &Path) {
    let path = path.to_owned();
    run(async move |io| {
        let image = opened(&io, &path, 1).await.unwrap();
        image.locks.borrow_mut().clear();
        fs::write(path.with_extension("writing"), "").unwrap();
        loop {
            fill(&image, 0xaa).await.unwrap();
            // Which is a write to metadata too, now and then.
            image.discard(ByteOffset(0), SIZE / 2).await.unwrap();
            image.flush().await.unwrap();
            while path.with_extension("hold").exists() {
                fs::write(path.with_extension("held"), "").unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

/// SIGSTOP, and waits until its threads stand still: a system call that one of them is in goes on until it ends. Those of the kernel's own making may
/// not, and are waited for in vain.
pub(super) fn stop(process: &Child) -> Pid {
    let pid = Pid::from_raw(process.id() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let stands = |task: io::Result<fs::DirEntry>| {
        let stat = task.and_then(|task| fs::read_to_string(task.path().join("stat")));
        stat.is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T')))
    };
    let tasks = format!("/proc/{}/task", process.id());
    let end = Instant::now() + Duration::from_secs(2);
    while !fs::read_dir(&tasks).unwrap().all(stands) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    pid
}

#[track_caller]
pub(super) fn wait_for(path: &Path) {
    let end = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(Instant::now() < end, "{} does not come", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_old_owner_that_was_stopped_and_goes_on_never_writes_again() {
    if let Some(path) = std::env::var_os(OLD_OWNER) {
        return be_the_old_owner(Path::new(&path));
    }
    for (round, format) in [Format::Raw, Format::Qcow2, Format::Raw, Format::Qcow2].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        make(&path, format);
        share(&path, &claim(1)).unwrap();
        let name = "image::owner::tests::an_old_owner_that_was_stopped_and_goes_on_never_writes_again";
        let old = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(OLD_OWNER, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for(&path.with_extension("writing"));
        // Longer than its lease, in the last round: it has lived by looking again.
        std::thread::sleep(SHORT * (2 * round as u32) / 3);
        fs::write(path.with_extension("hold"), "").unwrap();
        wait_for(&path.with_extension("held"));
        let pid = stop(&old);
        fs::remove_file(path.with_extension("hold")).unwrap();
        let free = take_over(&path, &claim(2), false).unwrap();
        assert_eq!(free.generation, 4);
        let at = path.clone();
        run(async move |io| {
            let image = opened(&io, &at, 2).await.unwrap();
            fill(&image, 0xbb).await.unwrap();
            image.flush().await.unwrap();
            let before = fs::read(&at).unwrap();
            kill_process(pid, Signal::CONT).unwrap();
            let ended = old.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            // On threads an operation may hear of it before the loop does.
            let told = ["another owner has taken the image over", "Stale file handle"]
                .iter()
                .any(|w| said.contains(w));
            assert!(!ended.status.success() && told, "{said}");
            assert!(fs::read(&at).unwrap() == before, "the old owner has written to a {format} image");
            image.close().await.unwrap();
        });
        assert_eq!(read(&path).unwrap().unwrap().generation, 6);
    }
}
