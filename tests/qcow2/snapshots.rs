//! Random work with internal snapshots in flight: each is one point in time, it never changes, and QEMU reads the same of it;
//! the disk goes back to one, grows and shrinks; and QEMU goes on with the image between the rounds.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use tcmu_dif::{
    image::qcow2::{Qcow2, SnapshotError},
    sys::{
        exec::{join, yield_now},
        mem::Buffer,
    },
    units::ByteOffset,
    volume::{IoErrorKind, Volume},
};

use crate::{
    model::{BLOCK, Frozen, Model, Settled},
    support::{
        Rng, check_clean, open, qemu_converts_snapshot, qemu_img, qemu_io, qemu_reads, qemu_reads_snapshot,
        run, scale,
    },
    work::{Work, read_disk},
};

/// What is known of a snapshot.
enum Content {
    /// What it may hold.
    May(Frozen),
    /// What it holds, read once: it never changes again.
    Is(Vec<u8>),
}

impl Content {
    /// Judges it, and holds it to what it was.
    fn settle(&mut self, bytes: Vec<u8>, whose: &str) {
        match self {
            Content::May(frozen) => frozen.judge(&bytes).unwrap_or_else(|e| panic!("{whose}: {e}")),
            Content::Is(known) => assert!(*known == bytes, "{whose} has changed"),
        }
        *self = Content::Is(bytes);
    }
}

/// Judges every snapshot by what QEMU reads: one that has been read before by the part that `convert -l` shows of it.
fn settle_all(case: &Case, known: &mut Known, when: &str) {
    for (name, content) in known {
        let whose = format!("seed {}, {when}, {name}", case.seed);
        match content {
            Content::May(_) => content.settle(qemu_reads_snapshot(&case.path, name), &whose),
            Content::Is(bytes) => {
                let now = qemu_converts_snapshot(&case.path, name);
                let both = now.len().min(bytes.len());
                assert!(now[..both] == bytes[..both], "{whose} has changed");
            }
        }
    }
}

type Known = BTreeMap<String, Content>;

struct Case {
    path: PathBuf,
    seed: u64,
    longest: u64,
    resizes: bool,
}

/// Work at queue depth 64, and snapshots made and deleted meanwhile.
async fn work(image: &Qcow2, base: Vec<u8>, case: &Case, round: u64, known: &RefCell<Known>) -> Model {
    let seed = case.seed * 1000 + round;
    let model = Model::new(base);
    let work = Work {
        volume: image,
        model: &model,
        blocks: image.limits().capacity / BLOCK,
        longest: case.longest,
        rng: RefCell::new(Rng::new(seed)),
        left: Cell::new(300 * scale()),
        may_fail: false,
    };
    let busy = Cell::new(true);
    let working = async {
        work.run(64).await;
        busy.set(false);
    };
    let snapping = async {
        let mut rng = Rng::new(seed + 7);
        for number in 0..4 {
            for _ in 0..rng.below(400) {
                if busy.get() {
                    yield_now().await;
                }
            }
            let name = format!("s{seed}-{number}");
            let began = model.flush_begins();
            image.snapshot_create(&name, SystemTime::now()).await.unwrap();
            known.borrow_mut().insert(name, Content::May(model.freeze(began)));
            if rng.one_in(3) {
                let name = pick(&known.borrow(), &mut rng);
                image.snapshot_delete(&name).await.unwrap();
                known.borrow_mut().remove(&name);
            }
        }
    };
    join(working, snapping).await;
    model
}

fn pick(known: &Known, rng: &mut Rng) -> String {
    known.keys().nth(rng.below(known.len() as u64) as usize).unwrap().clone()
}

