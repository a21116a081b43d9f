//! The arithmetic of a qcow2 image, without files: how a guest offset is split, what an L1 or L2 entry says, how refcounts
//! are packed. Everything that comes from a file is checked here, and nothing here can panic on it.

/// Bytes that a metadata cache holds at once; a table of a small cluster is one slice.
pub const SLICE: u64 = 4096;
/// Largest L1 table in bytes, QEMU's own bound.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes, QEMU's own bound.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Host offsets lie below this (bits 9–55 of an entry).
pub const MAX_HOST: u64 = 1 << 56;

/// Bit 63 of an L1 or L2 entry: the refcount is exactly one, and the cluster may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster descriptor follows.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry (version 3, not extended): the cluster reads as zeros.
pub const ZERO: u64 = 1;
/// The parts that extended L2 entries divide a cluster into.
pub const SUBCLUSTERS: u64 = 32;
/// The bitmap of an extended L2 entry: every subcluster is allocated.
pub const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// The bitmap of an extended L2 entry: every subcluster reads as zeros.
pub const ALL_ZEROS: u64 = ALL_ALLOCATED << 32;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The sizes that an image is built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9–21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0–6.
    pub refcount_order: u32,
    /// L2 entries have 128 bits, and clusters 32 subclusters (incompatible feature bit 4).
    pub extended_l2: bool,
    /// The guest's clusters lie in a file of their own (incompatible feature bit 2).
    pub data_file: bool,
}

/// The offset that a table's entry names (bits 9–55), whatever else is set, and whether or not it makes sense.
pub fn offset(word: u64) -> u64 {
    word & OFFSET
}

/// An L2 entry as it stands in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// The standard entry: offset and flags.
    pub word: u64,
    /// With extended L2 entries, the subclusters: bits 0–31 allocated, bits 32–63 zeros. 0 otherwise.
    pub bitmap: u64,
}

impl Entry {
    /// An entry that is the standard word alone.
    pub fn standard(word: u64) -> Entry {
        Entry { word, bitmap: 0 }
    }
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bitmap {
            0 => write!(f, "{:#x}", self.word),
            bitmap => write!(f, "{:#x} with bitmap {bitmap:#x}", self.word),
        }
    }
}

/// The place in the file that an L2 entry gives a guest cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// None.
    None,
    /// A cluster of the file.
    Cluster {
        /// Its offset.
        host: u64,
        /// Nobody else refers to it.
        owned: bool,
    },
    /// A compressed stream.
    Compressed {
        /// Offset in the file, of any alignment.
        at: u64,
        /// Bytes that may belong to it.
        len: u64,
    },
}

/// What an L2 entry says (qcow2 specification, "L2 table entry").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Not in this image: the backing file's, or zeros.
    Unallocated,
    /// Zeros, and no cluster is kept.
    Zero,
    /// Zeros, and a cluster is kept for later.
    ZeroAllocated {
        /// Offset of the cluster in the file.
        host: u64,
        /// Nobody else refers to it.
        owned: bool,
    },
    /// Data.
    Data {
        /// Offset of the cluster in the file.
        host: u64,
        /// Nobody else refers to it.
        owned: bool,
    },
    /// Compressed data.
    Compressed {
        /// Offset in the file, of any alignment.
        at: u64,
        /// Bytes that may belong to it; the stream ends within them.
        len: u64,
    },
}

impl Geometry {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The number of the cluster that holds a byte, of the guest or of the file.
    pub fn index(&self, at: u64) -> u64 {
        at >> self.cluster_bits
    }

    /// The place of a byte within its cluster.
    pub fn within(&self, at: u64) -> u64 {
        at & (self.cluster() - 1)
    }

    /// Clusters that hold that many bytes.
    pub fn clusters_for(&self, bytes: u64) -> u64 {
        (bytes >> self.cluster_bits) + u64::from(self.within(bytes) != 0)
    }

    /// Whether an offset is the start of a cluster.
    pub fn aligned(&self, at: u64) -> bool {
        self.within(at) == 0
    }

    /// log2 of the entries of an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }

    /// log2 of the bytes of an L2 entry.
    fn entry_bits(&self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// Bytes of an L2 entry.
    pub fn entry_bytes(&self) -> u64 {
        1 << self.entry_bits()
    }

    /// log2 of the smallest piece of the guest's disk that is mapped by itself: a subcluster, or a cluster.
    pub fn unit_bits(&self) -> u32 {
        if self.extended_l2 { self.cluster_bits - SUBCLUSTERS.ilog2() } else { self.cluster_bits }
    }

    /// Such pieces in a cluster.
    pub fn units(&self) -> u64 {
        1 << (self.cluster_bits - self.unit_bits())
    }

    /// The L1 index of a guest cluster.
    pub fn l1_index(&self, cluster: u64) -> u64 {
        cluster >> self.l2_bits()
    }

    /// The L2 index of a guest cluster.
    pub fn l2_index(&self, cluster: u64) -> u64 {
        cluster & ((1 << self.l2_bits()) - 1)
    }

    /// L1 entries that a guest of that size needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        let clusters = self.clusters_for(size);
        (clusters >> self.l2_bits()) + u64::from(self.l2_index(clusters) != 0)
    }

    /// log2 of the refcounts in one refcount block.
    pub fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The largest refcount that fits.
    pub fn max_refcount(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        }
    }

    /// Whether a guest's disk may have that many bytes: QEMU's bounds on it and on its L1 table.
    pub fn can_hold(&self, size: u64) -> bool {
        size <= i64::MAX as u64 && self.l1_entries_for(size) * 8 <= MAX_L1_BYTES
    }

    /// The entry of a cluster of data at `host` that belongs to this image alone.
    pub fn data_entry(&self, host: u64) -> Entry {
        Entry { word: host | COPIED, bitmap: if self.extended_l2 { ALL_ALLOCATED } else { 0 } }
    }

    /// The entry of a cluster that reads as zeros; `word` has its place, or is 0. Version 3.
    pub fn zero_entry(&self, word: u64) -> Entry {
        match self.extended_l2 {
            true => Entry { word, bitmap: ALL_ZEROS },
            false => Entry::standard(word | ZERO),
        }
    }

    /// Bytes of a metadata slice: [`SLICE`], or the cluster where that is smaller.
    pub fn slice(&self) -> u64 {
        SLICE.min(self.cluster())
    }

    /// The table that an L1 or refcount-table entry points to; `None` if there is none.
    ///
    /// # Errors
    /// Why the entry makes no sense.
    pub fn table(&self, entry: u64) -> Result<Option<u64>, &'static str> {
        let at = entry & OFFSET;
        if entry & !(OFFSET | COPIED) != 0 {
            return Err("reserved bits are set");
        }
        if !self.aligned(at) {
            return Err("the offset is not the start of a cluster");
        }
        Ok((at != 0).then_some(at))
    }

    /// The entry at an index of an L2 table's bytes.
    pub fn entry(&self, table: &[u8], index: usize) -> Entry {
        match self.extended_l2 {
            true => Entry { word: be64(table, 16 * index), bitmap: be64(table, 16 * index + 8) },
            false => Entry::standard(be64(table, 8 * index)),
        }
    }

    /// The bytes of entries of an L2 table.
    pub fn entry_table(&self, entries: &[Entry]) -> Vec<u8> {
        let words = |e: &Entry| [e.word.to_be_bytes(), e.bitmap.to_be_bytes()];
        match self.extended_l2 {
            true => entries.iter().flat_map(words).flatten().collect(),
            false => entries.iter().flat_map(|e| e.word.to_be_bytes()).collect(),
        }
    }

    /// The place that an L2 entry gives its guest cluster.
    ///
    /// # Errors
    /// Why the entry makes no sense.
    pub fn place(&self, entry: Entry) -> Result<Place, &'static str> {
        let word = entry.word;
        if word & COMPRESSED != 0 {
            let x = 62 - (self.cluster_bits - 8);
            let at = word & ((1 << x) - 1);
            let sectors = ((word & !(COPIED | COMPRESSED)) >> x) + 1;
            if at >= MAX_HOST {
                return Err("the compressed data lie beyond 2^56");
            }
            if self.data_file {
                return Err("a compressed cluster in an image with an external data file");
            }
            return Ok(Place::Compressed { at, len: sectors * 512 - (at & 511) });
        }
        let host = word & OFFSET;
        if word & !(OFFSET | COPIED | ZERO) != 0 || (self.extended_l2 && word & ZERO != 0) {
            return Err("reserved bits are set");
        }
        if !self.aligned(host) {
            return Err("the offset is not the start of a cluster");
        }
        if entry.bitmap & (entry.bitmap >> 32) != 0 {
            return Err("a subcluster is both allocated and zeros");
        }
        match host {
            // Only in a data file can a guest cluster lie at 0; the flag tells it from none.
            0 if self.data_file && word & COPIED != 0 => Ok(Place::Cluster { host, owned: true }),
            0 if entry.bitmap & ALL_ALLOCATED != 0 => Err("a subcluster is allocated without a cluster"),
            0 => Ok(Place::None),
            host => Ok(Place::Cluster { host, owned: word & COPIED != 0 }),
        }
    }

    /// What an L2 entry says of one unit of its cluster; without extended entries there is unit 0 alone, the cluster. The
    /// offset of data is that of the unit.
    ///
    /// # Errors
    /// Why it makes no sense.
    pub fn mapping(&self, entry: Entry, unit: u64) -> Result<Mapping, &'static str> {
        let (zeros, allocated) = match self.extended_l2 {
            true => (entry.bitmap >> (32 + unit) & 1 != 0, entry.bitmap >> unit & 1 != 0),
            false => (entry.word & ZERO != 0, true),
        };
        let place = self.place(entry)?;
        if zeros && self.version < 3 && !matches!(place, Place::Compressed { .. }) {
            return Err("a zero cluster in a version 2 image");
        }
        Ok(match place {
            Place::Compressed { at, len } => Mapping::Compressed { at, len },
            Place::None if zeros => Mapping::Zero,
            Place::None => Mapping::Unallocated,
            Place::Cluster { host, owned } => {
                let host = host + (unit << self.unit_bits());
                match zeros {
                    true => Mapping::ZeroAllocated { host, owned },
                    false if allocated => Mapping::Data { host, owned },
                    false => Mapping::Unallocated,
                }
            }
        })
    }

    /// The refcount at an index of a run of packed refcounts (big-endian; below a byte, low bits first).
    pub fn refcount(&self, bytes: &[u8], index: usize) -> u64 {
        match self.refcount_order {
            order @ 0..=2 => {
                let width = 1usize << order;
                let bit = index * width;
                u64::from(bytes[bit / 8] >> (bit % 8)) & ((1 << width) - 1)
            }
            order => {
                let width = 1usize << (order - 3);
                bytes[index * width..][..width].iter().fold(0, |n, b| n << 8 | u64::from(*b))
            }
        }
    }

    /// Sets the refcount at an index; the value must fit ([`Geometry::max_refcount`]).
    pub fn set_refcount(&self, bytes: &mut [u8], index: usize, value: u64) {
        debug_assert!(value <= self.max_refcount());
        match self.refcount_order {
            order @ 0..=2 => {
                let width = 1usize << order;
                let bit = index * width;
                let mask = (((1u32 << width) - 1) << (bit % 8)) as u8;
                let byte = &mut bytes[bit / 8];
                *byte = *byte & !mask | (value << (bit % 8)) as u8 & mask;
            }
            order => {
                let width = 1usize << (order - 3);
                bytes[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        }
    }

    /// The bytes of a run of packed refcounts that hold `count` of them from `index` on: start and end.
    pub fn refcount_bytes(&self, index: u64, count: u64) -> (u64, u64) {
        let start = (index << self.refcount_order) / 8;
        let end = ((index + count) << self.refcount_order).div_ceil(8);
        (start, end)
    }
}

/// The big-endian word at an offset, or 0 past the end: for fields whose presence has been checked.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// As [`be64`], 32 bits.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// As [`be64`], 16 bits.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(version: u32, cluster_bits: u32, refcount_order: u32) -> Geometry {
        Geometry { version, cluster_bits, refcount_order, extended_l2: false, data_file: false }
    }

    #[test]
    fn refcounts_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let g = geometry(3, 16, order);
            let mut bytes = vec![0u8; 256];
            let count = (256 * 8) >> order;
            let value = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & g.max_refcount();
            for i in (0..count).rev() {
                g.set_refcount(&mut bytes, i, value(i));
            }
            for i in 0..count {
                assert_eq!(g.refcount(&bytes, i), value(i), "order {order}, index {i}");
            }
            g.set_refcount(&mut bytes, 5, 0);
            assert_eq!((g.refcount(&bytes, 4), g.refcount(&bytes, 5)), (value(4), 0));
            assert_eq!(g.refcount(&bytes, 6), value(6));
        }
    }

    #[test]
    fn narrow_refcounts_start_at_the_low_bit_and_wide_ones_are_big_endian() {
        let mut bytes = [0u8; 8];
        geometry(3, 16, 0).set_refcount(&mut bytes, 1, 1);
        assert_eq!(bytes[0], 0b10);
        geometry(3, 16, 4).set_refcount(&mut bytes, 1, 0x0102);
        assert_eq!(bytes[2..4], [1, 2]);
        assert_eq!(geometry(3, 16, 0).refcount_bytes(9, 8), (1, 3));
        assert_eq!(geometry(3, 16, 4).refcount_bytes(9, 8), (18, 34));
    }

    #[test]
    fn a_guest_size_has_just_the_l1_entries_it_needs() {
        let g = geometry(3, 16, 4);
        assert_eq!((g.l1_entries_for(0), g.l1_entries_for(1), g.l1_entries_for(512 << 20)), (0, 1, 1));
        assert_eq!(g.l1_entries_for((512 << 20) + 1), 2);
        assert_eq!(geometry(3, 9, 4).l1_entries_for(32768 * 3), 3);
        assert_eq!(geometry(3, 9, 4).l1_entries_for(u64::MAX), 1 << 49);
    }

    fn map(g: &Geometry, word: u64) -> Result<Mapping, &'static str> {
        g.mapping(Entry::standard(word), 0)
    }

    #[test]
    fn extended_entries_say_what_each_subcluster_is() {
        let g = Geometry { extended_l2: true, ..geometry(3, 16, 4) };
        assert_eq!((g.l2_bits(), g.unit_bits(), g.units(), g.entry_bytes()), (12, 11, 32, 16));
        let entry = |word, bitmap| Entry { word, bitmap };
        let kept = entry(COPIED | 0x50000, 1 << 3 | 1 << (32 + 4));
        assert_eq!(g.mapping(kept, 3), Ok(Mapping::Data { host: 0x51800, owned: true }));
        assert_eq!(g.mapping(kept, 4), Ok(Mapping::ZeroAllocated { host: 0x52000, owned: true }));
        assert_eq!(g.mapping(kept, 5), Ok(Mapping::Unallocated));
        assert_eq!(g.mapping(entry(0, 1 << 63), 31), Ok(Mapping::Zero));
        assert_eq!(g.mapping(entry(0, 1 << 63), 30), Ok(Mapping::Unallocated));
        assert_eq!(g.place(kept), Ok(Place::Cluster { host: 0x50000, owned: true }));
        // Bit 0 of the word is reserved, and a bitmap can contradict itself.
        assert!(g.place(entry(1, 0)).is_err() && g.place(entry(0, 1)).is_err());
        assert!(g.place(entry(0x50000, 1 | 1 << 32)).is_err());
    }

    #[test]
    fn in_a_data_file_a_cluster_may_lie_at_0() {
        let g = Geometry { data_file: true, ..geometry(3, 16, 4) };
        assert_eq!(map(&g, COPIED), Ok(Mapping::Data { host: 0, owned: true }));
        assert_eq!(map(&g, 0), Ok(Mapping::Unallocated));
        assert_eq!(map(&g, COPIED | ZERO), Ok(Mapping::ZeroAllocated { host: 0, owned: true }));
        assert!(map(&g, COMPRESSED | 0x50000).is_err());
    }

    #[test]
    fn l2_entries_are_read_as_the_specification_says() {
        let g = geometry(3, 16, 4);
        assert_eq!(map(&g, 0), Ok(Mapping::Unallocated));
        assert_eq!(map(&g, 1), Ok(Mapping::Zero));
        assert_eq!(map(&g, COPIED | 0x50001), Ok(Mapping::ZeroAllocated { host: 0x50000, owned: true }));
        assert_eq!(map(&g, 0x50000), Ok(Mapping::Data { host: 0x50000, owned: false }));
        // cluster_bits 16: the offset has 54 bits, the sector count 8.
        let entry = COMPRESSED | 3 << 54 | 0x50123;
        assert_eq!(map(&g, entry), Ok(Mapping::Compressed { at: 0x50123, len: 4 * 512 - 0x123 }));
    }

    #[test]
    fn entries_that_make_no_sense_are_refused() {
        let g = geometry(3, 16, 4);
        assert!(map(&g, 0x8200).is_err() && map(&g, 2).is_err() && map(&g, 1 << 56).is_err());
        assert!(g.table(0x8000).is_err() && g.table(0x10001).is_err() && g.table(COMPRESSED).is_err());
        assert!(map(&geometry(2, 16, 4), 1).is_err());
        assert_eq!(g.table(COPIED | 0x10000), Ok(Some(0x10000)));
        // Whatever the bits, the answer is a value.
        for bits in 9..=21 {
            let g = geometry(3, bits, 4);
            for shift in 0..64 {
                let _ = (map(&g, u64::MAX >> shift), map(&g, u64::MAX << shift), g.table(u64::MAX << shift));
                if let Ok(Mapping::Compressed { len, .. }) = map(&g, COMPRESSED | u64::MAX >> shift) {
                    assert!(len <= 2 * g.cluster());
                }
            }
        }
    }
}
