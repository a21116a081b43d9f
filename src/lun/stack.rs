//! What a LUN stands on: an image, or an image with protection over it; and what a job copies it to. One enum, so that the data path is one `match` and
//! no virtual call.

use tracing::info;

use super::{LunError, LunParams, away::Away, config::DeviceConfig};
use crate::{
    image::{
        Format, Image,
        open::{OpenOptions, open},
        owner::Own,
    },
    job::{Side, first_extent},
    pi::{
        Counters, Exposure, Protected, Protection, Recheck, Transfer,
        chain::Beneath,
        protected::sidecar_path,
        store::{ImageFormat, Stamp},
    },
    storage::cache::CacheCount,
    sys::{exec::boxed, io::Io, mem::Sg},
    units::{BlockSize, ByteOffset},
    volume::{
        AtRest, Extent, IoError, IoOp, Limits, PiType, Result, TupleCheck, Volume, WriteFlags,
        loan::{Loan, Moved, Place},
    },
};

impl From<Format> for ImageFormat {
    fn from(format: Format) -> ImageFormat {
        match format {
            Format::Raw => ImageFormat::Raw,
            Format::Qcow2 => ImageFormat::Qcow2,
        }
    }
}

/// The layers of a LUN below SCSI.
pub(super) enum Stack {
    /// The image alone.
    Plain(Box<Image>),
    /// The image, with a tuple for every block in its sidecar.
    Protected(Box<Protected<Image>>),
    /// The new image of a LUN that is handed over, on another host: the target of a job, and nothing else.
    Away(Box<Away>),
}

/// A LUN that says PROTECT = 1 over a kernel that drops tuples would fail every read and write of a guest that uses them.
///
/// # Errors
/// [`LunError::PiNotCarried`].
pub(super) fn check_transfer(params: &LunParams) -> std::result::Result<(), LunError> {
    let config = &params.config;
    let promised = config.exposure == Exposure::Initiator && config.transfer == Transfer::Separate;
    if promised && !params.device.carries_dif()? {
        return Err(LunError::PiNotCarried);
    }
    Ok(())
}

impl Stack {
    /// Opens the image and, if asked for, its sidecar. What fails leaves nothing open.
    pub(super) async fn open(
        io: &Io,
        config: &DeviceConfig,
        block_size: BlockSize,
        expected: u64,
    ) -> std::result::Result<Stack, LunError> {
        Stack::open_as(io, config, block_size, expected, (None, Recheck::First)).await
    }

    /// The same of an image that is served: what a crash has left in it is looked at by [`Rechecker`]. It is taken for this host, if it has an
    /// owner's file.
    ///
    /// [`Rechecker`]: super::recheck::Rechecker
    pub(super) async fn open_to_serve(
        io: &Io,
        config: &DeviceConfig,
        block_size: BlockSize,
        expected: u64,
        own: Option<Own>,
    ) -> std::result::Result<Stack, LunError> {
        Stack::open_as(io, config, block_size, expected, (own, Recheck::Beside)).await
    }

    async fn open_as(
        io: &Io,
        config: &DeviceConfig,
        block_size: BlockSize,
        expected: u64,
        (own, recheck): (Option<Own>, Recheck),
    ) -> std::result::Result<Stack, LunError> {
        let options = OpenOptions {
            read_only: config.read_only,
            format: config.format,
            lock: true,
            cache_size: config.cache_size,
            null_size: Some(expected),
            cache: config.cache,
            own: own.filter(|_| !config.read_only),
        };
        let image = open(io, &config.image, &options).await?;
        image.check_block_size(block_size)?;
        image.check_sectors(block_size)?;
        let capacity = image.limits().capacity;
        if capacity < expected {
            return Err(LunError::Shrunk { image: config.image.clone(), capacity, expected });
        }
        if capacity > expected {
            // A resize that was cut short after the image had grown. Initiators are told what there is.
            info!(capacity, kernel = expected, "the image is larger than the kernel knows");
        }
        let Some(kind) = config.pi else { return Ok(Stack::Plain(Box::new(image))) };
        let stamp = image.stamp().map_err(|e| IoError::from_io(IoOp::Open, e).path(&config.image))?;
        let protection = Protection {
            image: config.image.clone(),
            sidecar: sidecar_path(&config.image, config.sidecar.as_deref()),
            kind,
            mode: config.pi_mode,
            exposure: config.exposure,
            block_size,
            read_only: config.read_only,
            found: Stamp { size: stamp.size, mtime: stamp.mtime },
            recheck,
        };
        // Opened first: what is wrong with a backing file is said before anything is changed.
        let cluster = u64::from(image.limits().discard_granularity);
        let beneath = Beneath::open(io, &image.files()[1..], block_size, cluster).await?;
        Ok(Stack::Protected(Box::new(Protected::open(io, image, &protection).await?.over(beneath))))
    }

    /// The image at the bottom.
    pub(super) fn image(&self) -> &Image {
        match self {
            Stack::Plain(image) => image,
            Stack::Protected(protected) => protected.volume(),
            Stack::Away(away) => away.none(),
        }
    }

