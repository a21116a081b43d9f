//! The numbers that a volume is described by.

use crate::units::ByteOffset;

/// What a volume is and can do. Asked anew by whoever caches it after a resize.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that can be addressed.
    pub capacity: u64,
    /// Offsets and lengths must be multiples of this (bytes, a power of two).
    pub alignment: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Bytes that the volume frees at once (a qcow2 cluster, a file system block); a hint, 0 if it frees nothing.
    pub discard_granularity: u32,
    /// Bytes of the unit in which I/O is cheapest; a hint, 0 if there is none.
    pub preferred_io: u32,
    /// Most bytes of a write with [`WriteFlags::atomic`](super::WriteFlags::atomic); 0 if there is no such write.
    pub atomic_write: u32,
    /// Offset and length of such a write must be multiples of this (bytes, a power of two, a page at most), or it lies within one such unit.
    pub atomic_unit: u32,
    /// [`Volume::free_bytes`] knows an answer.
    pub tells_free: bool,
}

impl Limits {
    /// Whether a write of these bytes may have [`WriteFlags::atomic`](super::WriteFlags::atomic): whole units, or a part of one.
    pub fn keeps_whole(&self, at: ByteOffset, len: u64) -> bool {
        let unit = u64::from(self.atomic_unit.max(1));
        let units = at.0.is_multiple_of(unit) && len.is_multiple_of(unit);
        len <= u64::from(self.atomic_write) && (units || at.0 % unit + len <= unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_units_or_a_part_of_one_are_kept_whole() {
        let limits = |atomic_write, atomic_unit| Limits {
            capacity: 1 << 20,
            alignment: 1,
            read_only: false,
            discard_granularity: 0,
            preferred_io: 0,
            atomic_write,
            atomic_unit,
            tells_free: false,
        };
        let whole = |most, unit, at, len| limits(most, unit).keeps_whole(ByteOffset(at), len);
        assert!(
            whole(4096, 4096, 8192, 4096) && whole(4096, 4096, 8704, 512) && whole(4096, 4096, 512, 3584)
        );
        assert!(
            !whole(4096, 4096, 512, 4096) && !whole(4096, 4096, 0, 8192) && !whole(4096, 4096, 3584, 1024)
        );
        assert!(whole(1 << 20, 1, 511, 1 << 20) && !whole(1 << 20, 1, 0, (1 << 20) + 1));
        assert!(!whole(0, 0, 0, 512));
    }
}
