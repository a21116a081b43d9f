//! Protection over real files, on the backend that `TCMU_DIF_IO` names: made, used, verified, rebuilt.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    rc::Rc,
};

use tcmu_dif::{
    pi::{
        PiMode, PiOpenErrorKind, PiType, Protected, Protection, Recheck,
        chain::Beneath,
        store::{ImageFormat, NewSidecar, Stamp, StoreError, default_path},
        tools,
    },
    storage::{FileStorage, Storage},
    sys::{
        self,
        io::{Fallocate, Io},
        mem::{Buffer, Sg},
    },
    units::{BlockSize, Blocks, ByteOffset},
    volume::{Extent, ExtentKind, IoError, IoErrorKind, IoOp, Limits, PiTag, Result, Volume, WriteFlags},
};

/// A raw file without locks or manners.
struct PlainFile {
    storage: FileStorage,
    capacity: u64,
}

impl PlainFile {
    fn open(io: &Io, path: &Path) -> PlainFile {
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let capacity = file.metadata().unwrap().len();
        PlainFile { storage: FileStorage::new(io, Rc::new(file)), capacity }
    }
}

impl Volume for PlainFile {
    fn limits(&self) -> Limits {
        let capacity = self.capacity;
        Limits {
            capacity,
            alignment: 1,
            read_only: false,
            discard_granularity: 0,
            preferred_io: 0,
            atomic_write: 0,
            atomic_unit: 0,
            tells_free: false,
        }
    }
    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        self.storage.read(at.0, to).await.map_err(|e| IoError::from_io(IoOp::Read, e))
    }
    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        self.storage.write(at.0, from, flags.fua).await.map_err(|e| IoError::from_io(IoOp::Write, e))
    }
    async fn flush(&self) -> Result<()> {
        self.storage.sync().await.map_err(|e| IoError::from_io(IoOp::Flush, e))
    }
    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        let punched = self.storage.fallocate(Fallocate::PunchHole, at.0, len).await;
        punched.map_err(|e| IoError::from_io(IoOp::Discard, e))
    }
    async fn write_zeroes(&self, at: ByteOffset, len: u64, _: bool) -> Result<()> {
        self.discard(at, len).await
    }
    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        let data = self.storage.next_data(at.0).await.map_err(|e| IoError::from_io(IoOp::Map, e))?;
        let end = at.0 + len;
        let data = data.map_or(end..end, |d| d.start.min(end)..d.end.min(end));
        let (kind, len) = match data.start > at.0 {
            true => (ExtentKind::Hole, data.start - at.0),
            false => (ExtentKind::Data, data.end - at.0),
        };
        let host_offset = (kind == ExtentKind::Data).then_some(at.0);
        Ok(vec![Extent { start: at, len, kind, host_offset, depth: 0 }])
    }
    async fn resize(&self, _: u64) -> Result<()> {
        Err(IoError::new(IoErrorKind::Unsupported, IoOp::Resize))
    }
    async fn close(&self) -> Result<()> {
        self.flush().await
    }
}

struct Place {
    _dir: tempfile::TempDir,
    image: PathBuf,
    sidecar: PathBuf,
}

fn place(len: u64) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("vm1.raw");
    std::fs::File::create_new(&image).unwrap().set_len(len).unwrap();
    let sidecar = default_path(&image);
    assert_eq!(sidecar, dir.path().join("vm1.raw.pi"));
    Place { _dir: dir, image, sidecar }
}

fn new_sidecar(at: &Place, len: u64) -> NewSidecar {
    NewSidecar {
        block_size: BlockSize::B4096,
        kind: PiType::Type1,
        mode: PiMode::Bitmap,
        capacity: Blocks(len / 4096),
        format: ImageFormat::Raw,
        stamp: Stamp::of(&at.image).unwrap(),
    }
}

fn protection(at: &Place) -> Protection {
    Protection {
        image: at.image.clone(),
        sidecar: at.sidecar.clone(),
        kind: PiType::Type1,
        mode: None,
        exposure: tcmu_dif::pi::Exposure::Target,
        block_size: BlockSize::B4096,
        read_only: false,
        found: Stamp::of(&at.image).unwrap(),
        recheck: Recheck::First,
    }
}

async fn write(v: &impl Volume, at: u64, bytes: &[u8]) {
    v.write(ByteOffset(at), &Buffer::from_slice(bytes).sg(), WriteFlags::default()).await.unwrap();
}

const LEN: u64 = 256 << 20;

