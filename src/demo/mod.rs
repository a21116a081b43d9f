//! `tcmu-dif demo`: the real LUN threads on a machine that has nothing but this program.
//!
//! The kernel's side of the ring is the embedded one of the tests ([`crate::peer::kernel`]); everything behind the ring is what
//! the daemon runs. Each step says what it does and what came of it, and fails unless it was as it must be.

mod describe;
mod disk;
mod measure;

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use serde::Serialize;

use crate::{image::Format, units::BlockSize};
use disk::Disk;

/// Bytes of the demo's disks.
const CAPACITY: u64 = 64 << 20;
/// How long each of the sixteen measurements runs.
const MEASURE: Duration = Duration::from_millis(1200);

/// Why the demo failed.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A step was not as it must be.
    #[error("{step}: expected {expected}, and got {found}")]
    Unexpected {
        /// What was tried.
        step: String,
        /// What it must be.
        expected: String,
        /// What it was.
        found: String,
    },
    /// The place for the images.
    #[error("no room for the demo's images in {}", path.display())]
    Directory {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file behind a LUN's back, or the terminal.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A part of the stack refused.
    #[error("{what}")]
    Stack {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

type Result<T> = std::result::Result<T, DemoError>;

/// What the demo has shown. A step that was not as it must be ends it with an error, so each that stands here was.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// In their order.
    pub steps: Vec<Step>,
    /// 4 KiB at random, in memory: figures to compare with each other.
    pub measured: Vec<Measured>,
}

/// A step that was as it must be.
#[derive(Debug, Serialize)]
pub struct Step {
    /// What it is a part of.
    pub title: String,
    /// What was tried, and came true.
    pub step: String,
}

/// A disk under a load.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// `raw`, `qcow2`.
    pub format: String,
    /// `off`, `type1`.
    pub pi: &'static str,
    /// `read`, `write`.
    pub operation: &'static str,
    /// Commands under way.
    pub depth: usize,
    /// Commands a second.
    pub per_second: f64,
    /// The median latency, in microseconds.
    pub median_us: f64,
}

/// Says a step's outcome, or fails with it.
struct Steps<'a> {
    out: &'a mut dyn Write,
    title: String,
    report: Report,
}

impl Steps<'_> {
    fn line(&mut self, text: impl AsRef<str>) -> Result<()> {
        writeln!(self.out, "{}", text.as_ref())
            .map_err(|source| DemoError::Io { what: "the demo's output cannot be written", source })
    }

    fn title(&mut self, text: &str) -> Result<()> {
        text.clone_into(&mut self.title);
        self.line(format!("\n{text}"))
    }

    /// Fails unless the two are the same; says the step otherwise.
    fn must<T: PartialEq + std::fmt::Debug>(&mut self, step: &str, found: T, expected: T) -> Result<()> {
        if found != expected {
            return Err(DemoError::Unexpected {
                step: step.to_owned(),
                expected: short(&expected),
                found: short(&found),
            });
        }
        self.report.steps.push(Step { title: self.title.clone(), step: step.to_owned() });
        self.line(format!("  ok  {step}"))
    }
}

/// A value for a message: the start of it, if it is long.
fn short(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:x?}");
    if text.len() > 120 { format!("{} …", text.chars().take(100).collect::<String>()) } else { text }
}

/// Bytes that no other seed gives, for `n` blocks.
fn pattern(seed: u64, n: usize) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    };
    (0..n * 512).map(|_| next()).collect()
}

/// Runs the demo, writes what happens, and gives it back. Needs no root, no module and no package, and leaves nothing behind.
///
/// # Errors
/// The first step that was not as it must be.
pub fn run(out: &mut dyn Write) -> Result<Report> {
    let dir = Folder::new()?;
    let mut steps = Steps { out, title: String::new(), report: Report::default() };
    steps.line(
        "tcmu-dif on an embedded kernel: the LUN's threads, images and protection are the daemon's own;",
    )?;
    steps.line("the ring is filled by this program instead of target_core_user.")?;
    for format in [Format::Raw, Format::Qcow2] {
        one_format(&mut steps, &dir.0, format)?;
    }
    measure::table(&mut steps, &dir.0, CAPACITY, MEASURE)?;
    steps.line("\nEverything was as it must be.")?;
    Ok(steps.report)
}