/// A round of ours: work, then a return to some snapshot, other sizes, more work. Gives the disk as it is at the end.
async fn our_round(image: &Qcow2, case: &Case, round: u64, known: &RefCell<Known>, base: Vec<u8>) -> Vec<u8> {
    let mut rng = Rng::new(case.seed * 77 + round);
    let model = work(image, base, case, round * 2, known).await;
    let mut disk = read_disk(image).await.unwrap();
    model.judge_disk(&disk, Settled::Ended).unwrap();
    if rng.one_in(2) {
        let name = pick(&known.borrow(), &mut rng);
        image.snapshot_apply(&name).await.unwrap();
        disk = read_disk(image).await.unwrap();
        known.borrow_mut().get_mut(&name).unwrap().settle(disk.clone(), &name);
    }
    if case.resizes {
        for _ in 0..2 {
            // Anywhere, also within a cluster, and up again over what was cut off.
            let less = (1 + rng.below(disk.len() as u64 / 512 / 2)) * 512;
            let less = disk.len() as u64 - less;
            image.shrink(less).await.unwrap();
            disk.truncate(less as usize);
            assert!(read_disk(image).await.unwrap() == disk);
            let more = less + rng.below(8000) * 512;
            image.resize(more).await.unwrap();
            disk.resize(more as usize, 0);
            assert!(read_disk(image).await.unwrap() == disk);
        }
    }
    let model = work(image, disk, case, round * 2 + 1, known).await;
    let disk = read_disk(image).await.unwrap();
    model.judge_disk(&disk, Settled::Ended).unwrap();
    disk
}

/// The image after a clean close: without errors or leaks, and QEMU reads the disk and every snapshot as we do.
fn judge(case: &Case, known: &mut Known, disk: &[u8]) {
    check_clean(&case.path);
    assert!(qemu_reads(&case.path) == disk, "seed {}: QEMU reads another disk", case.seed);
    settle_all(case, known, "after us");
}

/// QEMU goes on with it.
fn qemus_round(case: &Case, round: u64, known: &mut Known, disk: &[u8]) {
    let name = case.path.to_str().unwrap();
    let mut rng = Rng::new(case.seed * 31 + round);
    let last = disk.len() / 512 * 512 - 2048;
    let ours = format!("q{round}");
    qemu_img(&["snapshot", "-c", &ours, name]);
    known.insert(ours, Content::Is(disk.to_vec()));
    qemu_io(
        &case.path,
        &[
            "write -P 0x11 3k 5k",
            "write -z 64k 100k",
            "discard 200k 70k",
            &format!("write -P 0x22 {last} 1536"),
        ],
    );
    let gone = pick(known, &mut rng);
    qemu_img(&["snapshot", "-d", &gone, name]);
    known.remove(&gone);
    if rng.one_in(2) && !known.is_empty() {
        let back = pick(known, &mut rng);
        qemu_img(&["snapshot", "-a", &back, name]);
    }
    check_clean(&case.path);
    settle_all(case, known, "after QEMU");
}

fn rounds(case: Case) {
    let mut known = Known::new();
    for round in 0..1 + scale().min(3) {
        let base = qemu_reads(&case.path);
        let path = case.path.clone();
        let case_here = Case { path: path.clone(), ..case };
        let (disk, mut now) = tcmu_dif::sys::run(async move |io| {
            let image = open(&io, &path).await;
            let known = RefCell::new(known);
            let disk = our_round(&image, &case_here, round, &known, base).await;
            assert_eq!(image.snapshots().len(), known.borrow().len());
            image.close().await.unwrap();
            (disk, known.into_inner())
        });
        judge(&case, &mut now, &disk);
        qemus_round(&case, round, &mut now, &disk);
        known = now;
    }
}

const ODD: u64 = (3 << 20) + 512 * 13;

fn case(seed: u64, options: &str, size: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    if options.contains("base.raw") {
        let bytes: Vec<u8> = (0..(2 << 20) + 777).map(|i| (i / 512 * 7 + i % 251) as u8 | 1).collect();
        std::fs::write(dir.path().join("base.raw"), bytes).unwrap();
    }
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &size.to_string()]);
    let resizes = !options.contains("0.10");
    rounds(Case { path, seed, longest: 300, resizes });
}

#[test]
fn snapshots_of_64k_clusters() {
    case(1, "compat=1.1", ODD);
}

#[test]
fn snapshots_of_4k_clusters() {
    case(2, "cluster_size=4k", ODD);
}

#[test]
fn snapshots_of_512_byte_clusters_with_64_bit_refcounts() {
    case(3, "cluster_size=512,refcount_bits=64", ODD / 2 / 512 * 512);
}

#[test]
fn snapshots_of_4k_clusters_with_8_bit_refcounts() {
    case(4, "cluster_size=4k,refcount_bits=8", ODD);
}

#[test]
fn snapshots_of_2m_clusters() {
    case(5, "cluster_size=2M", (9 << 20) + 1024);
}

#[test]
fn snapshots_of_version_2() {
    case(6, "compat=0.10,cluster_size=4k", ODD);
}

#[test]
fn snapshots_with_subclusters() {
    case(21, "extended_l2=on,cluster_size=16k", ODD);
}

