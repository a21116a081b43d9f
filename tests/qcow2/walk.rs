//! A qcow2 checker of its own, written from the specification alone: every reference is counted and compared with the refcounts.

use std::collections::HashMap;

fn be(bytes: &[u8], at: u64, n: usize) -> Result<u64, String> {
    let at = at as usize;
    let word = bytes.get(at..at + n).ok_or_else(|| format!("{at:#x} lies beyond the end"))?;
    Ok(word.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
}

struct Walk<'a> {
    bytes: &'a [u8],
    version: u64,
    bits: u64,
    order: u64,
    extended: bool,
    /// The guest's clusters lie elsewhere.
    external: bool,
    references: HashMap<u64, u64>,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Walks an image; gives the number of leaked clusters.
pub fn walk(bytes: &[u8]) -> Result<u64, String> {
    let version = be(bytes, 4, 4)?;
    let order = if version == 2 { 4 } else { be(bytes, 96, 4)? };
    let extended = version > 2 && be(bytes, 72, 8)? & 16 != 0;
    let external = version > 2 && be(bytes, 72, 8)? & 4 != 0;
    let bits = be(bytes, 20, 4)?;
    let mut w = Walk { bytes, version, bits, order, extended, external, references: HashMap::new() };
    if be(bytes, 0, 4)? != 0x5146_49fb {
        return Err("no magic".into());
    }
    w.refer(0, 1);
    let (l1_entries, l1) = (be(bytes, 36, 4)?, be(bytes, 40, 8)?);
    w.refer(l1, l1_entries * 8);
    let (table, table_clusters) = (be(bytes, 48, 8)?, be(bytes, 56, 4)?);
    w.refer(table, table_clusters << w.bits);
    for i in 0..table_clusters << w.bits >> 3 {
        let block = be(bytes, table + i * 8, 8)?;
        if block != 0 {
            w.refer(block, 1);
        }
    }
    let mut at = be(bytes, 64, 8)?;
    let start = at;
    let mut tables = vec![(l1, l1_entries, true)];
    for _ in 0..be(bytes, 60, 4)? {
        tables.push((be(bytes, at, 8)?, be(bytes, at + 8, 4)?, false));
        w.refer(be(bytes, at, 8)?, be(bytes, at + 8, 4)? * 8);
        let len = 40 + be(bytes, at + 36, 4)? + be(bytes, at + 12, 2)? + be(bytes, at + 14, 2)?;
        at += len.next_multiple_of(8);
    }
    if at > start {
        w.refer(start, at - start);
    }
    for (at, entries, _) in &tables {
        w.count(*at, *entries)?;
    }
    for (at, entries, active) in &tables {
        if *active {
            w.check_copied(*at, *entries, table)?;
        }
    }
    w.compare(table, table_clusters)
}

impl Walk<'_> {
    fn refer(&mut self, at: u64, len: u64) {
        if len > 0 {
            for cluster in at >> self.bits..=(at + len - 1) >> self.bits {
                *self.references.entry(cluster).or_default() += 1;
            }
        }
    }

    fn entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    fn entries(&self) -> u64 {
        (1 << self.bits) / self.entry_bytes()
    }

    fn count(&mut self, l1: u64, l1_entries: u64) -> Result<(), String> {
        for i in 0..l1_entries {
            let l2 = be(self.bytes, l1 + i * 8, 8)? & OFFSET;
            if l2 == 0 {
                continue;
            }
            self.refer(l2, 1);
            for j in 0..self.entries() {
                let entry = be(self.bytes, l2 + j * self.entry_bytes(), 8)?;
                if entry >> 62 & 1 == 1 {
                    let x = 62 - (self.bits - 8);
                    let at = entry & ((1 << x) - 1);
                    let sectors = (entry & !(3 << 62)) >> x;
                    self.refer(at, (sectors + 1) * 512 - at % 512);
                    continue;
                }
                let allowed = OFFSET | 1 << 63 | u64::from(self.version > 2 && !self.extended);
                if entry & !allowed != 0 || entry & OFFSET & ((1 << self.bits) - 1) != 0 {
                    return Err(format!("L2 entry {entry:#x} at {:#x}", l2 + j * self.entry_bytes()));
                }
                if self.extended {
                    let bitmap = be(self.bytes, l2 + j * 16 + 8, 8)?;
                    let (zeros, allocated) = (bitmap >> 32, bitmap & 0xffff_ffff);
                    if zeros & allocated != 0
                        || (entry & OFFSET == 0 && allocated != 0 && !(self.external && entry >> 63 == 1))
                    {
                        return Err(format!("L2 entry {entry:#x} with bitmap {bitmap:#x}"));
                    }
                }
                if entry & OFFSET != 0 && !self.external {
                    if entry & OFFSET >= self.bytes.len() as u64 {
                        return Err(format!("L2 entry {entry:#x} points beyond the end"));
                    }
                    self.refer(entry & OFFSET, 1);
                }
            }
        }
        Ok(())
    }

    fn refcount(&self, cluster: u64, table: u64, table_entries: u64) -> Result<u64, String> {
        let per_block = 1 << (self.bits + 3 - self.order);
        if cluster / per_block >= table_entries {
            return Ok(0);
        }
        let block = be(self.bytes, table + cluster / per_block * 8, 8)?;
        if block == 0 {
            return Ok(0);
        }
        let index = cluster % per_block;
        let width = 1u64 << self.order;
        if width < 8 {
            let byte = be(self.bytes, block + index * width / 8, 1)?;
            return Ok(byte >> (index * width % 8) & ((1 << width) - 1));
        }
        be(self.bytes, block + index * width / 8, width as usize / 8)
    }

    fn check_copied(&self, l1: u64, l1_entries: u64, table: u64) -> Result<(), String> {
        let table_entries = be(self.bytes, 56, 4)? << self.bits >> 3;
        let right = |entry: u64| -> Result<(), String> {
            let count = self.refcount((entry & OFFSET) >> self.bits, table, table_entries)?;
            match (entry >> 63 == 1) == (count == 1) {
                true => Ok(()),
                false => Err(format!("entry {entry:#x} refers to a cluster with refcount {count}")),
            }
        };
        for i in 0..l1_entries {
            let l1_entry = be(self.bytes, l1 + i * 8, 8)?;
            if l1_entry & OFFSET == 0 {
                continue;
            }
            right(l1_entry)?;
            for j in 0..self.entries() {
                let entry = be(self.bytes, (l1_entry & OFFSET) + j * self.entry_bytes(), 8)?;
                if entry & OFFSET != 0 && entry >> 62 & 1 == 0 && !self.external {
                    right(entry)?;
                }
            }
        }
        Ok(())
    }

    fn compare(&self, table: u64, table_clusters: u64) -> Result<u64, String> {
        let entries = table_clusters << self.bits >> 3;
        let mut leaks = 0;
        for (cluster, references) in &self.references {
            let count = self.refcount(*cluster, table, entries)?;
            if count < *references {
                let at = cluster << self.bits;
                return Err(format!(
                    "the cluster at {at:#x} has {references} references and refcount {count}"
                ));
            }
            leaks += u64::from(count > *references);
        }
        for cluster in 0..(self.bytes.len() as u64).div_ceil(1 << self.bits) {
            if !self.references.contains_key(&cluster) {
                leaks += u64::from(self.refcount(cluster, table, entries)? > 0);
            }
        }
        Ok(leaks)
    }
}
