//! A LUN whose file system is full tells initiators so, loses nothing, and goes on by itself when there is room again.
//!
//! Needs root, for a small tmpfs: so these tests are ignored, unless the one who asks is root (`cargo xtask test` looks).
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command as Process,
};

use tcmu_dif::{
    image::{
        Image,
        open::{OpenOptions, open},
    },
    scsi::{Command, Target, TargetConfig},
    sys::{
        mem::{Buffer, Sg},
        run,
    },
    units::BlockSize,
    volume::Volume,
};

const ROOM: u64 = 24 << 20;
const CHUNK: u64 = 64 << 10;
const BLOCKS: u64 = CHUNK / 512;
/// Chunks that are unmapped in between.
const GIVEN_UP: u64 = 48;
const GOOD: (u8, u8, u8) = (0, 0, 0);
const FULL: (u8, u8, u8) = (7, 0x27, 0x07);
const SOFT_THRESHOLD: (u8, u8, u8) = (6, 0x38, 0x07);

/// A file system with so much room, taken down at the end.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Small {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={ROOM}");
        let made = Process::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).status();
        assert!(made.unwrap().success());
        Small(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Process::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn tool(words: &[&str], image: &Path, size: &[&str]) {
    let out =
        Process::new(env!("CARGO_BIN_EXE_tcmu-dif")).args(words).arg(image).args(size).output().unwrap();
    assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
}

struct Lun(Target<Image>);

impl Lun {
    /// The threshold is looked at once a second, so whatever comes then is told of it: it is sent again, as an initiator does.
    async fn execute(&self, cdb: &[u8], data: &Sg) -> (u8, u8, u8) {
        loop {
            let command = Command { cdb, data, dif: &Sg::new(), once: None };
            let sense = self.0.execute(&command).await.sense;
            match sense.map_or(GOOD, |s| (s.key as u8, s.asc.0, s.asc.1)) {
                SOFT_THRESHOLD => {}
                sense => return sense,
            }
        }
    }

    async fn block_command(&self, opcode: u8, chunk: u64, data: &Sg) -> (u8, u8, u8) {
        let lba = ((chunk * BLOCKS) as u32).to_be_bytes();
        let n = (BLOCKS as u16).to_be_bytes();
        let cdb = [opcode, 0, lba[0], lba[1], lba[2], lba[3], 0, n[0], n[1], 0];
        self.execute(&cdb, data).await
    }

    async fn write(&self, chunk: u64, seed: u64) -> (u8, u8, u8) {
        self.block_command(0x2a, chunk, &content(chunk, seed)).await
    }

    async fn holds(&self, chunk: u64, seed: u64) {
        let room = Buffer::zeroed(CHUNK as usize).sg();
        assert_eq!(self.block_command(0x28, chunk, &room).await, GOOD, "chunk {chunk}");
        assert!(room.mismatch(&content(chunk, seed)).is_none(), "chunk {chunk}");
    }

    async fn flush(&self) -> (u8, u8, u8) {
        self.execute(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &Sg::new()).await
    }

    async fn unmap(&self, chunk: u64) -> (u8, u8, u8) {
        let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
        list.extend((chunk * BLOCKS).to_be_bytes());
        list.extend((BLOCKS as u32).to_be_bytes());
        list.extend([0; 4]);
        self.execute(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &Buffer::from_slice(&list).sg()).await
    }

    /// Writes chunks from `chunk` on until there is no room; gives the first that could not be written.
    async fn fill(&self, mut chunk: u64) -> u64 {
        loop {
            match self.write(chunk, 0).await {
                GOOD => chunk += 1,
                sense => {
                    assert_eq!(sense, FULL, "chunk {chunk}");
                    return chunk;
                }
            }
            assert!(chunk * CHUNK <= ROOM + GIVEN_UP * CHUNK, "more than there is room for");
        }
    }
}

fn content(chunk: u64, seed: u64) -> Sg {
    let byte = |i: u64| (i / 512 + i + chunk * 7 + seed * 31 + 1) as u8;
    Buffer::from_slice(&(0..CHUNK).map(byte).collect::<Vec<_>>()).sg()
}

fn a_full_file_system(format: &str) {
    let small = Small::new();
    let (filler, path) = (small.path("filler"), small.path("image"));
    fs::write(&filler, vec![1; 8 << 20]).unwrap();
    tool(&["image", "create", "-f", format], &path, &["64M"]);
    let image = path.clone();
    run(async move |io| {
        let image = open(&io, &image, &OpenOptions::default()).await.unwrap();
        let config = TargetConfig { power_on: false, ..TargetConfig::new(BlockSize::B512, "full") };
        let lun = Lun(Target::new(config, image));
        // Told when 9 MiB are left.
        let mut list = vec![0, 0, 0, 0, 0x5c, 2, 0, 20];
        list.resize(20, 0);
        list.extend([0x80, 1, 0, 0, 0, 0, 0, 9]);
        let list = Buffer::from_slice(&list).sg();
        assert_eq!(lun.execute(&[0x15, 0x10, 0, 0, 28, 0], &list).await, GOOD);

        let end = lun.fill(0).await;
        assert!(end * CHUNK >= 8 << 20, "only {end} chunks of the 16 MiB that were free");
        for _ in 0..20 {
            assert_eq!(lun.write(end, 0).await, FULL);
        }
        assert_eq!(lun.flush().await, GOOD);
        assert_eq!(lun.write(end / 2, 1).await, GOOD, "what has its place is written there");
        for chunk in 0..end {
            lun.holds(chunk, u64::from(chunk == end / 2)).await;
        }

        // What the guest gives up is room again.
        for chunk in 0..GIVEN_UP {
            assert_eq!(lun.unmap(chunk).await, GOOD);
        }
        assert_eq!(lun.flush().await, GOOD);
        for chunk in 0..8 {
            assert_eq!(lun.write(chunk, 2).await, GOOD, "chunk {chunk}");
        }
        fs::remove_file(&filler).unwrap();
        let more = lun.fill(end).await;
        assert!((more - end) * CHUNK >= 4 << 20, "only {} chunks of 8 MiB", more - end);
        assert_eq!(lun.flush().await, GOOD);
        for chunk in (0..8).chain(GIVEN_UP..more) {
            let seed = if chunk < 8 { 2 } else { u64::from(chunk == end / 2) };
            lun.holds(chunk, seed).await;
        }
        lun.0.volume().close().await.unwrap();
    });
    if format == "qcow2" {
        tool(&["image", "check"], &path, &[]);
    }
}

#[test]
#[ignore = "needs root, for a tmpfs"]
fn a_raw_image_on_a_full_file_system_goes_on_when_there_is_room() {
    a_full_file_system("raw");
}

#[test]
#[ignore = "needs root, for a tmpfs"]
fn a_qcow2_image_on_a_full_file_system_goes_on_when_there_is_room() {
    a_full_file_system("qcow2");
}