#[test]
fn snapshots_with_subclusters_over_a_backing_file() {
    case(22, "extended_l2=on,cluster_size=32k,backing_file=base.raw,backing_fmt=raw", ODD);
}

#[test]
fn snapshots_over_a_backing_file() {
    case(7, "cluster_size=4k,backing_file=base.raw,backing_fmt=raw", ODD);
}

#[test]
fn snapshots_of_version_2_with_512_byte_clusters_over_a_backing_file() {
    case(8, "compat=0.10,cluster_size=512,backing_file=base.raw,backing_fmt=raw", ODD / 2 / 512 * 512);
}

#[test]
fn snapshots_of_compressed_clusters() {
    for (seed, options) in [(9, "cluster_size=16k"), (10, "cluster_size=64k,compression_type=zstd")] {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("from.raw");
        let bytes: Vec<u8> = (0..ODD).map(|i| (i / 512 * 7 + i % 251) as u8 | 1).collect();
        std::fs::write(&raw, bytes).unwrap();
        let path = dir.path().join("disk.qcow2");
        let (raw, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, name]);
        rounds(Case { path, seed, longest: 300, resizes: true });
    }
}

/// An image with some data, by QEMU.
fn some(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "2M"]);
    qemu_io(&path, &["write -P 7 0 600k", "write -P 8 1M 300k"]);
    path
}

#[test]
fn a_second_reference_that_does_not_fit_is_refused_and_nothing_is_changed() {
    for (bits, most) in [(1, 0), (2, 2), (4, 14)] {
        let dir = tempfile::tempdir().unwrap();
        let path = some(dir.path(), &format!("refcount_bits={bits},cluster_size=4k"));
        let before = qemu_reads(&path);
        let at = path.clone();
        tcmu_dif::sys::run(async move |io| {
            let image = open(&io, &at).await;
            for number in 0..most {
                image.snapshot_create(&format!("s{number}"), SystemTime::now()).await.unwrap();
            }
            let e = image.snapshot_create("one too many", SystemTime::now()).await.unwrap_err();
            let SnapshotError::Io(e) = e else { panic!("{e}") };
            assert_eq!(e.kind, IoErrorKind::Unsupported);
            assert!(e.to_string().contains(&format!("refcounts of {bits} bits")), "{e}");
            // It goes on as if nothing had been.
            let data = Buffer::from_slice(&[7; 4096]).sg();
            image.write(ByteOffset(0), &data, Default::default()).await.unwrap();
            assert_eq!(image.snapshots().len(), most);
            image.close().await.unwrap();
        });
        check_clean(&path);
        assert!(qemu_reads(&path) == before);
    }
}

#[test]
fn an_image_without_data_has_snapshots_whatever_its_refcounts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path.to_str().unwrap(), "1M"]);
    let at = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        image.snapshot_create("empty", SystemTime::now()).await.unwrap();
        let data = Buffer::from_slice(&[7; 4096]).sg();
        image.write(ByteOffset(0), &data, Default::default()).await.unwrap();
        image.snapshot_apply("empty").await.unwrap();
        assert!(read_disk(&image).await.unwrap().iter().all(|b| *b == 0));
        image.snapshot_delete("1").await.unwrap();
        image.close().await.unwrap();
    });
    check_clean(&path);
}