fn one_format(steps: &mut Steps<'_>, dir: &std::path::Path, format: Format) -> Result<()> {
    let image = dir.join(format!("demo.{format}"));
    steps.title(&format!("A {format} image of 64 MiB, type 1 protection at rest"))?;
    Disk::create(&image, format, CAPACITY, true)?;
    let mut disk = Disk::start(&image, CAPACITY, BlockSize::B512, true)?;
    steps.line(format!(
        "  I/O through {}, guards by {}",
        disk.backend(),
        crate::pi::guard::Guard::best().kernel().name()
    ))?;
    steps.must(
        "TEST UNIT READY begins with the unit attention 06h/29h/00h",
        disk.ready()?,
        Some((6, 0x29, 0)),
    )?;
    steps.must("and is GOOD from then on", disk.ready()?, None)?;
    describe::device(steps, &mut disk, CAPACITY)?;

    steps.title(&format!("Writing and reading through the ring ({format})"))?;
    for (lba, blocks) in [(0u64, 1usize), (1000, 64), (4093, 11), (131_071, 1)] {
        let data = pattern(lba, blocks);
        disk.write(lba, &data)?;
        steps.must(&format!("blocks {lba}+{blocks} read back"), disk.read(lba, blocks)? == Ok(data), true)?;
    }
    steps.must("a block never written reads as zeros", disk.read(50_000, 1)?, Ok(vec![0; 512]))?;

    steps.title(&format!("One bit flipped in {}, behind the LUN's back", image.display()))?;
    let victim = 1005;
    let block = pattern(1000, 64)[5 * 512..6 * 512].to_vec();
    let at = disk.find(&block)?;
    disk.poke(at + 100, |byte| byte ^ 0x10)?;
    steps.must(
        "reading it ends in CHECK CONDITION 0Bh/10h/01h (LOGICAL BLOCK GUARD CHECK FAILED) with that LBA",
        disk.read(victim, 1)?,
        Err((0x0b, 0x10, 1, Some(victim))),
    )?;
    steps.must("so does a longer read over it", disk.read(1000, 64)?, Err((0x0b, 0x10, 1, Some(victim))))?;
    steps.must("the blocks before it still read", disk.read(1000, 5)?, Ok(pattern(1000, 5)))?;
    let behind = pattern(1000, 64)[6 * 512..].to_vec();
    steps.must("and the blocks behind it", disk.read(1006, 58)?, Ok(behind))?;
    disk.write(victim, &block)?;
    steps.must("written anew, it reads", disk.read(victim, 1)?, Ok(block))?;

    steps.title("A disk that acknowledges a write and drops it")?;
    let old = pattern(7, 1);
    disk.write(2000, &old)?;
    let at = disk.find(&old)?;
    let new = pattern(8, 1);
    disk.write(2000, &new)?;
    disk.put(at, &old)?;
    steps.must(
        "the stale block is found, though each of its bits is as it was once written",
        disk.read(2000, 1)?,
        Err((0x0b, 0x10, 1, Some(2000))),
    )?;
    disk.write(2000, &new)?;

    steps.title("A disk that writes to the wrong place")?;
    disk.write(3000, &pattern(11, 1))?;
    disk.write(3001, &pattern(12, 1))?;
    let (at, wrong) = (disk.find(&pattern(11, 1))?, disk.find(&pattern(12, 1))?);
    disk.write(3000, &pattern(13, 1))?;
    disk.put(at, &pattern(11, 1))?;
    disk.put(wrong, &pattern(13, 1))?;
    steps.must(
        "the block that should have changed is found",
        disk.read(3000, 1)?,
        Err((0x0b, 0x10, 1, Some(3000))),
    )?;
    steps.must("and the one that should not have", disk.read(3001, 1)?, Err((0x0b, 0x10, 1, Some(3001))))?;
    disk.write(3000, &pattern(13, 2))?;

    disk.stop()?;
    let mut disk = Disk::start(&image, CAPACITY, BlockSize::B512, true)?;
    disk.ready()?;
    steps.title("After a restart")?;
    steps.must("the data are there, and verified", disk.read(4093, 11)?, Ok(pattern(4093, 11)))?;
    disk.stop()
}

/// A folder that is gone when the demo is.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("tcmu-dif-demo-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|source| DemoError::Directory { path: path.clone(), source })?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed lies in the folder for temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
