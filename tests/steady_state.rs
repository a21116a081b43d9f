//! What a command costs a LUN's thread once it is warm: no allocation, and no system call but one to submit and one kick for a batch of
//! answers. Counted by an allocator that counts, by the thread's own counters, and by the kernel's.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tcmu_dif::{
    image::{
        create::{create_qcow2, create_raw},
        null,
        open::{OpenOptions, open},
        qcow2::CreateOptions,
    },
    lun::{LunHandle, LunParams, Stats, config::DeviceConfig, start},
    peer::load::{Load, Run},
    pi::{
        PiMode, PiType,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    sys::{
        self, backend_from_env,
        count::{Counting, allocations},
        io::Backend,
        mem::Buffer,
    },
    units::{BlockSize, ByteOffset},
    volume::{Volume, WriteFlags},
};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tests take turns: they find their thread by its name.
static TURN: Mutex<()> = Mutex::new(());

const CAPACITY: u64 = 16 << 20;
const WARM: u64 = 20_000;
const COUNTED: u64 = 50_000;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Image {
    Null,
    Raw,
    Qcow2,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    image: Image,
    pi: Option<PiMode>,
    write: bool,
    depth: u16,
    bytes: usize,
}

/// What a command came to.
#[derive(Debug)]
struct Cost {
    allocations: u64,
    commands: u64,
    batches: u64,
    sleeps: u64,
    enters: u64,
    kicks: u64,
    reads: u64,
    operations: u64,
    /// What the kernel has counted for the thread: read and write, if it tells.
    kernel: Option<(u64, u64)>,
}

fn make(case: Case, dir: &Path) -> PathBuf {
    let path = match case.image {
        Image::Null => return null::PATH.into(),
        Image::Raw => dir.join("disk.raw"),
        Image::Qcow2 => dir.join("disk.qcow2"),
    };
    let made = path.clone();
    sys::run(async move |io| {
        match case.image {
            Image::Qcow2 => create_qcow2(&io, &made, &CreateOptions::new(CAPACITY)).await.unwrap(),
            _ => create_raw(&io, &made, CAPACITY).await.unwrap(),
        };
        // Every cluster is there.
        let image = open(&io, &made, &OpenOptions::default()).await.unwrap();
        let data = Buffer::from_slice(&vec![0x5a; 1 << 20]).sg();
        for at in (0..CAPACITY).step_by(1 << 20) {
            image.write(ByteOffset(at), &data, WriteFlags::default()).await.unwrap();
        }
        image.close().await.unwrap();
        let Some(mode) = case.pi else { return };
        let new = NewSidecar {
            block_size: BlockSize::B512,
            kind: PiType::Type1,
            mode,
            capacity: BlockSize::B512.blocks_in(CAPACITY),
            format: if case.image == Image::Qcow2 { ImageFormat::Qcow2 } else { ImageFormat::Raw },
            stamp: Stamp::of(&made).unwrap(),
        };
        tools::create(&io, &made, &default_path(&made), new).await.unwrap();
    });
    path
}

fn task(name: &str) -> u32 {
    let all = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let mut ours =
        all.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name));
    ours.next().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// Documentation/filesystems/proc.rst, 3.3: syscr and syscw.
fn kernels_count(task: u32) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/self/task/{task}/io")).ok()?;
    let word = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.trim().parse().ok());
    Some((word("syscr:")?, word("syscw:")?))
}

/// A LUN with its load.
struct Rig {
    load: Load,
    lun: LunHandle,
    thread: u32,
}

impl Rig {
    fn new(case: Case, path: &Path) -> Rig {
        let mut config = DeviceConfig::new(path);
        config.pi = case.pi.map(|_| PiType::Type1);
        let blocks = (case.bytes / 512) as u32;
        let cdb = |id: u16| {
            let mut cdb = [0; 16];
            cdb[0] = if case.write { 0x8a } else { 0x88 };
            cdb[2..10].copy_from_slice(&(u64::from(id) * 2 * u64::from(blocks)).to_be_bytes());
            cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
            cdb
        };
        let load = Load::new(case.depth, case.bytes, cdb).unwrap();
        let lun = start(LunParams {
            name: "steady".into(),
            config,
            block_size: BlockSize::B512,
            capacity: CAPACITY,
            write_cache: true,
            serial: Some("steady".into()),
            state_dir: None,
            backend: Some(backend_from_env()),
            polling: true,
            neighbourhood: Default::default(),
            device: load.device().unwrap(),
        })
        .unwrap();
        let mut rig = Rig { load, lun, thread: task("lun-steady") };
        // One of them gets the unit attention of a power on.
        assert!(rig.run(u64::from(case.depth)).failed <= 1);
        rig
    }

