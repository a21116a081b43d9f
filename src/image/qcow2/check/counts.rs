//! Numbers for the clusters of a file that may be huge and sparse: memory goes by the clusters that have one, in small chunks,
//! and is bounded.

use std::io;

use super::MOST_MEMORY;
use crate::storage::cache::OffsetMap;

/// Clusters of a chunk of counts: 1 KiB.
const COUNTS: u64 = 512;
/// Clusters of a chunk of flags: 512 bytes.
const FLAGS: u64 = 4096;
/// What a chunk costs beside its content.
const OVERHEAD: u64 = 32;

fn too_much() -> io::Error {
    io::Error::other("the image has too many clusters to be checked in 1 GiB of memory")
}

/// References to each cluster.
#[derive(Default)]
pub struct Counts {
    chunks: OffsetMap<Box<[u16; COUNTS as usize]>>,
    /// Counts that do not fit in 16 bits.
    large: OffsetMap<u64>,
}

impl Counts {
    /// The references to a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        match self.chunks.get(&(cluster / COUNTS)).map(|c| c[(cluster % COUNTS) as usize]) {
            None => 0,
            Some(u16::MAX) => self.large.get(&cluster).copied().unwrap_or(u16::MAX.into()),
            Some(n) => n.into(),
        }
    }

    /// Sets the references to a cluster.
    ///
    /// # Errors
    /// If that needs more memory than there may be.
    pub fn set(&mut self, cluster: u64, count: u64) -> io::Result<()> {
        let full = (self.chunks.len() as u64 + 1) * (COUNTS * 2 + OVERHEAD) > MOST_MEMORY;
        let index = cluster / COUNTS;
        if full && !self.chunks.contains_key(&index) {
            return Err(too_much());
        }
        let chunk = self.chunks.entry(index).or_insert_with(|| Box::new([0; COUNTS as usize]));
        let small = u16::try_from(count).unwrap_or(u16::MAX);
        chunk[(cluster % COUNTS) as usize] = small;
        if small == u16::MAX {
            self.large.insert(cluster, count);
        }
        Ok(())
    }

    /// The last cluster that has references.
    pub fn last(&self) -> Option<u64> {
        let mut indices: Vec<u64> = self.chunks.keys().copied().collect();
        indices.sort_unstable_by(|a, b| b.cmp(a));
        indices.into_iter().find_map(|index| {
            let within = self.chunks.get(&index)?.iter().rposition(|n| *n != 0)?;
            Some(index * COUNTS + within as u64)
        })
    }

    /// The blocks of 2^bits clusters in which a cluster has references, in order.
    pub fn blocks(&self, bits: u32) -> Vec<u64> {
        let mut found: Vec<u64> = Vec::new();
        for (index, chunk) in &self.chunks {
            let first = index * COUNTS;
            found.extend((0..COUNTS).filter(|i| chunk[*i as usize] != 0).map(|i| (first + i) >> bits));
            found.dedup();
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// A flag for each cluster.
#[derive(Default)]
pub struct Flags(OffsetMap<Box<[u64; FLAGS as usize / 64]>>);

impl Flags {
    /// Whether it is set.
    pub fn get(&self, cluster: u64) -> bool {
        let within = cluster % FLAGS;
        self.0.get(&(cluster / FLAGS)).is_some_and(|c| c[within as usize / 64] >> (within % 64) & 1 == 1)
    }

    /// Sets it.
    ///
    /// # Errors
    /// If that needs more memory than there may be.
    pub fn set(&mut self, cluster: u64) -> io::Result<()> {
        if self.0.len() as u64 * (FLAGS / 8 + OVERHEAD) > MOST_MEMORY / 8 {
            return Err(too_much());
        }
        let within = cluster % FLAGS;
        let chunk = self.0.entry(cluster / FLAGS).or_insert_with(|| Box::new([0; FLAGS as usize / 64]));
        chunk[within as usize / 64] |= 1 << (within % 64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_size_are_kept_and_cost_memory_only_where_they_are() {
        let mut counts = Counts::default();
        for (cluster, n) in [(0, 1), (511, 65534), (512, 65535), (513, 65536), (1 << 54, u64::MAX)] {
            counts.set(cluster, n).unwrap();
            assert_eq!(counts.get(cluster), n);
        }
        assert_eq!((counts.get(1), counts.get(1 << 50), counts.last()), (0, 0, Some(1 << 54)));
        assert_eq!(counts.chunks.len(), 3);
        counts.set(513, 2).unwrap();
        assert_eq!(counts.get(513), 2);
        assert_eq!(counts.blocks(9), [0, 1, 1 << 45]);
        let mut flags = Flags::default();
        flags.set(1 << 54).unwrap();
        assert!(flags.get(1 << 54) && !flags.get((1 << 54) + 1) && !flags.get(0));
    }
}
