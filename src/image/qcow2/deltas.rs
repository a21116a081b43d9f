//! Changes of refcounts that are still to come, kept by refcount block: dense, because a snapshot changes most of them.

use std::collections::BTreeMap;

use super::layout::Geometry;

/// How many references each cluster of the file gains or loses. One byte a cluster, and more for the few that need it.
pub(super) struct Deltas {
    block_bits: u32,
    blocks: BTreeMap<u64, Box<[i8]>>,
    /// What does not fit in a byte, by cluster.
    rest: BTreeMap<u64, i64>,
}

impl Deltas {
    /// No changes.
    pub fn new(g: &Geometry) -> Deltas {
        Deltas { block_bits: g.block_bits(), blocks: BTreeMap::new(), rest: BTreeMap::new() }
    }

    /// Adds to the change of `count` clusters from `first` on.
    pub fn add(&mut self, first: u64, count: u64, by: i64) {
        for cluster in first..first + count {
            let len = 1usize << self.block_bits;
            let block = self.blocks.entry(cluster >> self.block_bits);
            let slot =
                &mut block.or_insert_with(|| vec![0; len].into_boxed_slice())[cluster as usize & (len - 1)];
            let sum = i64::from(*slot) + by;
            *slot = i8::try_from(sum).unwrap_or_else(|_| {
                *self.rest.entry(cluster).or_default() += sum;
                0
            });
        }
    }

    /// The change of a cluster.
    pub fn of(&self, cluster: u64) -> i64 {
        let index = cluster as usize & ((1 << self.block_bits) - 1);
        let here = self.blocks.get(&(cluster >> self.block_bits)).map_or(0, |b| i64::from(b[index]));
        here + self.rest.get(&cluster).copied().unwrap_or(0)
    }

    /// The refcount blocks, by number, in which something changes.
    pub fn blocks(&self) -> Vec<u64> {
        let changes = |block: u64, slots: &[i8]| {
            let first = block << self.block_bits;
            slots.iter().any(|d| *d != 0)
                || self.rest.range(first..first + slots.len() as u64).next().is_some()
        };
        self.blocks.iter().filter(|(block, slots)| changes(**block, slots)).map(|(block, _)| *block).collect()
    }

    /// The changes in a block: index in it, and how much.
    pub fn in_block(&self, block: u64) -> impl Iterator<Item = (usize, i64)> + '_ {
        let first = block << self.block_bits;
        let slots: &[i8] = self.blocks.get(&block).map_or(&[], |slots| slots);
        let change = move |(i, here): (usize, &i8)| {
            let rest = match self.rest.is_empty() {
                true => 0,
                false => self.rest.get(&(first + i as u64)).copied().unwrap_or(0),
            };
            (i, i64::from(*here) + rest)
        };
        slots.iter().enumerate().map(change).filter(|(_, by)| *by != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_add_up_however_large() {
        let g =
            Geometry { version: 3, cluster_bits: 9, refcount_order: 4, extended_l2: false, data_file: false };
        let mut d = Deltas::new(&g);
        d.add(5, 3, 1);
        d.add(6, 1, -1);
        for _ in 0..1000 {
            d.add(300, 1, 1);
        }
        d.add(301, 1, -1);
        d.add(301, 1, 1);
        assert_eq!((d.of(5), d.of(6), d.of(7), d.of(8), d.of(300)), (1, 0, 1, 0, 1000));
        assert_eq!(d.blocks(), [0, 1]);
        assert_eq!(d.in_block(0).collect::<Vec<_>>(), [(5, 1), (7, 1)]);
        assert_eq!(d.in_block(1).collect::<Vec<_>>(), [(300 - 256, 1000)]);
    }
}
