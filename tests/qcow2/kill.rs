//! A process that works on an image is killed with SIGKILL, again and again: what was acknowledged is there, flushed or not, and
//! the image has no errors.

use std::{
    cell::{Cell, RefCell},
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    model::{BLOCK, Model, Settled},
    support::{FULL, Rng, check_leaks_at_most, open, qemu_img, scale},
    work::{Work, read_disk},
};

const VICTIM: &str = "TCMU_DIF_TEST_VICTIM";
const SIZE: u64 = (3 << 20) + 512 * 5;

fn diary_of(image: &Path) -> PathBuf {
    image.with_extension("diary")
}

/// Works until it is killed, and writes down what it begins and what has ended. Run by the test below, as a process of its own.
#[test]
#[ignore = "the process that is killed; the test beside it runs it"]
fn victim() {
    let Ok(image) = env::var(VICTIM).map(PathBuf::from) else { return };
    let seed = u64::from(std::process::id());
    tcmu_dif::sys::run(async move |io| {
        let volume = open(&io, &image).await;
        // The judge knows what the image held; here only the operations count.
        let diary = fs::File::create(diary_of(&image)).unwrap();
        let model = Model::new(vec![0; SIZE as usize]).with_diary(diary);
        let work = Work {
            volume: &volume,
            model: &model,
            blocks: SIZE / BLOCK,
            longest: 300,
            rng: RefCell::new(Rng::new(seed)),
            left: Cell::new(u64::MAX),
            may_fail: false,
        };
        work.only_changes(16).await;
    });
}

/// The process that works; it does not outlive the test.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One life: gives the number of operations that it began.
fn life(image: &Path, rng: &mut Rng) -> usize {
    let base = disk(image);
    let _ = fs::remove_file(diary_of(image));
    let victim = Command::new(env::current_exe().unwrap())
        .args(["--exact", "kill::victim", "--ignored", "--nocapture"])
        .env(VICTIM, image)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut victim = Victim(victim);
    let begun = Instant::now();
    while !fs::metadata(diary_of(image)).is_ok_and(|meta| meta.len() > 0) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the process does not begin to work");
        assert!(victim.0.try_wait().unwrap().is_none(), "the process ended by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_micros(rng.below(40_000)));
    victim.0.kill().unwrap();
    assert!(!victim.0.wait().unwrap().success());
    let diary = fs::read_to_string(diary_of(image)).unwrap();
    let model = Model::new(base);
    model.relive(&diary);
    model.judge_disk(&disk(image), Settled::Ended).unwrap_or_else(|e| panic!("{}: {e}", image.display()));
    diary.lines().count()
}

/// What the guest sees.
fn disk(image: &Path) -> Vec<u8> {
    let image = image.to_owned();
    tcmu_dif::sys::run(async move |io| read_disk(&open(&io, &image).await).await.unwrap())
}

#[test]
fn what_was_acknowledged_outlives_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let kills = if scale() == FULL { 100 } else { 4 * scale() };
    let mut operations = 0;
    let kinds = [
        "compat=1.1",
        "cluster_size=4k,refcount_bits=1",
        "compat=0.10,cluster_size=512",
        "cluster_size=64k,extended_l2=on,backing_file=base.raw,backing_fmt=raw",
        "cluster_size=4k,data_file=DATA",
    ];
    fs::write(dir.path().join("base.raw"), vec![0x55; 2 << 20]).unwrap();
    for (seed, options) in (1..).zip(kinds) {
        let image = dir.path().join(format!("{seed}.qcow2"));
        let data = dir.path().join(format!("{seed}.data"));
        let options = options.replace("DATA", data.to_str().unwrap());
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            image.to_str().unwrap(),
            &SIZE.to_string(),
        ]);
        let mut rng = Rng::new(seed);
        for _ in 0..kills {
            operations += life(&image, &mut rng);
        }
        check_leaks_at_most(&image);
    }
    println!("{} kills, {operations} operations begun or ended", kills * kinds.len() as u64);
    assert!(operations > 1000);
}
