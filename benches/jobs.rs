//! `cargo bench --bench jobs [-- --seconds N] [--rows TEXT] [--dir DIR] [--json FILE]`: what a guest notices of a block job at full speed.
//!
//! A guest on the embedded kernel has one command under way, 4 KiB at a random place, and sends the next when that is answered; a job of its LUN runs
//! beside it, begun anew on a new LUN as often as it comes to its end. Rows without a job are there to compare with: ratios count. The images are in the page
//! cache, in the folder for temporary files if no `--dir` is named, so a job is hardly ever held up by a disk, and takes as much of the LUN's thread as it ever can.
#![allow(clippy::unwrap_used)] // A bench may panic.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::json;
use tcmu_dif::{
    image::{
        Format,
        create::{create_qcow2, create_raw},
        open::{OpenOptions, open},
        qcow2::CreateOptions,
    },
    job::{
        JobStatus, OnError,
        mirror::{CopyMode, Settings, Share, SyncMode, Task},
    },
    lun::{
        self, LunHandle, LunParams,
        config::DeviceConfig,
        jobs::{BackupOrder, CommitOrder, JobOrder, MirrorOrder, StreamOrder},
    },
    peer::load::Load,
    pi::{
        PiMode, PiType,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    sys::{self, mem::Buffer},
    units::{BlockSize, ByteOffset},
    volume::{Volume, WriteFlags},
};

const BLOCK: usize = 4096;
const SIZE: u64 = 256 << 20;
const ID: &str = "job";
/// The bytes a second of the rows with a limit.
const SPEED: u64 = 100 << 20;
/// The percent of the row with a share.
const SHARE: u64 = 25;
/// How long the guest sends before the job is looked at.
const SLICE: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Nothing,
    Backup,
    SlowBackup,
    Mirror(CopyMode),
    /// The mirror has caught up, and keeps up.
    Ready(CopyMode),
    /// A mirror in the background that leaves guests a part of the time.
    Shared,
    Commit,
    Stream,
}

#[derive(Clone, Copy)]
struct Row {
    kind: Kind,
    pi: bool,
    write: bool,
}

impl Row {
    fn name(self) -> String {
        let mode = |mode| if mode == CopyMode::Background { "background" } else { "write-blocking" };
        let job = match self.kind {
            Kind::Nothing => "no job".to_owned(),
            Kind::Backup => "backup".to_owned(),
            Kind::SlowBackup => format!("backup, {} MiB/s", SPEED >> 20),
            Kind::Mirror(m) => format!("mirror, {}", mode(m)),
            Kind::Ready(m) => format!("mirror, {}, ready", mode(m)),
            Kind::Shared => format!("mirror, background, share {SHARE} %"),
            Kind::Commit => "commit".to_owned(),
            Kind::Stream => "stream".to_owned(),
        };
        let pi = if self.pi { ", type1" } else { "" };
        format!("{} beside {job}{pi}", if self.write { "write" } else { "read" })
    }

    /// Whether the image lies over another, which has the data.
    fn over_another(self) -> bool {
        self.kind == Kind::Stream
    }

    fn order(self, dir: &Path) -> Option<JobOrder> {
        let settings = Settings {
            task: Task::Mirror,
            sync: SyncMode::Full,
            copy_mode: match self.kind {
                Kind::Mirror(mode) | Kind::Ready(mode) => mode,
                _ => CopyMode::Background,
            },
            unmap: true,
            speed: if self.kind == Kind::SlowBackup { SPEED } else { 0 },
            share: Share::try_from(if self.kind == Kind::Shared { SHARE } else { 100 }).unwrap(),
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: false,
            paused: false,
        };
        let (id, target) = (ID.to_owned(), dir.join("target.raw"));
        let (format, existing, sidecar) = (Some(Format::Raw), false, None);
        Some(match self.kind {
            Kind::Nothing => return None,
            Kind::Backup | Kind::SlowBackup => JobOrder::Backup(Box::new(BackupOrder {
                settings: Settings { task: Task::Backup, ..settings },
                bitmap: None,
                scratch: false,
                id,
                target,
                format,
                existing,
                sidecar,
            })),
            Kind::Mirror(_) | Kind::Ready(_) | Kind::Shared => JobOrder::Mirror(Box::new(MirrorOrder {
                settings,
                granularity: None,
                id,
                target,
                format,
                existing,
                sidecar,
            })),
            Kind::Commit => JobOrder::Commit(Box::new(CommitOrder {
                settings: Settings { task: Task::Commit { below: 1 }, sync: SyncMode::Top, ..settings },
                top: None,
                base: None,
                id,
            })),
            Kind::Stream => JobOrder::Stream(Box::new(StreamOrder {
                settings: Settings {
                    task: Task::Stream { below: u32::MAX },
                    sync: SyncMode::Top,
                    ..settings
                },
                base: None,
                id,
            })),
        })
    }
}