    fn run(&mut self, commands: u64) -> Run {
        self.load.run(commands, Duration::from_secs(120), None, false).unwrap()
    }
}

/// What commands of a warm LUN cost.
fn cost(case: Case) -> Cost {
    let dir = tempfile::tempdir().unwrap();
    let path = make(case, dir.path());
    if !case.write {
        // Where there is protection, the blocks have their tuples.
        let rig = Rig::new(Case { write: true, ..case }, &path);
        rig.lun.stop().unwrap();
    }
    let mut rig = Rig::new(case, &path);
    assert_eq!(rig.run(WARM).failed, 0);
    // To ask for the counters allocates, so that is counted between.
    let before: Stats = rig.lun.stats().unwrap();
    let (begun, kernel) = (allocations(rig.thread), kernels_count(rig.thread));
    let ran = rig.run(COUNTED);
    assert_eq!(ran.failed, 0);
    let (allocated, kernel_after) = (allocations(rig.thread) - begun, kernels_count(rig.thread));
    let after = rig.lun.stats().unwrap();
    rig.lun.stop().unwrap();
    let (then, now) = (before.calls, after.calls);
    Cost {
        allocations: allocated,
        commands: ran.commands,
        batches: after.batches - before.batches,
        sleeps: after.sleeps - before.sleeps,
        enters: now.enters - then.enters,
        kicks: now.kicks - then.kicks,
        reads: now.reads - then.reads,
        operations: now.operations - then.operations,
        kernel: kernel.zip(kernel_after).map(|(a, b)| (b.0 - a.0, b.1 - a.1)),
    }
}

const PLAIN: Case = Case { image: Image::Null, pi: None, write: false, depth: 32, bytes: 4096 };

/// Lists that grow to their largest do so once; that may be while it is counted.
const GROWTH: u64 = 16;

#[test]
fn a_command_allocates_nothing_and_a_batch_takes_one_submission_and_one_kick() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for image in [Image::Null, Image::Raw, Image::Qcow2] {
        for (write, depth) in [(false, 32), (true, 32), (false, 1), (true, 200)] {
            let case = Case { image, write, depth, ..PLAIN };
            let cost = cost(case);
            println!("{case:?}: {cost:?}");
            assert!(cost.allocations <= GROWTH, "{case:?}: {cost:?}");
            assert_calls(case, &cost);
        }
    }
}

/// Tuples are read into memory of their own, and made in such; now and then those who write them look for neighbours to share a write.
#[test]
fn a_command_with_protection_allocates_a_few_times_and_no_more() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let most = [((PiMode::Bitmap, false), 1.1), ((PiMode::Bitmap, true), 1.3)];
    for ((mode, write), most) in most {
        for image in [Image::Raw, Image::Qcow2] {
            let case = Case { image, write, pi: Some(mode), ..PLAIN };
            let cost = cost(case);
            println!("{case:?}: {cost:?}");
            assert!(cost.allocations as f64 / cost.commands as f64 <= most, "{case:?}: {cost:?}");
            assert_calls(case, &cost);
        }
    }
}

fn assert_calls(case: Case, cost: &Cost) {
    assert_eq!(cost.kicks, cost.batches, "{case:?}: {cost:?}");
    // One to submit what a batch of commands asks for, which gives the answers along with it if they are in the page cache. Where
    // the kernel hands work to threads of its own, answers come in batches of their own, and to fetch them takes another.
    // A protected write's tuples and data are two operations that end apart.
    let apart = u64::from(case.write) + u64::from(case.pi.is_some());
    let most = cost.batches * (1 + apart) + cost.sleeps;
    assert!(cost.enters <= most + most / 50, "{case:?}: {cost:?}");
    if case.image == Image::Null {
        assert_eq!((cost.enters, cost.operations), (cost.sleeps, 0), "{case:?}: {cost:?}");
    }
    if backend_from_env() == Backend::Uring {
        // The doorbell is not read for its own sake.
        assert!(cost.reads <= cost.commands / 1024 + GROWTH, "{case:?}: {cost:?}");
        if let Some((reads, writes)) = cost.kernel {
            // The last kick may come after its answers were seen.
            assert!(writes.abs_diff(cost.kicks) <= 2, "{case:?}: {cost:?}");
            assert!(reads.abs_diff(cost.reads) <= 2, "{case:?}: {cost:?}");
        }
    }
}
