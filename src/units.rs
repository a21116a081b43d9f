//! The units of a disk as types: a block address is never mistaken for a byte offset.
//!
//! Arithmetic that could overflow is checked: bad input from an initiator or an image ends as `None`, and the caller
//! turns that into the error of its own room.

use std::fmt;

/// A logical block address (SBC-4 4.5): counts blocks of the LUN's block size from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lba(pub u64);

/// A number of logical blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Blocks(pub u64);

/// An offset in bytes from the start of a volume (never of the file that holds it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteOffset(pub u64);

/// Parses a number of bytes as people write it: plain, or with K, M, G, T, P, E (powers of 1024), as qemu-img has it.
///
/// # Errors
/// In words, what a size is.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let shift = match unit.to_ascii_uppercase().trim_end_matches("IB") {
        "" | "B" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        "T" => Some(40),
        "P" => Some(50),
        "E" => Some(60),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok();
    let bytes = number.zip(shift).and_then(|(n, s)| n.checked_mul(1 << s));
    bytes.filter(|b| *b > 0 && i64::try_from(*b).is_ok()).ok_or_else(|| {
        "a size is a number of bytes above 0, or one with K, M, G, T or P, as in 10G".to_owned()
    })
}

/// The size of a logical block in bytes: 512 or 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize(u16);

impl BlockSize {
    /// 512 bytes.
    pub const B512: BlockSize = BlockSize(512);
    /// 4096 bytes.
    pub const B4096: BlockSize = BlockSize(4096);

    /// The block size of that many bytes, if it is one that a LUN can have.
    pub fn new(bytes: u64) -> Option<BlockSize> {
        match bytes {
            512 => Some(BlockSize::B512),
            4096 => Some(BlockSize::B4096),
            _ => None,
        }
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// log2 of the size: 9 or 12.
    pub fn shift(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// The block that holds a byte.
    pub fn lba_of(self, at: ByteOffset) -> Lba {
        Lba(at.0 >> self.shift())
    }

    /// Whether a byte offset is the start of a block.
    pub fn is_aligned(self, at: ByteOffset) -> bool {
        at.0 & (self.bytes() - 1) == 0
    }

    /// How many whole blocks a number of bytes makes; what is left over is not counted.
    pub fn blocks_in(self, bytes: u64) -> Blocks {
        Blocks(bytes >> self.shift())
    }
}

impl Lba {
    /// The byte at which the block starts, unless that is beyond 2^64.
    pub fn to_bytes(self, size: BlockSize) -> Option<ByteOffset> {
        self.0.checked_mul(size.bytes()).map(ByteOffset)
    }

    /// The address `n` blocks on.
    pub fn checked_add(self, n: Blocks) -> Option<Lba> {
        self.0.checked_add(n.0).map(Lba)
    }
}

impl Blocks {
    /// The length in bytes, unless that is beyond 2^64.
    pub fn to_bytes(self, size: BlockSize) -> Option<u64> {
        self.0.checked_mul(size.bytes())
    }
}

impl ByteOffset {
    /// The offset `n` bytes on.
    pub fn checked_add(self, n: u64) -> Option<ByteOffset> {
        self.0.checked_add(n).map(ByteOffset)
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_beyond_two_to_the_64_bytes_has_no_offset() {
        assert_eq!(Lba(u64::MAX).to_bytes(BlockSize::B512), None);
        assert_eq!(Lba(8).to_bytes(BlockSize::B4096), Some(ByteOffset(32768)));
        assert_eq!(Lba(u64::MAX).checked_add(Blocks(1)), None);
    }

    #[test]
    fn only_512_and_4096_are_block_sizes() {
        for n in [0, 1, 511, 520, 1024, 2048, 8192, 512 + (1 << 16)] {
            assert_eq!(BlockSize::new(n), None, "{n}");
        }
        assert_eq!(BlockSize::new(512).map(BlockSize::shift), Some(9));
        assert_eq!(BlockSize::new(4096).map(BlockSize::shift), Some(12));
    }
}
