//! The sidecar: the file that keeps a LUN's tuples, `IMAGE.pi` beside the image.
//!
//! ```text
//! 0        header, first copy    (header.rs has its fields)
//! 4 KiB    header, second copy
//! 64 KiB   intent map: bit i (bit i % 8 of byte i / 8) is set while region i, 64 MiB of data, may hold blocks that do
//!          not match their tuples; room for 480 TiB
//! 1 MiB    mode "journal" alone: the journal (journal.rs), 8 MiB
//! 1 or 9 MiB  tuples: 8 bytes a block, every bit inverted
//! ```
//!
//! The file is sparse: a hole in the tuples reads as zeros, which inverted is the escape, "no protection information".
//! A sidecar covers the blocks of one LUN as its guest sees them. A block that was not written through this handler
//! since the sidecar was made has the escape until `pi rebuild`, and is not checked, unless a backing file holds it that
//! has a sidecar of its own ([`super::chain`]).
//!
//! What holds at any instant, power loss included:
//! - Mode "bitmap": a block whose region is not marked in the map matches its durable tuple, or its tuple is the escape.
//! - Mode "journal": a block matches its durable tuple, or that is the escape, or one of the tuples that the journal claims
//!   for it, unless the disk has torn it.
//! - While the header says "clean", nobody of ours has written since the stamp was taken.
//!
//! The intent map has no checksum: a bit lost to bit rot could turn a crash into a false alarm, one gained costs a
//! look at a region. Torn writes of it are harmless, which a checksum would end.
//!
//! Initiators' application tags stand in the tuples as they are.
//!
//! [`super::protected`] and [`super::tools`] are the callers; the lock on image and sidecar is the image room's.

mod error;
mod file;
mod gather;
mod header;
mod intent;
mod journal;
mod mode;
mod recording;
mod stamp;
mod tuples;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    ops::Range,
};

use serde::Serialize;
use uuid::Uuid;

use gather::Gather;

pub use error::StoreError;
pub use file::{create_file, default_path, open_file};
pub use header::ImageFormat;
pub use intent::{CLEAR_EVERY, Writing};
pub use journal::{Claim, Claims, ENTRY, Intention, Recorded, entry};
pub use mode::{PiMode, UnknownPiMode};
pub use stamp::Stamp;
pub use tuples::Source;

use super::{
    exposure::Exposure,
    tuple::{PiType, TUPLE_LEN},
};
use crate::{
    storage::{
        Storage,
        cache::{Cache, OffsetMap},
    },
    sync::AsyncMutex,
    sys::{io::Fallocate, mem::Buffer},
    units::{BlockSize, Blocks, Lba},
};
use header::{COPIES, Copy, FORMATTED, HEADER_LEN, HIDDEN, Header, INITIATOR_TAGS};
use intent::Intent;
use journal::Journal;

const MAP_OFFSET: u64 = 64 << 10;
const MAP_END: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// How a new sidecar is laid out; tests take smaller pieces.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// log2 of the bytes of data in a region of the intent map.
    pub region_shift: u32,
    /// Bytes of the journal.
    pub journal_len: u64,
}

/// The usual layout.
pub(super) const LAYOUT: Layout = Layout { region_shift: 26, journal_len: 8 << 20 };

/// What a new sidecar is for.
#[derive(Debug, Clone, Copy)]
pub struct NewSidecar {
    /// The LUN's block size.
    pub block_size: BlockSize,
    /// The type of protection.
    pub kind: PiType,
    /// How it stays true across a crash.
    pub mode: PiMode,
    /// The LUN's capacity.
    pub capacity: Blocks,
    /// The image's format.
    pub format: ImageFormat,
    /// The image as it is now.
    pub stamp: Stamp,
}

/// What a sidecar says of itself.
#[derive(Debug, Clone, Serialize)]
pub struct SidecarInfo {
    /// Its identity.
    pub uuid: String,
    /// Type of protection.
    pub pi: PiType,
    /// How it stays true across a crash.
    pub mode: PiMode,
    /// Whose tags the tuples have.
    pub tags: Exposure,
    /// An initiator's FORMAT UNIT has chosen the type.
    pub formatted: bool,
    /// FORMAT UNIT has turned protection off as far as initiators see.
    pub hidden: bool,
    /// Block size in bytes.
    pub block_size: u64,
    /// Capacity of the LUN in blocks.
    pub blocks: u64,
    /// Whether it was not closed cleanly, or is in use.
    pub in_use: bool,
    /// The image at the last clean close.
    pub stamp: Stamp,
    /// Regions that are marked in the intent map.
    pub marked_regions: u64,
    /// Bytes of data in a region.
    pub region_bytes: u64,
}

