//! Persistent dirty bitmaps, read at the opening and written at an orderly end (qcow2 specification, "Bitmaps extension" and "Bitmap
//! directory").
//!
//! While an image is open each of its bitmaps is marked in use ([`super::bitmaps`]), so that one that a crash has left is never taken for
//! true. They are written anew as a whole: their clusters, tables and directory where nothing is yet, and synced; then the autoclear bit goes,
//! the header extension names the new directory, and the bit comes back, each durable before the next. A crash in between leaves bitmaps
//! that are in use, or none, and leaks clusters at worst.

use super::{
    Qcow2, Storage,
    bitmaps::{BitmapDirectory, BitmapEntry, MAX_DIRECTORY},
    header::{BITMAPS, EXT_BITMAPS, HeaderInfo, field, probe_header},
    layout::{be16, be32, be64},
    open::read_header,
    rebase::{HEAD, extensions},
    tables::encode,
};
use crate::{
    sys::mem::Buffer,
    volume::{IoErrorKind, IoOp, Result},
};

const OP: IoOp = IoOp::Write;

/// Flags of a directory entry.
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const EXTRA_DATA_COMPATIBLE: u32 = 4;
/// The only type: a dirty tracking bitmap.
const DIRTY_TRACKING: u8 = 1;
/// log2 of the granularities that QEMU has.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Bytes of the header extension's data.
const EXTENSION: usize = 24;
/// The most that the bits of one are read into memory for (bytes).
const MOST_BITS: u64 = 256 << 20;

/// A bitmap as an image keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name.
    pub name: String,
    /// Changes are to be marked in it (flag "auto").
    pub enabled: bool,
    /// log2 of the bytes that a bit stands for.
    pub granularity_bits: u32,
    /// The bits, 64 in a word, least significant first; `None` if they were in use, or make no sense, and nobody knows what changed.
    pub words: Option<Vec<u64>>,
}

/// An entry of the directory, with its bytes.
struct Listed {
    raw: Vec<u8>,
    entry: BitmapEntry,
    name: String,
}

impl Listed {
    fn flags(&self) -> u32 {
        be32(&self.raw, 12)
    }

    /// Whether its bits can be believed, and are of a kind that we know.
    fn is_known(&self, cluster: u64, size: u64) -> bool {
        let extra = be32(&self.raw, 20);
        let bits = self.entry.granularity_bits;
        let known = self.raw[16] == DIRTY_TRACKING
            && self.flags() & !(AUTO | EXTRA_DATA_COMPATIBLE) == 0
            && (extra == 0 || self.flags() & EXTRA_DATA_COMPATIBLE != 0)
            && GRANULARITY_BITS.contains(&bits);
        known
            && bytes_for(size, bits.into()) <= MOST_BITS
            && self.entry.entries == bytes_for(size, bits.into()).div_ceil(cluster)
    }
}

