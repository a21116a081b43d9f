//! Doubles for the tests of this room: a volume over a simulated disk that can drop and misdirect writes, and a world of
//! image and sidecar that can be opened, cut and opened again.

use std::{
    cell::{Cell, RefCell},
    path::PathBuf,
    rc::Rc,
};

use super::{
    PiOpenError, PiType, Protected, Protection, Recheck,
    store::{ImageFormat, LAYOUT, Layout, NewSidecar, PiMode, Sidecar, Stamp},
};
use crate::{
    storage::{
        Storage,
        sim::{Rng, SimDisk},
    },
    sys::{
        exec::Executor,
        io::Fallocate,
        mem::{Buffer, Sg},
    },
    units::{BlockSize, Blocks, ByteOffset},
    volume::{Extent, ExtentKind, IoError, IoErrorKind, IoOp, Limits, Result, Volume, WriteFlags},
};

/// What a lying disk does to the next write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trick {
    /// Acknowledges it and does nothing.
    Drop,
    /// Writes it somewhere else.
    Misdirect(u64),
}

/// A raw image on a simulated disk.
#[derive(Clone)]
pub(crate) struct SimVolume {
    pub disk: SimDisk,
    pub trick: Rc<Cell<Option<Trick>>>,
    failed: Rc<Cell<bool>>,
}

impl SimVolume {
    pub fn new(disk: SimDisk) -> SimVolume {
        SimVolume { disk, trick: Rc::default(), failed: Rc::default() }
    }

    async fn zero(&self, how: Fallocate, at: ByteOffset, len: u64) -> Result<()> {
        self.disk.fallocate(how, at.0, len).await.map_err(|e| IoError::from_io(IoOp::Discard, e))
    }
}

impl Volume for SimVolume {
    fn limits(&self) -> Limits {
        Limits {
            capacity: self.disk.len_now(),
            alignment: 512,
            read_only: false,
            discard_granularity: 4096,
            preferred_io: 4096,
            atomic_write: 0,
            atomic_unit: 0,
            tells_free: false,
        }
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        self.disk.read(at.0, to).await.map_err(|e| IoError::from_io(IoOp::Read, e))
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        let at = match self.trick.take() {
            None => at.0,
            Some(Trick::Drop) => return Ok(()),
            Some(Trick::Misdirect(elsewhere)) => elsewhere,
        };
        self.disk.write(at, from, flags.fua).await.map_err(|e| IoError::from_io(IoOp::Write, e))
    }

    async fn flush(&self) -> Result<()> {
        if self.failed.get() {
            return Err(IoError::new(IoErrorKind::Failed, IoOp::Flush));
        }
        let done = self.disk.sync().await;
        self.failed.set(done.is_err());
        done.map_err(|e| IoError::from_io(IoOp::Flush, e))
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        self.zero(Fallocate::PunchHole, at, len).await
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, _may_unmap: bool) -> Result<()> {
        self.zero(Fallocate::ZeroRange, at, len).await
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        let (end, mut pos, mut out) = (at.0 + len, at.0, Vec::new());
        while pos < end && out.len() < 4 {
            let data = self.disk.next_data(pos).await.map_err(|e| IoError::from_io(IoOp::Map, e))?;
            let data = data.unwrap_or(end..end);
            let (kind, stop) =
                if data.start > pos { (ExtentKind::Hole, data.start) } else { (ExtentKind::Data, data.end) };
            let len = stop.min(end) - pos;
            let host_offset = (kind == ExtentKind::Data).then_some(pos);
            out.push(Extent { start: ByteOffset(pos), len, kind, host_offset, depth: 0 });
            pos += len;
        }
        Ok(out)
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        self.disk.set_len(capacity).await.map_err(|e| IoError::from_io(IoOp::Resize, e))
    }

    async fn close(&self) -> Result<()> {
        self.flush().await
    }
}

/// Runs a future that needs no kernel to its end.
pub(crate) fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let exec = Executor::new();
    let out = Rc::new(RefCell::new(None));
    let slot = out.clone();
    exec.spawn(async move {
        let value = future.await;
        *slot.borrow_mut() = Some(value);
    });
    while exec.tasks() > 0 {
        assert!(exec.run_ready(), "the future waits for nothing");
    }
    out.take().unwrap()
}

/// An image and its sidecar.
#[derive(Clone)]
pub(crate) struct World {
    pub image: SimDisk,
    pub sidecar: SimDisk,
    pub kind: PiType,
    pub mode: PiMode,
    pub block_size: BlockSize,
    pub recheck: Recheck,
    /// What the image looks like to `stat`, now.
    pub stamp: Stamp,
}

impl World {
    /// A new image of zeros with a new sidecar.
    pub fn new(seed: u64, kind: PiType, block_size: BlockSize, capacity: u64) -> World {
        World::made(seed, (kind, PiMode::Bitmap), block_size, capacity, LAYOUT)
    }

    /// [`World::new`] in any mode and layout.
    pub(in crate::pi) fn made(
        seed: u64,
        (kind, mode): (PiType, PiMode),
        block_size: BlockSize,
        capacity: u64,
        layout: Layout,
    ) -> World {
        let (image, sidecar) = (SimDisk::new(seed), SimDisk::new(!seed));
        let stamp = Stamp { size: capacity, mtime: (1, 2) };
        let new = NewSidecar {
            block_size,
            kind,
            mode,
            capacity: Blocks(capacity / block_size.bytes()),
            format: ImageFormat::Raw,
            stamp,
        };
        let (i, s) = (image.clone(), sidecar.clone());
        block_on(async move {
            i.set_len(capacity).await.unwrap();
            i.sync().await.unwrap();
            Sidecar::create_as(s, new, layout).await.unwrap();
        });
        World { image, sidecar, kind, mode, block_size, recheck: Recheck::First, stamp }
    }

    /// What a power cut leaves of it.
    pub fn cut(&self, rng: &mut Rng) -> World {
        World { image: self.image.cut(rng), sidecar: self.sidecar.cut(rng), ..self.clone() }
    }

    pub fn volume(&self) -> SimVolume {
        SimVolume::new(self.image.clone())
    }

    pub fn protection(&self, read_only: bool) -> Protection {
        Protection {
            image: PathBuf::from("/vm1.raw"),
            sidecar: PathBuf::from("/vm1.raw.pi"),
            kind: self.kind,
            mode: Some(self.mode),
            exposure: crate::pi::Exposure::Target,
            block_size: self.block_size,
            read_only,
            found: self.stamp,
            recheck: self.recheck,
        }
    }

    pub async fn open_with(
        &self,
        volume: SimVolume,
        read_only: bool,
    ) -> std::result::Result<Protected<SimVolume, SimDisk>, PiOpenError> {
        let stamp = self.stamp;
        let how = self.protection(read_only);
        Protected::attach(volume, self.sidecar.clone(), &how, Box::new(move || Ok(stamp))).await
    }

    pub async fn open(&self) -> Protected<SimVolume, SimDisk> {
        self.open_with(self.volume(), false).await.unwrap()
    }
}

/// Reads some bytes.
pub(crate) async fn read(v: &impl Volume, at: u64, len: usize) -> Result<Vec<u8>> {
    let buffer = Buffer::zeroed(len);
    v.read(ByteOffset(at), &buffer.sg()).await?;
    Ok(buffer.to_vec())
}

/// Writes some bytes.
pub(crate) async fn write(v: &impl Volume, at: u64, bytes: &[u8]) -> Result<()> {
    v.write(ByteOffset(at), &Buffer::from_slice(bytes).sg(), WriteFlags::default()).await
}