/// An open sidecar.
pub struct Sidecar<S> {
    storage: S,
    header: RefCell<Header>,
    header_turn: AsyncMutex,
    intent: Intent,
    journal: Option<Journal>,
    /// Tuples that differ from those in the file: what the journal of a sidecar that is only read makes of them.
    overlay: RefCell<HashMap<u64, [u8; TUPLE_LEN]>>,
    /// Pages of tuples that are known to have their space, 64 a word.
    pages: RefCell<OffsetMap<u64>>,
    gather: Gather,
    /// Pages of tuples in memory.
    recent: Option<Cache>,
    written: Cell<u64>,
    synced: Cell<u64>,
    failed: Cell<bool>,
}

impl<S: Storage> Sidecar<S> {
    /// Makes a sidecar in an empty file: every block has the escape, and it is clean with the stamp given.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`], [`StoreError::TooLarge`], or what the file says.
    pub async fn create(storage: S, new: NewSidecar) -> Result<Sidecar<S>, StoreError> {
        Sidecar::create_as(storage, new, LAYOUT).await
    }

    /// [`Sidecar::create`] with another layout.
    pub(super) async fn create_as(
        storage: S,
        new: NewSidecar,
        layout: Layout,
    ) -> Result<Sidecar<S>, StoreError> {
        if storage.len().await? != 0 {
            return Err(StoreError::NotEmpty);
        }
        let journal = (new.mode == PiMode::Journal).then_some((MAP_END, layout.journal_len));
        let header = Header {
            compatible: 0,
            generation: 1,
            block_size: new.block_size,
            kind: new.kind,
            in_use: false,
            format: new.format,
            capacity: new.capacity,
            uuid: Uuid::new_v4(),
            stamp: new.stamp,
            region_shift: layout.region_shift,
            map_offset: MAP_OFFSET,
            map_len: MAP_END - MAP_OFFSET,
            tuple_offset: journal.map_or(MAP_END, |(offset, len)| offset + len),
            journal,
        };
        let sidecar = Sidecar::new(storage, header);
        sidecar.reserve_map(new.capacity).await?;
        sidecar.storage.sync().await?;
        for _ in COPIES {
            sidecar.write_header(|_| ()).await?;
        }
        Ok(sidecar)
    }

    /// Opens a sidecar: the newest whole copy of its header, and its map. Changes nothing.
    ///
    /// # Errors
    /// Anything of [`StoreError`] but what only creation has.
    pub async fn open(storage: S) -> Result<Sidecar<S>, StoreError> {
        let mut best: Option<Header> = None;
        let (mut refused, mut foreign) = (None, 0);
        for at in COPIES {
            let buffer = Buffer::zeroed(HEADER_LEN);
            storage.read(at, &buffer.sg()).await?;
            let mut bytes = [0; HEADER_LEN];
            buffer.sg().copy_out(0, &mut bytes);
            match Header::from_bytes(&bytes) {
                Copy::Good(h) => {
                    if best.as_ref().is_none_or(|b| b.generation < h.generation) {
                        best = Some(h);
                    }
                }
                Copy::Refused(e) => refused = Some(e),
                Copy::Foreign => foreign += 1,
                Copy::Damaged => (),
            }
        }
        if let Some(e) = refused {
            // A whole copy of a later make: the other one, even if we understand it, is not the last word.
            return Err(e);
        }
        let Some(header) = best else {
            return Err(if foreign == COPIES.len() { StoreError::NotASidecar } else { StoreError::Damaged });
        };
        let regions = regions_of(&header, header.capacity)?;
        let sidecar = Sidecar::new(storage, header);
        sidecar.intent.load(&sidecar.storage, regions).await?;
        Ok(sidecar)
    }

    fn new(storage: S, header: Header) -> Sidecar<S> {
        let intent = Intent::new(header.map_offset, header.region_shift);
        let journal = header.journal.map(|(offset, len)| Journal::new(offset, len));
        // What an earlier session wrote, and `kill -9` has left in the page cache, is as little durable as what this one
        // writes: the first sync is never spared.
        let written = u64::from(header.in_use);
        Sidecar {
            storage,
            header: RefCell::new(header),
            header_turn: AsyncMutex::new(),
            intent,
            journal,
            overlay: RefCell::default(),
            pages: RefCell::default(),
            gather: Gather::default(),
            recent: None,
            written: Cell::new(written),
            synced: Cell::new(0),
            failed: Cell::new(false),
        }
    }