/// Bytes that the bits of a disk take.
fn bytes_for(size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// The entries of a directory; `None` if it makes no sense.
fn list(directory: &[u8], count: u32) -> Option<Vec<Listed>> {
    let (mut at, mut found) = (0, Vec::new());
    for _ in 0..count {
        let entry = BitmapEntry::read(directory.get(at..)?)?;
        let raw = directory.get(at..at + entry.len)?.to_vec();
        let from = BitmapEntry::HEAD + be32(&raw, 20) as usize;
        let name = raw.get(from..from + usize::from(be16(&raw, 18)))?;
        let name = String::from_utf8_lossy(name).into_owned();
        at += entry.len;
        found.push(Listed { raw, entry, name });
    }
    (at == directory.len()).then_some(found)
}

/// The first cluster with the extension, or without it; nothing changes if there is nothing to change.
struct NewHeader {
    /// The backing file's name is written there first, and its place named.
    name: Option<(usize, Vec<u8>)>,
    /// Written next, where nothing is read yet.
    body: Option<(usize, Vec<u8>)>,
    /// Written last.
    head: (usize, Vec<u8>),
}

fn plan(
    first: &[u8],
    header: &HeaderInfo,
    to: Option<BitmapDirectory>,
) -> std::result::Result<Option<NewHeader>, String> {
    let (name_at, name_len) = (be64(first, field::BACKING_FILE as usize) as usize, be32(first, 16) as usize);
    let end = if name_at == 0 { first.len() } else { name_at.min(first.len()) };
    let (all, after) = extensions(first, header.header_length as usize, end);
    let found = all.iter().find(|(_, kind, len)| *kind == EXT_BITMAPS && *len == EXTENSION);
    let data = |to: BitmapDirectory| {
        let words = [u64::from(to.count) << 32, to.bytes, to.at];
        words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>()
    };
    match (found, to) {
        (None, None) => Ok(None),
        // The autoclear bit is not set: nobody looks at it meanwhile.
        (Some((at, ..)), Some(to)) => {
            Ok(Some(NewHeader { name: None, body: None, head: (at + HEAD, data(to)) }))
        }
        (Some((at, ..)), None) => {
            let mut rest =
                first.get(at + HEAD + EXTENSION..after).ok_or("its extensions do not end")?.to_vec();
            rest.resize(after - at, 0);
            if all.last().is_some_and(|(last, ..)| last == at) {
                // What follows an end is not read.
                rest.truncate(HEAD);
            }
            Ok(Some(NewHeader { name: None, body: None, head: (*at, rest) }))
        }
        (None, Some(to)) => {
            let mark = after.saturating_sub(HEAD);
            let ends = first.get(mark..mark + HEAD).is_some_and(|head| head.iter().all(|b| *b == 0));
            let new_end = mark + HEAD + EXTENSION + HEAD;
            if !ends || new_end > first.len() {
                return Err("its first cluster is full".into());
            }
            let mut name = None;
            if name_at != 0 && new_end > name_at {
                let place = (name_at + name_len).max(new_end).next_multiple_of(8);
                if place + name_len > first.len() {
                    return Err("its first cluster is full".into());
                }
                name = Some((place, first[name_at..name_at + name_len].to_vec()));
            }
            let mut body = data(to);
            body.resize(EXTENSION + HEAD, 0);
            let head = [EXT_BITMAPS.to_be_bytes(), (EXTENSION as u32).to_be_bytes()].concat();
            Ok(Some(NewHeader { name, body: Some((mark + HEAD, body)), head: (mark, head) }))
        }
    }
}

/// Sees that a header would be read as before at each step, and at the end as it is meant to be.
fn check(
    first: &[u8],
    plan: &NewHeader,
    old: &HeaderInfo,
    to: Option<BitmapDirectory>,
) -> std::result::Result<(), String> {
    let mut bytes = first.to_vec();
    let mut put = |at: usize, what: &[u8]| {
        bytes[at..at + what.len()].copy_from_slice(what);
        probe_header(&bytes)
    };
    if let Some((at, name)) = &plan.name {
        let moved = put(*at, name).is_ok_and(|found| found == *old)
            && put(field::BACKING_FILE as usize, &(*at as u64).to_be_bytes())
                .is_ok_and(|found| found == *old);
        if !moved {
            return Err("the name of its backing file cannot be moved".into());
        }
    }
    if let Some((at, body)) = &plan.body
        && !put(*at, body).is_ok_and(|found| found == *old)
    {
        return Err("the extension would stand where something else does".into());
    }
    let meant = HeaderInfo { bitmaps: to, ..old.clone() };
    if !put(plan.head.0, &plan.head.1).is_ok_and(|found| found == meant) {
        return Err("what else it says would change".into());
    }
    Ok(())
}

impl<S: Storage> Qcow2<S> {
    /// Reads the bitmaps of an image that is to be written to, and marks them in use, durably. From the moment on at which this returns
    /// every change has to be marked in them. Those that were in use before, or are of a kind that is not known, have no bits.
    ///
    /// # Errors
    /// The image's own. A directory that makes no sense is as none.
    pub async fn use_bitmaps(&self) -> Result<Vec<StoredBitmap>> {
        let _shut = self.writers.shut().await;
        let found = self.read_bitmaps().await?;
        if !found.is_empty() && !self.read_only {
            self.begin_inside(OP).await?.finish();
        }
        Ok(found)
    }

    async fn listed(&self, directory: BitmapDirectory) -> Result<Vec<Listed>> {
        let bytes = Buffer::zeroed(directory.bytes as usize);
        self.storage.read(directory.at, &bytes.sg()).await.map_err(|e| self.io_error(OP, e))?;
        Ok(list(&bytes.to_vec(), directory.count).unwrap_or_default())
    }

    async fn read_bitmaps(&self) -> Result<Vec<StoredBitmap>> {
        let Some(directory) = self.bitmap_directory() else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for one in self.listed(directory).await? {
            let words = match one.is_known(self.geometry.cluster(), self.size.get()) {
                true => self.read_bits(&one.entry).await?,
                false => None,
            };
            let granularity_bits =
                one.entry.granularity_bits.clamp(*GRANULARITY_BITS.start(), *GRANULARITY_BITS.end());
            let enabled = one.flags() & AUTO != 0;
            found.push(StoredBitmap {
                name: one.name,
                enabled,
                granularity_bits: granularity_bits.into(),
                words,
            });
        }
        Ok(found)
    }

    /// Where a bitmap's clusters lie, 0 and 1 for such as are not there; `None` if its table does not lie in the file.
    async fn bitmap_table(&self, entry: &BitmapEntry) -> Result<Option<Vec<u64>>> {
        if !self.geometry.aligned(entry.table) {
            return Ok(None);
        }
        let table =
            super::open::read_table(&self.storage, self.file_len.get(), entry.table, entry.entries * 8).await;
        table.map_err(|e| self.io_error(OP, e))
    }

    fn is_bitmap_cluster(&self, at: u64) -> bool {
        let end = at.checked_add(self.geometry.cluster());
        self.geometry.aligned(at) && end.is_some_and(|end| end <= self.file_len.get())
    }

    async fn read_bits(&self, entry: &BitmapEntry) -> Result<Option<Vec<u64>>> {
        let Some(table) = self.bitmap_table(entry).await? else { return Ok(None) };
        let cluster = self.geometry.cluster() as usize;
        let mut bytes = vec![0; table.len() * cluster];
        for (part, entry) in bytes.chunks_exact_mut(cluster).zip(&table) {
            match entry {
                0 => {}
                1 => part.fill(0xff),
                at if self.is_bitmap_cluster(*at) => {
                    let buffer = Buffer::zeroed(cluster);
                    self.storage.read(*at, &buffer.sg()).await.map_err(|e| self.io_error(OP, e))?;
                    part.copy_from_slice(&buffer.to_vec());
                }
                _ => return Ok(None),
            }
        }
        // The last cluster has more bits than the disk.
        bytes
            .truncate(bytes_for(self.size.get(), entry.granularity_bits.into()).next_multiple_of(8) as usize);
        Ok(Some(
            bytes
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
                .collect(),
        ))
    }

    /// Whether bitmaps can be kept in it.
    ///
    /// # Errors
    /// `Unsupported` with the reason.
    pub fn check_bitmaps_work(&self) -> Result<()> {
        let why = match () {
            () if self.geometry.version < 3 => {
                "version 2 of qcow2 has no bitmaps: qemu-img amend -o compat=1.1 makes it version 3"
            }
            () if self.read_only => "the image is read-only",
            () => return Ok(()),
        };
        Err(self.error(IoErrorKind::Unsupported, OP, why))
    }

    /// Writes all bitmaps, in place of those that the image had; durable when this returns. One without bits stays as the image has it, in
    /// use. From then on the image cannot be changed, only closed.
    ///
    /// # Errors
    /// `Unsupported` if the header has no room; the image's own. Those that the image had are in use then, or gone.
    pub async fn store_bitmaps(&self, all: &[StoredBitmap]) -> Result<()> {
        if all.is_empty() && self.bitmap_directory().is_none() {
            return Ok(());
        }
        self.check_bitmaps_work()?;
        self.alone(OP, self.store_alone(all)).await
    }

    async fn store_alone(&self, all: &[StoredBitmap]) -> Result<()> {
        let g = self.geometry;
        // As the file says now: autoclear bits have gone since the opening.
        let header = read_header(&self.storage, self.file_len.get(), &self.path).await?;
        let had = self.sane_directory(&header);
        let old = match had {
            Some(directory) => self.listed(directory).await?,
            None => Vec::new(),
        };
        let mut taken = Vec::new();
        let written = self.write_new(all, &old, &mut taken).await;
        let (directory, first) = match written {
            Ok(written) => written,
            Err(e) => {
                // Nothing refers to them.
                taken.iter().for_each(|(at, count)| self.give_back(*at, *count));
                return Err(e);
            }
        };
        let unfit = |why: String| {
            let detail = format!("its header has no place for dirty bitmaps ({why})");
            self.error(IoErrorKind::Unsupported, OP, detail)
        };
        let plan = plan(&first, &header, directory).and_then(|plan| {
            plan.iter().try_for_each(|plan| check(&first, plan, &header, directory))?;
            Ok(plan)
        });
        let plan = match plan {
            Ok(plan) => plan,
            Err(why) => {
                taken.iter().for_each(|(at, count)| self.give_back(*at, *count));
                return Err(unfit(why));
            }
        };
        let other = header.autoclear & !BITMAPS;
        self.put_word(field::AUTOCLEAR, other).await?;
        if let Some(plan) = plan {
            if let Some((at, name)) = plan.name {
                self.put(at as u64, &name).await?;
                self.put_word(field::BACKING_FILE, at as u64).await?;
            }
            if let Some((at, body)) = plan.body {
                self.put(at as u64, &body).await?;
            }
            self.put(plan.head.0 as u64, &plan.head.1).await?;
        }
        if directory.is_some() {
            self.put_word(field::AUTOCLEAR, other | BITMAPS).await?;
        }
        // From here on a change would not be marked.
        self.bitmaps_stored.set(true);
        // Nothing refers to the old ones any more.
        for one in &old {
            let stays = all.iter().any(|b| b.name == one.name && b.words.is_none());
            let Some(table) = self.bitmap_table(&one.entry).await?.filter(|_| !stays) else { continue };
            for at in table.into_iter().filter(|at| *at > 1 && self.is_bitmap_cluster(*at)) {
                self.free_later(g.index(at), 1);
            }
            self.free_later(g.index(one.entry.table), g.clusters_for(one.entry.entries * 8));
        }
        if let Some(directory) = had {
            self.free_later(g.index(directory.at), g.clusters_for(directory.bytes));
        }
        Ok(())
    }

    async fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write(at, &Buffer::from_slice(bytes).sg()).await.map_err(|e| self.io_error(OP, e))?;
        self.sync(OP).await
    }

    async fn put_word(&self, at: u64, word: u64) -> Result<()> {
        self.put(at, &word.to_be_bytes()).await
    }

    /// Writes clusters, tables and the directory where nothing is yet, durably; gives where the directory is, if there is one, and the header's
    /// cluster as it is. What was taken is in `taken`.
    async fn write_new(
        &self,
        all: &[StoredBitmap],
        old: &[Listed],
        taken: &mut Vec<(u64, u64)>,
    ) -> Result<(Option<BitmapDirectory>, Vec<u8>)> {
        let g = self.geometry;
        let (mut directory, mut count) = (Vec::new(), 0);
        for one in all {
            let Some(words) = &one.words else {
                let Some(stays) = old.iter().find(|listed| listed.name == one.name) else { continue };
                let mut raw = stays.raw.clone();
                raw[12..16].copy_from_slice(&(stays.flags() | IN_USE).to_be_bytes());
                directory.extend(raw);
                count += 1;
                continue;
            };
            let (table, entries) = self.write_bits(one, words, taken).await?;
            let name = one.name.as_bytes();
            let flags = if one.enabled { AUTO } else { 0 };
            let mut raw = table.to_be_bytes().to_vec();
            raw.extend((entries as u32).to_be_bytes());
            raw.extend(flags.to_be_bytes());
            raw.extend([DIRTY_TRACKING, one.granularity_bits as u8]);
            raw.extend((name.len() as u16).to_be_bytes());
            raw.extend([0; 4]); // no extra data
            raw.extend(name);
            raw.resize(raw.len().next_multiple_of(8), 0);
            directory.extend(raw);
            count += 1;
        }
        let mut place = None;
        if count > 0 {
            let bytes = directory.len() as u64;
            if bytes > MAX_DIRECTORY {
                return Err(self.error(
                    IoErrorKind::Unsupported,
                    OP,
                    "the directory of its bitmaps is too long",
                ));
            }
            let (first, clusters) = self.take_together(OP, g.clusters_for(bytes)).await?;
            let at = first << g.cluster_bits;
            taken.push((at, clusters));
            self.storage
                .write(at, &Buffer::from_slice(&directory).sg())
                .await
                .map_err(|e| self.io_error(OP, e))?;
            place = Some(BitmapDirectory { count, bytes, at });
        }
        self.sync(OP).await?;
        let first = Buffer::zeroed(g.cluster().min(self.file_len.get()) as usize);
        self.storage.read(0, &first.sg()).await.map_err(|e| self.io_error(OP, e))?;
        Ok((place, first.to_vec()))
    }

    /// Writes the bits of one, and their table; gives where that is, and its entries.
    async fn write_bits(
        &self,
        one: &StoredBitmap,
        words: &[u64],
        taken: &mut Vec<(u64, u64)>,
    ) -> Result<(u64, u64)> {
        let g = self.geometry;
        let bytes = bytes_for(self.size.get(), one.granularity_bits);
        let mut data: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        data.resize(bytes as usize, 0);
        let mut table = Vec::new();
        for part in data.chunks(g.cluster() as usize) {
            if part.iter().all(|b| *b == 0) {
                table.push(0);
                continue;
            }
            let (at, count) = self.take(OP, 1).await?;
            taken.push((at, count));
            self.storage.write(at, &Buffer::from_slice(part).sg()).await.map_err(|e| self.io_error(OP, e))?;
            table.push(at);
        }
        let (first, count) = self.take_together(OP, g.clusters_for(table.len() as u64 * 8)).await?;
        let at = first << g.cluster_bits;
        taken.push((at, count));
        self.storage.write(at, &encode(&table).sg()).await.map_err(|e| self.io_error(OP, e))?;
        Ok((at, table.len() as u64))
    }
}