#[test]
fn a_file_is_protected_across_a_clean_close_and_a_flipped_bit_is_found() {
    sys::run(|io| async move {
        let at = place(LEN);
        tools::create(&io, &at.image, &at.sidecar, new_sidecar(&at, LEN)).await.unwrap();
        let e = tools::create(&io, &at.image, &at.sidecar, new_sidecar(&at, LEN)).await.unwrap_err();
        assert!(matches!(e.what, PiOpenErrorKind::Exists), "{e}");

        let p = Protected::open(&io, PlainFile::open(&io, &at.image), &protection(&at)).await.unwrap();
        write(&p, 0, &[1; 16384]).await;
        write(&p, 200 << 20, &[2; 4096]).await;
        p.write(
            ByteOffset(4096),
            &Buffer::from_slice(&[3; 4096]).sg(),
            WriteFlags { fua: true, ..WriteFlags::default() },
        )
        .await
        .unwrap();
        p.discard(ByteOffset(8192), 4096).await.unwrap();
        p.close().await.unwrap();
        let status = tools::status(&io, &at.image, &at.sidecar).await.unwrap();
        assert_eq!((status.info.in_use, status.image_changed), (false, Some(false)));

        let p = Protected::open(&io, PlainFile::open(&io, &at.image), &protection(&at)).await.unwrap();
        assert_eq!(p.counters().recomputed, 0);
        let file = std::fs::File::options().write(true).open(&at.image).unwrap();
        file.write_all_at(&[9], (200 << 20) + 77).unwrap();
        let buffer = Buffer::zeroed(4096);
        p.read(ByteOffset(0), &buffer.sg()).await.unwrap();
        let e = p.read(ByteOffset(200 << 20), &buffer.sg()).await.unwrap_err();
        let IoErrorKind::Protection(m) = e.kind else { panic!("{e}") };
        assert_eq!((m.lba.0, m.tag, e.at), (51200, PiTag::Guard, Some(ByteOffset(200 << 20))));
        // The sidecar stays sparse: header, a page of map, two pages of tuples and what the file system adds.
        let blocks = std::fs::metadata(&at.sidecar).unwrap().blocks();
        assert!(blocks * 512 <= 64 << 10, "{} bytes", blocks * 512);
    });
}

#[test]
fn after_a_foreign_change_verify_names_the_blocks_and_rebuild_takes_the_image_as_it_is() {
    sys::run(|io| async move {
        let at = place(LEN);
        tools::create(&io, &at.image, &at.sidecar, new_sidecar(&at, LEN)).await.unwrap();
        let p = Protected::open(&io, PlainFile::open(&io, &at.image), &protection(&at)).await.unwrap();
        write(&p, 1 << 20, &[1; 65536]).await;
        p.close().await.unwrap();
        drop(p);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let file = std::fs::File::options().write(true).open(&at.image).unwrap();
        file.write_all_at(&[9; 4096], (1 << 20) + 8192).unwrap();

        let opened = Protected::open(&io, PlainFile::open(&io, &at.image), &protection(&at)).await;
        let e = opened.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::ImageChanged { .. }), "{e}");
        assert_eq!(tools::status(&io, &at.image, &at.sidecar).await.unwrap().image_changed, Some(true));

        let volume = PlainFile::open(&io, &at.image);
        let sidecar = tools::inspect(&io, &at.image, &at.sidecar).await.unwrap();
        let report = tools::verify(&volume, &sidecar, &Beneath::nothing(), |_, _| ()).await.unwrap();
        assert_eq!((report.mismatches, report.verified), (1, 15));
        assert_eq!((report.bad[0].lba, report.bad[0].host_offset), (258, Some((1 << 20) + 8192)));

        let mut heard = 0;
        let options = tools::RebuildOptions::default();
        let report = tools::rebuild(&io, &volume, &at.image, &at.sidecar, options, |done, _| heard = done)
            .await
            .unwrap();
        assert_eq!((report.protected, report.block_size, report.pi), (16, 4096, Some(PiType::Type1)));
        assert_eq!(heard, LEN);
        let p = Protected::open(&io, volume, &protection(&at)).await.unwrap();
        p.read(ByteOffset(1 << 20), &Buffer::zeroed(65536).sg()).await.unwrap();
        assert_eq!(p.counters().verified, 16);
    });
}

#[test]
fn a_header_that_is_damaged_twice_is_said_to_be_and_rebuilt_and_another_file_is_left_alone() {
    sys::run(|io| async move {
        let at = place(LEN);
        tools::create(&io, &at.image, &at.sidecar, new_sidecar(&at, LEN)).await.unwrap();
        let file = std::fs::File::options().write(true).open(&at.sidecar).unwrap();
        file.write_all_at(&[0xee], 50).unwrap();
        tools::inspect(&io, &at.image, &at.sidecar).await.unwrap();
        file.write_all_at(&[0xee], 4096 + 50).unwrap();
        let e = tools::inspect(&io, &at.image, &at.sidecar).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::Store(StoreError::Damaged)), "{e}");
        assert!(e.next_step().unwrap().contains("tcmu-dif pi rebuild"));

        let volume = PlainFile::open(&io, &at.image);
        let options = tools::RebuildOptions { block_size: Some(BlockSize::B4096), ..Default::default() };
        tools::rebuild(&io, &volume, &at.image, &at.sidecar, options, |_, _| ()).await.unwrap();
        Protected::open(&io, volume, &protection(&at)).await.unwrap();

        std::fs::write(&at.sidecar, b"a letter to mother").unwrap();
        let volume = PlainFile::open(&io, &at.image);
        let e = tools::rebuild(&io, &volume, &at.image, &at.sidecar, options, |_, _| ()).await.unwrap_err();
        assert!(matches!(e.what, PiOpenErrorKind::Store(StoreError::NotASidecar)), "{e}");
        assert_eq!(std::fs::read(&at.sidecar).unwrap(), b"a letter to mother");
    });
}