/// Makes an image with data everywhere, over a raw one for the jobs that need a chain. Which of both has the data goes by the job.
fn make(dir: &Path, row: Row) -> PathBuf {
    let (base, top) = (dir.join("base.raw"), dir.join("top.qcow2"));
    let (at, pi) = (top.clone(), row.pi);
    sys::run(async move |io| {
        create_raw(&io, &base, SIZE).await.map(drop).unwrap();
        if row.over_another() {
            fill(&io, &base).await;
        }
        let over = CreateOptions {
            backing_file: Some("base.raw".into()),
            backing_format: Some("raw".into()),
            ..CreateOptions::new(SIZE)
        };
        let alone = !matches!(row.kind, Kind::Commit | Kind::Stream);
        let options = if alone { CreateOptions::new(SIZE) } else { over };
        create_qcow2(&io, &top, &options).await.map(drop).unwrap();
        if !row.over_another() {
            fill(&io, &top).await;
        }
        if pi {
            for (image, format) in [(base, ImageFormat::Raw), (top, ImageFormat::Qcow2)] {
                let new = NewSidecar {
                    block_size: BlockSize::B512,
                    kind: PiType::Type1,
                    mode: PiMode::Bitmap,
                    capacity: BlockSize::B512.blocks_in(SIZE),
                    format,
                    stamp: Stamp::of(&image).unwrap(),
                };
                tools::create(&io, &image, &default_path(&image), new).await.unwrap();
            }
        }
    });
    at
}

async fn fill(io: &sys::io::Io, image: &Path) {
    let image = open(io, image, &OpenOptions::default()).await.unwrap();
    let data = Buffer::from_slice(&vec![0x5a; 1 << 20]).sg();
    for at in (0..SIZE).step_by(1 << 20) {
        image.write(ByteOffset(at), &data, WriteFlags::default()).await.unwrap();
    }
    image.close().await.unwrap();
}

/// A LUN with a guest.
struct World {
    _dir: tempfile::TempDir,
    load: Load,
    lun: LunHandle,
}

impl World {
    /// With the job begun, and caught up if that is what is looked at.
    fn new(dir: &Path, row: Row) -> World {
        let dir = tempfile::tempdir_in(dir).expect("a folder for images");
        let image = make(dir.path(), row);
        let cdb = |_| {
            let mut cdb = [0; 16];
            cdb[0] = if row.write { 0x8a } else { 0x88 };
            cdb[10..14].copy_from_slice(&((BLOCK / 512) as u32).to_be_bytes());
            cdb
        };
        let mut load = Load::new(1, BLOCK, cdb).unwrap();
        let mut config = DeviceConfig::new(&image);
        config.pi = row.pi.then_some(PiType::Type1);
        let params = LunParams {
            name: "jobs".into(),
            config,
            block_size: BlockSize::B512,
            capacity: SIZE,
            write_cache: true,
            serial: Some("jobs".into()),
            state_dir: None,
            backend: None,
            polling: true,
            neighbourhood: Default::default(),
            device: load.device().unwrap(),
        };
        let lun = lun::start(params).unwrap();
        // The unit attention of a power on.
        load.run(1, Duration::from_secs(1), None, false).unwrap();
        load.wander(SIZE / BLOCK as u64, (BLOCK / 512) as u64);
        let mut world = World { _dir: dir, load, lun };
        if let Some(order) = row.order(world._dir.path()) {
            world.lun.remote().job(order).unwrap();
            while matches!(row.kind, Kind::Ready(_)) && world.job().0 != JobStatus::Ready {
                std::thread::sleep(SLICE);
            }
        }
        world
    }

    /// How far the job is: its status, and the bytes that are done.
    fn job(&mut self) -> (JobStatus, u64) {
        let all = self.lun.remote().job(JobOrder::Query).unwrap();
        let job = &all[0];
        assert_eq!(job.error, None);
        (job.status, job.offset)
    }

