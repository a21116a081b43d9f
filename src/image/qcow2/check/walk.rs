//! What a check knows of an image, and the walk that counts every reference.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use super::{
    CheckReport, Progress,
    counts::{Counts, Flags},
};
use crate::{
    image::qcow2::{
        Storage,
        header::HeaderInfo,
        layout::{COMPRESSED, COPIED, Entry, Geometry, Place, offset},
        tables::decode,
    },
    storage::cache::OffsetMap,
    sys::{exec::join_all, mem::Buffer},
};

/// L2 tables that one check follows; more would need 128 MiB of L1 entries, of which QEMU permits 32.
const MOST_TABLES: usize = 1 << 24;
/// Bytes of L2 tables that are read side by side.
const ABREAST: u64 = 4 << 20;

/// What a cluster of metadata is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The header's cluster.
    Header,
    /// The L1 table in use.
    L1,
    /// An L2 table, of the guest's disk or of a snapshot, or of several.
    L2,
    /// A snapshot's L1 table.
    SnapshotL1,
    /// The snapshot table.
    Snapshots,
    /// The directory of bitmaps, or the table of one.
    Bitmaps,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
}

/// A cluster of metadata: what it is, and how many references it has as that.
pub struct Owned {
    owner: Owner,
    references: u64,
    /// It is something else too.
    clash: bool,
}

/// How often an L2 table is referred to: by any L1 entry, and by those in use.
#[derive(Default, Clone, Copy)]
pub struct Table {
    pub references: u64,
    pub active: u64,
}

/// A refcount block that can be read.
#[derive(Clone, Copy)]
pub struct Block {
    pub at: u64,
    /// It may be written in place.
    pub good: bool,
    /// Entries of the refcount table that refer to it.
    pub entries: u64,
}

/// What a check knows of an image.
pub struct Scan {
    pub header: HeaderInfo,
    pub g: Geometry,
    pub file_len: u64,
    /// Clusters of the file, the last perhaps cut short.
    pub clusters: u64,
    pub l1: Vec<u64>,
    pub refcount_table: Vec<u64>,
    /// References that were found.
    pub references: Counts,
    /// Clusters whose refcount, as the image has it, is 1.
    pub ones: Flags,
    pub owned: OffsetMap<Owned>,
    /// L2 tables, by their offset.
    pub tables: BTreeMap<u64, Table>,
    /// Refcount blocks, by their index in the table.
    pub blocks: BTreeMap<u64, Block>,
    /// Indices of the refcount table that need a new block.
    pub replace: BTreeSet<u64>,
    /// Something that refers to clusters could not be followed: nothing may be taken for free.
    pub blind: bool,
    pub report: CheckReport,
}

/// What an L2 entry says, and what is wrong with it. An entry that makes no sense still refers to what QEMU would take it for:
/// the guest's data may be there.
pub fn read_entry(g: &Geometry, entry: Entry) -> (Place, Option<&'static str>) {
    let word = entry.word;
    match g.place(entry) {
        Ok(place @ Place::Compressed { .. }) => {
            let wrong = "the COPIED flag is set for a compressed cluster";
            (place, (word & COPIED != 0).then_some(wrong))
        }
        Ok(place) => (place, g.mapping(entry, 0).err()),
        Err(why) if word & COMPRESSED != 0 => (Place::None, Some(why)),
        Err(why) => {
            let (host, owned) = (offset(word), word & COPIED != 0);
            let place = if host == 0 { Place::None } else { Place::Cluster { host, owned } };
            (place, Some(why))
        }
    }
}

impl Scan {
    /// Reads the tables that the header names; what lies beyond the end of the file reads as zeros.
    pub async fn new<S: Storage>(storage: &S, header: HeaderInfo, file_len: u64) -> io::Result<Scan> {
        let g = header.geometry();
        let l1 = Scan::words(storage, header.l1_offset, u64::from(header.l1_entries) * 8).await?;
        let table_bytes = u64::from(header.refcount_table_clusters) << g.cluster_bits;
        let refcount_table = Scan::words(storage, header.refcount_table_offset, table_bytes).await?;
        let report = CheckReport {
            total_clusters: g.clusters_for(header.virtual_size.next_multiple_of(512)),
            marked: header.dirty || header.corrupt,
            ..CheckReport::default()
        };
        Ok(Scan {
            g,
            file_len,
            clusters: g.clusters_for(file_len),
            l1,
            refcount_table,
            references: Counts::default(),
            ones: Flags::default(),
            owned: OffsetMap::default(),
            tables: BTreeMap::new(),
            blocks: BTreeMap::new(),
            replace: BTreeSet::new(),
            blind: false,
            report,
            header,
        })
    }