#[test]
fn a_sidecar_that_is_missing_a_directory_or_read_only_says_so() {
    sys::run(|io| async move {
        let at = place(LEN);
        let e = Protected::open(&io, PlainFile::open(&io, &at.image), &protection(&at)).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::Missing), "{e}");
        assert!(e.next_step().unwrap().contains("tcmu-dif pi rebuild"));
        std::fs::create_dir(&at.sidecar).unwrap();
        let e = Protected::open(&io, PlainFile::open(&io, &at.image), &protection(&at)).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::Store(StoreError::Io(_))), "{e}");
    });
}

#[test]
fn the_sidecar_of_a_sixteen_tebibyte_image_takes_kilobytes_in_either_mode() {
    for mode in [PiMode::Bitmap, PiMode::Journal] {
        sys::run(async move |io| {
            const TIB: u64 = 1 << 40;
            let at = place(LEN);
            // The file is small and the disk large: what was never written needs no file under it.
            let image = |io: &Io| PlainFile { capacity: 16 * TIB, ..PlainFile::open(io, &at.image) };
            let new = NewSidecar { mode, ..new_sidecar(&at, 16 * TIB) };
            tools::create(&io, &at.image, &at.sidecar, new).await.unwrap();
            let p = Protected::open(&io, image(&io), &protection(&at)).await.unwrap();
            for at in [0, TIB, 8 * TIB + 4096] {
                write(&p, at, &[1; 65536]).await;
            }
            p.flush().await.unwrap();
            p.read(ByteOffset(8 * TIB), &Buffer::zeroed(65536).sg()).await.unwrap();
            assert_eq!((p.counters().verified, p.counters().unprotected), (15, 1));
            let meta = std::fs::metadata(&at.sidecar).unwrap();
            assert!(meta.len() > 16 << 30, "the tuples of 16 TiB have their place: {}", meta.len());
            assert!(meta.blocks() * 512 <= 128 << 10, "{mode}: {} bytes", meta.blocks() * 512);
            p.close().await.unwrap();
        });
    }
}

#[test]
fn a_rebuild_changes_the_mode_and_a_journal_is_recovered_on_a_real_file() {
    sys::run(|io| async move {
        let at = place(LEN);
        tools::create(&io, &at.image, &at.sidecar, new_sidecar(&at, LEN)).await.unwrap();
        let journal = Protection { mode: Some(PiMode::Journal), ..protection(&at) };
        let e = Protected::open(&io, PlainFile::open(&io, &at.image), &journal).await.err().unwrap();
        assert!(
            matches!(e.what, PiOpenErrorKind::Mode { has: PiMode::Bitmap, wanted: PiMode::Journal }),
            "{e}"
        );
        assert!(e.next_step().unwrap().contains("--mode journal"));
        let options = tools::RebuildOptions { mode: Some(PiMode::Journal), ..Default::default() };
        let volume = PlainFile::open(&io, &at.image);
        tools::rebuild(&io, &volume, &at.image, &at.sidecar, options, |_, _| ()).await.unwrap();

        let p = Protected::open(&io, volume, &journal).await.unwrap();
        write(&p, 0, &[1; 65536]).await;
        p.flush().await.unwrap();
        write(&p, 0, &[2; 65536]).await;
        drop(p);
        // What power loss may leave: one block old, one torn.
        let file = std::fs::File::options().write(true).open(&at.image).unwrap();
        file.write_all_at(&[1; 4096], 4096).unwrap();
        file.write_all_at(&[1; 512], 8192).unwrap();
        let status = tools::status(&io, &at.image, &at.sidecar).await.unwrap();
        assert_eq!((status.info.mode, status.info.in_use), (PiMode::Journal, true));
        let p = Protected::open(&io, PlainFile::open(&io, &at.image), &journal).await.unwrap();
        assert_eq!((p.counters().torn, p.counters().recomputed), (1, 0));
        p.read(ByteOffset(0), &Buffer::zeroed(8192).sg()).await.unwrap();
        let e = p.read(ByteOffset(0), &Buffer::zeroed(65536).sg()).await.unwrap_err();
        let IoErrorKind::Protection(m) = e.kind else { panic!("{e}") };
        assert_eq!((m.lba.0, m.tag), (2, PiTag::Guard));
        p.close().await.unwrap();
        assert!(!tools::status(&io, &at.image, &at.sidecar).await.unwrap().info.in_use);
    });
}