#[test]
fn names_that_mean_nothing_or_too_much_are_refused_and_the_image_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = some(dir.path(), "cluster_size=4k");
    for name in ["twin", "twin", "1"] {
        qemu_img(&["snapshot", "-c", name, path.to_str().unwrap()]);
    }
    let before = std::fs::read(&path).unwrap();
    let at = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        for which in ["twin", "1", "nothing", "snapshot.id=9", "snapshot.name=2"] {
            let apply = image.snapshot_apply(which).await.unwrap_err();
            let delete = image.snapshot_delete(which).await.unwrap_err();
            assert_eq!(apply.to_string(), delete.to_string());
            let ambiguous = matches!(apply, SnapshotError::Ambiguous { .. });
            assert_eq!(ambiguous, ["twin", "1"].contains(&which), "{apply}");
        }
        for name in ["twin", "", "a\u{7}"] {
            let e = image.snapshot_create(name, SystemTime::now()).await.unwrap_err();
            assert!(matches!(e, SnapshotError::Name { .. }), "{e}");
        }
        image.close().await.unwrap();
    });
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn entries_that_we_do_not_know_all_of_are_kept_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = some(dir.path(), "cluster_size=4k");
    let name = path.to_str().unwrap();
    qemu_img(&["snapshot", "-c", "theirs", name]);
    // 16 more bytes of extra data than anybody knows today.
    let mut bytes = std::fs::read(&path).unwrap();
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let mut entry = bytes[at..at + 40 + 24 + 1 + 6].to_vec();
    entry[36..40].copy_from_slice(&40u32.to_be_bytes());
    entry[32..36].copy_from_slice(&99u32.to_be_bytes());
    entry.splice(64..64, *b"from the future!");
    bytes.resize(bytes.len().max(at + entry.len()).next_multiple_of(4096), 0);
    bytes[at..at + entry.len()].copy_from_slice(&entry);
    std::fs::write(&path, &bytes).unwrap();
    let at = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        image.snapshot_create("ours", SystemTime::now()).await.unwrap();
        image.snapshot_create("other", SystemTime::now()).await.unwrap();
        image.snapshot_delete("ours").await.unwrap();
        image.close().await.unwrap();
    });
    check_clean(&path);
    let bytes = std::fs::read(&path).unwrap();
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    assert_eq!(bytes[at..at + entry.len()], entry);
    let list = qemu_img(&["snapshot", "-l", name]);
    assert!(list.contains("theirs") && list.contains("other") && !list.contains("ours "), "{list}");
}

#[test]
fn a_snapshot_brings_the_size_of_its_disk_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = some(dir.path(), "cluster_size=512");
    let at = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        let small = read_disk(&image).await.unwrap();
        image.snapshot_create("small", SystemTime::now()).await.unwrap();
        image.resize(40 << 20).await.unwrap();
        let data = Buffer::from_slice(&[3; 8192]).sg();
        image.write(ByteOffset((40 << 20) - 8192), &data, Default::default()).await.unwrap();
        let large = read_disk(&image).await.unwrap();
        image.snapshot_create("large", SystemTime::now()).await.unwrap();
        for (name, disk) in [("small", &small), ("large", &large), ("small", &small)] {
            image.snapshot_apply(name).await.unwrap();
            assert_eq!(image.limits().capacity, disk.len() as u64);
            assert!(read_disk(&image).await.unwrap() == *disk, "{name}");
        }
        // What lies beyond is not there.
        assert!(image.write(ByteOffset(2 << 20), &data, Default::default()).await.is_err());
        image.snapshot_delete("large").await.unwrap();
        image.close().await.unwrap();
    });
    check_clean(&path);
    assert_eq!(qemu_reads(&path).len(), 2 << 20);
}

#[test]
fn a_disk_cut_shorter_frees_its_clusters_and_shows_nothing_of_them_when_it_grows() {
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "compat=0.10,cluster_size=4k",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=64k",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "8M"]);
        qemu_io(&path, &["write -P 7 0 8M"]);
        let at = path.clone();
        tcmu_dif::sys::run(async move |io| {
            let image = open(&io, &at).await;
            assert_eq!(image.resize(1 << 20).await.unwrap_err().kind, IoErrorKind::Unsupported);
            for bad in [0, 9 << 20] {
                assert_eq!(image.shrink(bad).await.unwrap_err().kind, IoErrorKind::OutOfRange);
            }
            image.shrink((1 << 20) + 1536).await.unwrap();
            assert!(read_disk(&image).await.unwrap() == vec![7; (1 << 20) + 1536]);
            image.close().await.unwrap();
        });
        check_clean(&path);
        // QEMU lets it grow.
        qemu_img(&["resize", "-f", "qcow2", name, "8M"]);
        let disk = qemu_reads(&path);
        assert!(disk[..(1 << 20) + 1536].iter().all(|b| *b == 7), "{options}");
        assert!(disk[(1 << 20) + 1536..].iter().all(|b| *b == 0), "{options}");
        check_clean(&path);
        let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
        // Tables of such clusters are no less.
        let most = if options == "cluster_size=2M" { 10 << 20 } else { 3 << 20 };
        assert!(used < most, "{options}: {used} bytes are still in use");
    }
}