    fn end(self, row: Row) {
        if row.kind != Kind::Nothing {
            // One that has ended by itself cannot be cancelled any more.
            let _ = self.lun.remote().job(JobOrder::Cancel { id: ID.into(), force: true });
        }
        self.lun.stop().unwrap();
    }
}

#[derive(Default)]
struct Figures {
    latencies: Vec<Duration>,
    guest: Duration,
    copied: u64,
}

/// Measures for that long, with as many jobs as that takes.
fn measure(dir: &Path, row: Row, time: Duration) -> Figures {
    let mut found = Figures::default();
    while found.guest < time {
        let mut world = World::new(dir, row);
        let wanted = if matches!(row.kind, Kind::Ready(_)) { JobStatus::Ready } else { JobStatus::Running };
        let mut before = if row.kind == Kind::Nothing { 0 } else { world.job().1 };
        while found.guest < time {
            let run = world.load.run(u64::MAX, SLICE, None, true).unwrap();
            assert_eq!(run.failed, 0, "{}", row.name());
            if row.kind != Kind::Nothing {
                let (status, offset) = world.job();
                found.copied += offset.saturating_sub(before);
                before = offset;
                if status != wanted {
                    // The job has ended within the slice, and how much of that it filled is not known.
                    break;
                }
            }
            found.guest += run.time;
            found.latencies.extend(run.latencies);
        }
        world.end(row);
    }
    found.latencies.sort_unstable();
    found
}

fn main() {
    let mut seconds = 2.0;
    let mut json_file: Option<PathBuf> = None;
    let mut wanted: Option<String> = None;
    let mut dir = std::env::temp_dir();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => seconds = args.next().and_then(|n| n.parse().ok()).expect("--seconds N"),
            "--json" => json_file = Some(args.next().expect("--json FILE").into()),
            "--dir" => dir = args.next().expect("--dir DIR").into(),
            "--rows" => wanted = Some(args.next().expect("--rows TEXT")),
            "--bench" => {}
            other => panic!("what is {other}? --seconds N, --rows TEXT, --dir DIR, --json FILE"),
        }
    }
    let modes = [CopyMode::Background, CopyMode::WriteBlocking];
    let mut kinds = vec![Kind::Nothing, Kind::Backup, Kind::SlowBackup];
    kinds.extend(modes.map(Kind::Mirror));
    kinds.extend(modes.map(Kind::Ready));
    kinds.extend([Kind::Shared, Kind::Commit, Kind::Stream]);
    let mut text = String::from(
        "4 KiB, one at a time                             a second     p50 µs     p99 µs   p99.9 µs     max µs   job MiB/s\n",
    );
    let (mut kept, begun) = (Vec::new(), Instant::now());
    for pi in [false, true] {
        for write in [false, true] {
            let mut alone = [f64::NAN; 2];
            for row in kinds.iter().map(|kind| Row { kind: *kind, pi, write }) {
                if !wanted.as_ref().is_none_or(|w| w.split('|').any(|w| row.name().contains(w))) {
                    continue;
                }
                let f = measure(&dir, row, Duration::from_secs_f64(seconds));
                let at = |permille: usize| {
                    let last = f.latencies.len() - 1;
                    f.latencies[(f.latencies.len() * permille / 1000).min(last)].as_secs_f64() * 1e6
                };
                let per_second = f.latencies.len() as f64 / f.guest.as_secs_f64();
                let copied = f.copied as f64 / f.guest.as_secs_f64() / (1 << 20) as f64;
                let [p50, p99, p999, most] = [500, 990, 999, 1000].map(at);
                if row.kind == Kind::Nothing {
                    alone = [p50, p99];
                }
                let of_none =
                    [p50 / alone[0], p99 / alone[1]].map(|ratio| ratio.is_finite().then_some(ratio));
                let _ = writeln!(
                    text,
                    "{:<46} {per_second:>10.0} {p50:>10.1} {p99:>10.1} {p999:>10.1} {most:>10.0} {copied:>11.0}",
                    row.name()
                );
                kept.push(json!({ "row": row.name(), "per_second": per_second, "p50_us": p50, "p99_us": p99, "p999_us": p999,
                    "max_us": most, "job_mib_per_second": copied, "p50_of_none": of_none[0], "p99_of_none": of_none[1] }));
            }
        }
    }
    println!("{text}({:.0} s)", begun.elapsed().as_secs_f64());
    if let Some(file) = json_file {
        fs::write(file, serde_json::to_vec_pretty(&json!({ "bench": "jobs", "rows": kept })).unwrap())
            .unwrap();
    }
}