    /// What it says of itself.
    pub fn info(&self) -> SidecarInfo {
        let h = self.header.borrow();
        SidecarInfo {
            uuid: h.uuid.to_string(),
            pi: h.kind,
            mode: self.mode(),
            tags: tags_of(&h),
            formatted: h.compatible & FORMATTED != 0,
            hidden: h.compatible & HIDDEN != 0,
            block_size: h.block_size.bytes(),
            blocks: h.capacity.0,
            in_use: h.in_use,
            stamp: h.stamp,
            marked_regions: self.intent.marked().len() as u64,
            region_bytes: 1 << h.region_shift,
        }
    }

    /// The type of protection.
    pub fn kind(&self) -> PiType {
        self.header.borrow().kind
    }

    /// How it stays true across a crash.
    pub fn mode(&self) -> PiMode {
        if self.journal.is_some() { PiMode::Journal } else { PiMode::Bitmap }
    }

    /// Whose tags the tuples have.
    pub fn tags(&self) -> Exposure {
        tags_of(&self.header.borrow())
    }

    /// Says durably, before the first tuple of an initiator is written, that there may be such.
    pub async fn admit_initiator_tags(&self) -> io::Result<()> {
        match self.tags() {
            Exposure::Initiator => Ok(()),
            Exposure::Target => self.write_header(|h| h.compatible |= INITIATOR_TAGS).await,
        }
    }

    /// FORMAT UNIT: forgets every tuple, and sets the type that initiators see, or hides it from them. Nobody else may
    /// be at work.
    pub async fn reformat(&self, seen: Option<PiType>) -> io::Result<()> {
        self.forget_beyond(Blocks(0)).await?;
        self.write_header(|h| {
            h.compatible &= !(INITIATOR_TAGS | HIDDEN);
            h.compatible |= FORMATTED;
            match seen {
                Some(kind) => (h.kind, h.compatible) = (kind, h.compatible | INITIATOR_TAGS),
                None => h.compatible |= HIDDEN,
            }
        })
        .await
    }

    /// The block size.
    pub fn block_size(&self) -> BlockSize {
        self.header.borrow().block_size
    }

    /// The capacity of the LUN.
    pub fn capacity(&self) -> Blocks {
        self.header.borrow().capacity
    }

    /// The format of the image.
    pub fn format(&self) -> ImageFormat {
        self.header.borrow().format
    }

    /// Whether the last session did not close it.
    pub fn in_use(&self) -> bool {
        self.header.borrow().in_use
    }

    /// The file beneath.
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// Durable writes of the intent map, or of the journal, so far.
    pub fn intent_commits(&self) -> u64 {
        self.journal.as_ref().map_or(self.intent.commits(), Journal::commits)
    }