#[test]
fn a_version_2_image_with_snapshots_keeps_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = some(dir.path(), "compat=0.10");
    let at = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        image.snapshot_create("one", SystemTime::now()).await.unwrap();
        assert_eq!(image.shrink(1 << 20).await.unwrap_err().kind, IoErrorKind::Unsupported);
        assert_eq!(image.resize(4 << 20).await.unwrap_err().kind, IoErrorKind::Unsupported);
        image.close().await.unwrap();
    });
    check_clean(&path);
    let out = run("qemu-img", &["resize", "--shrink", path.to_str().unwrap(), "1M"]);
    assert!(!out.status.success(), "QEMU has learnt it");
}

#[test]
fn vm_state_does_not_appear_when_the_disk_grows() {
    // What loadvm leaves behind: L2 tables beyond the disk's end. qemu-io writes there as VM state does where it can.
    let dir = tempfile::tempdir().unwrap();
    let path = some(dir.path(), "cluster_size=512");
    let name = path.to_str().unwrap().to_owned();
    let saved =
        Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -b -P 9 0 64k", &name]).output().unwrap();
    assert!(saved.status.success());
    let at = path.clone();
    let before = qemu_reads(&path);
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        image.snapshot_create("with VM state", SystemTime::now()).await.unwrap();
        image.snapshot_apply("with VM state").await.unwrap();
        image.resize(6 << 20).await.unwrap();
        let disk = read_disk(&image).await.unwrap();
        assert!(disk[..2 << 20] == before && disk[2 << 20..].iter().all(|b| *b == 0));
        image.close().await.unwrap();
    });
    check_clean(&path);
}

#[test]
fn vm_state_does_not_appear_when_the_disk_grows_without_a_snapshot_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let path = some(dir.path(), "cluster_size=512");
    qemu_io(&path, &["write -b -P 9 0 64k"]);
    let at = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        image.resize(6 << 20).await.unwrap();
        assert!(read_disk(&image).await.unwrap()[2 << 20..].iter().all(|b| *b == 0));
        image.close().await.unwrap();
    });
    check_clean(&path);
}

#[test]
fn snapshots_that_come_and_go_leave_the_file_as_large_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = some(dir.path(), "cluster_size=4k");
    let at = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &at).await;
        let len = || std::fs::metadata(&at).unwrap().len();
        let mut after_some = 0;
        for round in 0..160u64 {
            image.snapshot_create("comes and goes", SystemTime::now()).await.unwrap();
            let data = Buffer::from_slice(&[round as u8; 64 << 10]).sg();
            image.write(ByteOffset(round % 16 * 65536), &data, Default::default()).await.unwrap();
            if round % 3 == 0 {
                image.snapshot_apply("comes and goes").await.unwrap();
            }
            image.snapshot_delete("comes and goes").await.unwrap();
            if round == 60 {
                after_some = len();
            }
        }
        assert!(len() <= after_some, "{after_some} and then {}", len());
        image.close().await.unwrap();
    });
    check_clean(&path);
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
    assert!(used < 2 << 20, "{used} bytes are in use");
}

/// What a QEMU before version 3 left, or a damaged entry: no guess is made.
#[test]
fn a_snapshot_whose_tables_are_damaged_is_refused_and_the_disk_stays() {
    for (what, value) in [("no table", 0x8200u64), ("beyond the end", 1 << 40), ("the header", 0x1000)] {
        let dir = tempfile::tempdir().unwrap();
        let path = some(dir.path(), "cluster_size=4k");
        let at = path.clone();
        tcmu_dif::sys::run(async move |io| {
            let image = open(&io, &at).await;
            image.snapshot_create("bad", SystemTime::now()).await.unwrap();
            image.close().await.unwrap();
        });
        let mut bytes = std::fs::read(&path).unwrap();
        let be = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let l1 = be(be(64));
        bytes[l1..l1 + 8].copy_from_slice(&value.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let before = qemu_reads(&path);
        for act in ["apply", "delete"] {
            std::fs::write(&path, &bytes).unwrap();
            let at = path.clone();
            tcmu_dif::sys::run(async move |io| {
                let image = open(&io, &at).await;
                let result = match act {
                    "apply" => image.snapshot_apply("bad").await,
                    _ => image.snapshot_delete("bad").await,
                };
                let Err(SnapshotError::Io(e)) = result else { panic!("{what}, {act}: {result:?}") };
                assert_eq!(e.kind, IoErrorKind::Corrupt, "{what}, {act}: {e}");
                assert!(read_disk(&image).await.is_ok());
                image.close().await.unwrap();
            });
            assert!(qemu_reads(&path) == before, "{what}, {act}");
        }
    }
}