    /// A table of 64-bit words; the caller has bounded its size.
    pub async fn words<S: Storage>(storage: &S, at: u64, bytes: u64) -> io::Result<Vec<u64>> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let buffer = Buffer::zeroed(bytes as usize);
        storage.read(at, &buffer.sg()).await?;
        Ok(decode(&buffer))
    }

    /// Counts `n` references to a range of the file. The last cluster may be cut short; what goes beyond that is an error, and
    /// the answer false.
    pub fn refer(&mut self, at: u64, len: u64, n: u64, who: impl Fn() -> String) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let end = at.saturating_add(len);
        if end.saturating_sub(self.file_len) >= self.g.cluster() {
            self.report.corrupt(n, || format!("{} refers to {at:#x}, beyond the end of the file", who()));
            return Ok(false);
        }
        let most = self.g.max_refcount();
        for cluster in self.g.index(at)..=self.g.index(end - 1) {
            let old = self.references.get(cluster);
            // The count goes on all the same: who shares a cluster must be known.
            let excess = n.min(old.saturating_add(n).saturating_sub(most));
            if excess > 0 {
                let at = cluster << self.g.cluster_bits;
                let bits = 1u64 << self.g.refcount_order;
                self.report.corrupt(excess, || {
                    format!(
                        "the cluster at {at:#x} has more references than refcounts of {bits} bits can say"
                    )
                });
            }
            self.references.set(cluster, old.saturating_add(n))?;
        }
        Ok(true)
    }

    /// A table of metadata: counted, and known as what it is. False if it does not lie in the file.
    pub fn table(&mut self, owner: Owner, at: u64, bytes: u64) -> io::Result<bool> {
        if bytes == 0 {
            return Ok(true);
        }
        if !self.refer(at, bytes, 1, || format!("{owner:?}"))? {
            return Ok(false);
        }
        for cluster in self.g.index(at)..=self.g.index(at + bytes - 1) {
            let owned = self.owned.entry(cluster).or_insert(Owned { owner, references: 0, clash: false });
            owned.references += 1;
            owned.clash |= owned.references > 1 && !(owned.owner == owner && owner == Owner::L2);
        }
        Ok(true)
    }

    /// Whether the cluster of a table is nothing else besides, so that writing to it changes nothing but the table.
    pub fn alone(&self, cluster: u64) -> bool {
        self.owned
            .get(&cluster)
            .is_some_and(|owned| !owned.clash && self.references.get(cluster) == owned.references)
    }

    /// The tables of fixed places, and the L1 table's entries.
    pub fn fixed_tables(&mut self) -> io::Result<()> {
        self.table(Owner::Header, 0, self.g.cluster())?;
        if self.table(Owner::L1, self.header.l1_offset, self.l1.len() as u64 * 8)? {
            let l1 = std::mem::take(&mut self.l1);
            self.l1_entries(&l1, true)?;
            self.l1 = l1;
        } else {
            self.l1.fill(0);
            self.blind = true;
        }
        Ok(())
    }

    /// Notes the L2 tables of an L1 table.
    pub fn l1_entries(&mut self, l1: &[u64], active: bool) -> io::Result<()> {
        let cluster = self.g.cluster();
        for (index, entry) in l1.iter().copied().enumerate().filter(|(_, entry)| *entry != 0) {
            let at = match self.g.table(entry) {
                Ok(Some(at)) => at,
                Ok(None) => {
                    self.report.corrupt(1, || format!("L1 entry {index} has the COPIED flag and no table"));
                    continue;
                }
                Err(why) => {
                    self.report.corrupt(1, || format!("L1 entry {index} is {entry:#x}: {why}"));
                    self.blind = true;
                    let at = offset(entry);
                    if !self.g.aligned(at) {
                        self.refer(at, cluster, 1, || format!("L1 entry {index}"))?;
                        continue;
                    }
                    at
                }
            };
            if at == 0 || !self.table(Owner::L2, at, cluster)? {
                self.blind = true;
                continue;
            }
            if self.tables.len() >= MOST_TABLES {
                return Err(io::Error::other("the image has too many L2 tables to be checked"));
            }
            let table = self.tables.entry(at).or_default();
            table.references += 1;
            table.active += u64::from(active);
            if table.active > 1
                && let Some(owned) = self.owned.get_mut(&self.g.index(at))
            {
                owned.clash = true;
            }
        }
        Ok(())
    }

    /// Walks all L2 tables: references, fragmentation, COPIED flags.
    pub async fn guest_tables<S: Storage>(&mut self, storage: &S, progress: Progress<'_>) -> io::Result<()> {
        self.l1_copied();
        let all: Vec<(u64, Table)> = self.tables.iter().map(|(at, table)| (*at, *table)).collect();
        let cluster = self.g.cluster();
        let total = all.len() as u64 * cluster;
        let mut done = 0;
        for some in all.chunks((ABREAST / cluster) as usize) {
            let reads = some.iter().map(|(at, _)| async move {
                let buffer = Buffer::zeroed(cluster as usize);
                let result = storage.read(*at, &buffer.sg()).await;
                result.map(|()| buffer)
            });
            for ((at, table), read) in some.iter().zip(join_all(reads).await) {
                match read {
                    Ok(buffer) => self.l2_table(*at, *table, &buffer.to_vec())?,
                    Err(e) => {
                        self.report.error(|| format!("the L2 table at {at:#x} cannot be read: {e}"));
                        self.blind = true;
                    }
                }
                done += cluster;
            }
            progress(done, total);
        }
        self.blocks_alone();
        Ok(())
    }

    fn l1_copied(&mut self) {
        for (index, entry) in self.l1.iter().copied().enumerate() {
            let at = offset(entry);
            if at != 0 && self.ones.get(self.g.index(at)) != (entry & COPIED != 0) {
                self.report.corrupt(1, || copied_words(&format!("L1 entry {index}"), entry));
            }
        }
    }

    fn l2_table(&mut self, at: u64, table: Table, bytes: &[u8]) -> io::Result<()> {
        let cluster = self.g.cluster();
        let mut next = None;
        let step = self.g.entry_bytes();
        for index in 0..bytes.len() / step as usize {
            let entry = self.g.entry(bytes, index);
            if entry == Entry::default() {
                continue;
            }
            let name = || format!("L2 entry {entry} at {:#x}", at + index as u64 * step);
            let (place, wrong) = read_entry(&self.g, entry);
            if let Some(why) = wrong {
                self.report.corrupt(table.references, || format!("{}: {why}", name()));
            }
            match place {
                Place::None => {}
                Place::Compressed { at, len } => {
                    self.refer(at, len, table.references, name)?;
                    self.report.allocated_clusters += table.active;
                    self.report.compressed_clusters += table.active;
                    self.report.fragmented_clusters += table.active;
                }
                Place::Cluster { host, owned } => {
                    // The clusters of a data file are counted nowhere.
                    let counted = !self.g.data_file;
                    if counted {
                        self.refer(host, cluster, table.references, name)?;
                    }
                    if table.active == 0 {
                        continue;
                    }
                    self.report.allocated_clusters += table.active;
                    if next.is_some_and(|next| next != host) {
                        self.report.fragmented_clusters += table.active;
                    }
                    next = Some(host + cluster);
                    if counted && owned != self.ones.get(self.g.index(host)) {
                        self.report.corrupt(table.active, || copied_words(&name(), entry.word));
                    }
                }
            }
        }
        Ok(())
    }
}

fn copied_words(name: &str, entry: u64) -> String {
    match entry & COPIED {
        0 => format!("{name} has no COPIED flag, and the refcount is 1"),
        _ => format!("{name} has the COPIED flag, and the refcount is not 1"),
    }
}