    /// Writes the other copy of the header, durably, after a change.
    async fn write_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let _turn = self.header_turn.lock().await;
        let mut new = self.header.borrow().clone();
        change(&mut new);
        new.generation += 1;
        let at = COPIES[(new.generation % 2) as usize];
        self.storage.write(at, &Buffer::from_slice(&new.to_bytes()).sg(), true).await?;
        *self.header.borrow_mut() = new;
        Ok(())
    }

    /// Says in the header, durably, that somebody is writing. Before the first write.
    pub async fn begin_use(&self) -> io::Result<()> {
        self.write_header(|h| h.in_use = true).await
    }

    /// Says that everything is written, and what the image looks like. Everything must be durable.
    pub async fn end_use(&self, stamp: Stamp) -> io::Result<()> {
        self.sync().await?;
        // The clearing of the map was written after the data were durable, and need not be durable itself.
        self.write_header(|h| (h.in_use, h.stamp) = (false, stamp)).await
    }

    /// Sets another capacity in the header and keeps nothing for blocks beyond it.
    ///
    /// # Errors
    /// `InvalidInput` if the map has no room for it, or what the file says.
    pub async fn set_capacity(&self, capacity: Blocks) -> io::Result<()> {
        let regions = regions_of(&self.header.borrow(), capacity)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        if capacity < self.capacity() {
            self.forget_beyond(capacity).await?;
            self.intent.forget_beyond(regions);
        } else {
            self.reserve_map(capacity).await?;
        }
        self.write_header(|h| h.capacity = capacity).await
    }

    /// Whether the map has room for so many blocks.
    pub fn can_cover(&self, capacity: Blocks) -> bool {
        regions_of(&self.header.borrow(), capacity).is_ok()
    }

    /// Gives every block from `capacity` on the escape, durably.
    pub async fn forget_beyond(&self, capacity: Blocks) -> io::Result<()> {
        let end = self.tuple_at(Lba(capacity.0));
        if self.storage.len().await? > end {
            let _changing = self.changing(0, u64::MAX);
            self.storage.set_len(end).await?;
            self.wrote();
            self.pages.borrow_mut().clear();
        }
        self.sync().await
    }

    /// Keeps space for the map, so that an intent cannot fail for want of it.
    async fn reserve_map(&self, capacity: Blocks) -> Result<(), io::Error> {
        let (offset, regions) = {
            let h = self.header.borrow();
            let regions =
                regions_of(&h, capacity).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
            (h.map_offset, regions)
        };
        let len = regions.div_ceil(8).next_multiple_of(PAGE).max(PAGE);
        match self.storage.fallocate(Fallocate::Allocate, offset, len).await {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            done => done,
        }
    }

    /// Marks the regions of those blocks, durably, before they are written; they stay marked while the guard lives, and
    /// beyond it until a flush has covered them.
    pub async fn intend(&self, lba: Lba, blocks: u64) -> io::Result<Writing<'_>> {
        let shift = self.block_size().shift();
        let regions = self.intent.regions(lba.0 << shift, blocks << shift);
        self.intent.enter(&self.storage, regions).await
    }

    /// The blocks of the marked regions, region by region.
    pub fn marked(&self) -> Vec<Range<u64>> {
        let (shift, capacity) = self.region_blocks();
        let all = self.intent.marked().into_iter();
        all.map(|r| (r << shift).min(capacity)..((r + 1) << shift).min(capacity)).collect()
    }

    /// What is marked now is to be looked at, and stays marked until it has been ([`Sidecar::checked`]).
    pub fn hold_marked(&self) {
        self.intent.hold_marked();
    }

    /// Of the regions in which those blocks lie, those have been looked at for whose blocks `is_done` says so.
    pub fn checked(&self, blocks: &Range<u64>, is_done: impl Fn(&Range<u64>) -> bool) {
        let (shift, _) = self.region_blocks();
        for region in blocks.start >> shift..blocks.end.div_ceil(1 << shift) {
            if is_done(&(region << shift..(region + 1) << shift)) {
                self.intent.checked(region);
            }
        }
    }

    /// Whether a block lies in a marked region.
    pub fn is_marked(&self, lba: Lba) -> bool {
        self.intent.is_marked(lba.0 >> self.region_blocks().0)
    }

    fn region_blocks(&self) -> (u32, u64) {
        let h = self.header.borrow();
        (h.region_shift - h.block_size.shift(), h.capacity.0)
    }

    fn wrote(&self) {
        self.written.set(self.written.get() + 1);
    }

    /// Brings all that was written to stable storage. Once it has failed it fails for good.
    pub async fn sync(&self) -> io::Result<()> {
        if self.failed.get() {
            return Err(io::Error::other("an earlier flush of the sidecar has failed"));
        }
        let written = self.written.get();
        if self.synced.get() >= written {
            return Ok(());
        }
        let done = self.storage.sync().await;
        match &done {
            Ok(()) => self.synced.set(self.synced.get().max(written)),
            Err(_) => self.failed.set(true),
        }
        done
    }

    /// A flush of data and tuples begins.
    pub fn begin_flush(&self) -> FlushMark {
        FlushMark {
            epoch: self.intent.begin_flush(),
            run: self.journal.as_ref().map_or((0, 0), Journal::begin_flush),
        }
    }

    /// The flush that began so has succeeded, for data and tuples: idle regions (with `all`, every region without a writer)
    /// and the journal may be cleared. If that fails they stay, which costs a look at the next open and nothing else.
    pub async fn end_flush(&self, mark: FlushMark, all: bool) {
        let done = match &self.journal {
            None => self.intent.end_flush(&self.storage, mark.epoch, all).await,
            Some(journal) => journal.end_flush(&self.storage, mark.run).await,
        };
        if let Err(e) = done {
            tracing::warn!(error = %e, "the intent map or journal of the protection information could not be cleared");
        }
    }
}

/// When a flush began.
#[derive(Debug, Clone, Copy)]
pub struct FlushMark {
    epoch: u64,
    run: (u64, u64),
}

fn tags_of(h: &Header) -> Exposure {
    if h.compatible & INITIATOR_TAGS != 0 { Exposure::Initiator } else { Exposure::Target }
}

/// Regions that so many blocks make, if the map has room for them.
fn regions_of(h: &Header, capacity: Blocks) -> Result<u64, StoreError> {
    let bytes = capacity.to_bytes(h.block_size).ok_or(StoreError::TooLarge(capacity.0))?;
    let regions = bytes.div_ceil(1 << h.region_shift);
    if regions > h.map_len * 8 { Err(StoreError::TooLarge(capacity.0)) } else { Ok(regions) }
}