    /// The image under protection, if it is.
    pub(super) fn protected(&self) -> Option<&Protected<Image>> {
        match self {
            Stack::Plain(_) | Stack::Away(_) => None,
            Stack::Protected(protected) => Some(protected),
        }
    }

    /// How blocks are protected at rest, and what initiators see of it.
    pub(super) fn protected_as(&self) -> Option<(PiType, Option<PiType>)> {
        self.protected().map(|p| (p.kind_at_rest(), p.protection()))
    }

    /// What the protection has counted, if there is any.
    pub(super) fn pi_counters(&self) -> Option<Counters> {
        self.protected().map(Protected::counters)
    }

    /// How often tuples were in memory, if there are any.
    pub(super) fn tuple_cache(&self) -> Option<CacheCount> {
        self.protected().and_then(|p| p.sidecar().remembered())
    }
}

macro_rules! layers {
    ($self:ident, $v:ident => $call:expr) => {
        match $self {
            Stack::Plain($v) => $call,
            Stack::Protected($v) => $call,
            Stack::Away($v) => $call,
        }
    };
}

impl Volume for Stack {
    fn limits(&self) -> Limits {
        layers!(self, v => v.limits())
    }

    // What protection waits for is boxed, so that commands without any have small futures.
    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        match self {
            Stack::Plain(v) => v.read(at, to).await,
            Stack::Protected(v) => boxed(|| v.read(at, to)).await,
            Stack::Away(v) => v.read(at, to).await,
        }
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        match self {
            Stack::Plain(v) => v.write(at, from, flags).await,
            Stack::Protected(v) => boxed(|| v.write(at, from, flags)).await,
            Stack::Away(v) => Box::pin(v.write(at, from, flags)).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        layers!(self, v => v.flush().await)
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        layers!(self, v => v.discard(at, len).await)
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        layers!(self, v => v.write_zeroes(at, len, may_unmap).await)
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        layers!(self, v => v.map_extents(at, len).await)
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        layers!(self, v => v.resize(capacity).await)
    }

    async fn free_bytes(&self) -> Option<u64> {
        layers!(self, v => v.free_bytes().await)
    }

    async fn close(&self) -> Result<()> {
        layers!(self, v => v.close().await)
    }

    // What the kernel moves nobody has verified, so what is protected is read and written.
    async fn lend_blocks<T>(
        &self,
        at: ByteOffset,
        len: u64,
        with: impl AsyncFnOnce(Option<Place>) -> T,
    ) -> T {
        match self {
            Stack::Plain(v) => v.lend_blocks(at, len, with).await,
            Stack::Protected(_) | Stack::Away(_) => with(None).await,
        }
    }

    async fn take_blocks(&self, at: ByteOffset, loan: Loan) -> Moved {
        match self {
            Stack::Plain(v) => v.take_blocks(at, loan).await,
            Stack::Protected(_) | Stack::Away(_) => Moved::Never,
        }
    }

    fn at_rest(&self) -> Option<AtRest> {
        layers!(self, v => v.at_rest())
    }

    async fn read_along(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        layers!(self, v => v.read_along(at, to).await)
    }

    fn protection(&self) -> Option<PiType> {
        layers!(self, v => v.protection())
    }

    async fn read_with_tuples(&self, at: ByteOffset, to: &Sg, check: &TupleCheck) -> Result<Vec<u8>> {
        layers!(self, v => v.read_with_tuples(at, to, check).await)
    }

    async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        layers!(self, v => v.write_with_tuples(at, from, tuples, flags).await)
    }

    async fn reformat(&self, protection: Option<PiType>) -> Result<()> {
        layers!(self, v => v.reformat(protection).await)
    }
}

impl Side for Stack {
    async fn read_whole(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        match self {
            Stack::Plain(v) => v.read(at, to).await.map(|()| None),
            Stack::Protected(v) => v.read_verified(at, to).await.map(Some),
            Stack::Away(v) => v.read(at, to).await.map(|()| None),
        }
    }

    async fn write_whole(&self, at: ByteOffset, from: &Sg, tuples: Option<Vec<u8>>) -> Result<()> {
        let flags = WriteFlags::default();
        match (self, tuples) {
            (Stack::Protected(v), Some(tuples)) => v.write_with_tuples(at, from, tuples, flags).await,
            (Stack::Away(v), tuples) => v.put_whole(at, from, tuples).await,
            _ => self.write(at, from, flags).await,
        }
    }

    async fn extent(&self, at: ByteOffset, len: u64) -> Result<Extent> {
        let extent = first_extent(self, at, len, self.block_bytes()).await?;
        match self {
            Stack::Plain(_) | Stack::Away(_) => Ok(extent),
            Stack::Protected(v) => v.with_tuples(extent).await,
        }
    }

    fn block_bytes(&self) -> u64 {
        match self {
            Stack::Plain(v) => u64::from(v.limits().alignment).max(512),
            Stack::Protected(v) => v.block_size().bytes(),
            Stack::Away(v) => v.block(),
        }
    }

    fn protected_by(&self) -> Option<PiType> {
        match self {
            Stack::Away(v) => v.kind(),
            _ => self.protected().map(Protected::kind_at_rest),
        }
    }
}
