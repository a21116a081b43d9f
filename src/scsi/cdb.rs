//! Reading a command descriptor block: fields by their place, and the address and length that the block commands share.
//!
//! A [`Cdb`] has as many bytes as its row in [`super::opcodes`] says; the target checks that once, so nothing here can run
//! past the end.

use crate::units::{Blocks, Lba};

/// A command descriptor block that is as long as its operation code demands.
#[derive(Clone, Copy)]
pub(super) struct Cdb<'a>(&'a [u8]);

/// What the block commands have in common (SBC-4 table 13 and its like): where, and how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    /// First block.
    pub lba: Lba,
    /// Blocks, as the field says; what 0 means depends on the command.
    pub blocks: Blocks,
    /// Byte of the CDB at which the length field starts, for the field pointer.
    pub length_at: u16,
}

impl<'a> Cdb<'a> {
    /// `bytes` cut to the length of the command; `None` if they are too few.
    pub fn new(bytes: &'a [u8], len: u8) -> Option<Cdb<'a>> {
        bytes.get(..usize::from(len)).map(Cdb)
    }

    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    pub fn u8(self, at: usize) -> u8 {
        self.0[at]
    }

    pub fn bit(self, at: usize, bit: u8) -> bool {
        self.0[at] & (1 << bit) != 0
    }

    pub fn u16(self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    pub fn u32(self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    pub fn u64(self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    /// NACA of the CONTROL byte, which ends every CDB of 6 to 16 bytes (SAM-5 5.2).
    pub fn naca(self) -> bool {
        self.0.last().is_some_and(|control| control & 0x04 != 0)
    }

    /// LOGICAL BLOCK ADDRESS and TRANSFER LENGTH where READ, WRITE, VERIFY and their kin keep them, by CDB size.
    /// In 6-byte commands a length of 0 is 256 blocks.
    pub fn range(self) -> Range {
        match self.0.len() {
            6 => Range {
                lba: Lba(u64::from(self.u32(0) & 0x1f_ffff)),
                blocks: Blocks(match self.u8(4) {
                    0 => 256,
                    n => u64::from(n),
                }),
                length_at: 4,
            },
            10 => Range {
                lba: Lba(u64::from(self.u32(2))),
                blocks: Blocks(u64::from(self.u16(7))),
                length_at: 7,
            },
            12 => Range {
                lba: Lba(u64::from(self.u32(2))),
                blocks: Blocks(u64::from(self.u32(6))),
                length_at: 6,
            },
            _ => Range { lba: Lba(self.u64(2)), blocks: Blocks(u64::from(self.u32(10))), length_at: 10 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(bytes: &[u8]) -> (u64, u64) {
        let r = Cdb::new(bytes, bytes.len() as u8).unwrap().range();
        (r.lba.0, r.blocks.0)
    }

    #[test]
    fn every_size_of_cdb_keeps_its_address_and_length_where_sbc_says() {
        assert_eq!(range(&[0x08, 0xff, 0x02, 0x03, 0x00, 0]), (0x1f0203, 256));
        assert_eq!(range(&[0x28, 0, 1, 2, 3, 4, 0, 5, 6, 0]), (0x01020304, 0x0506));
        assert_eq!(range(&[0xa8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]), (0x01020304, 0x05060708));
        assert_eq!(
            range(&[0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0]),
            (0x0102030405060708, 0x090a0b0c)
        );
    }

    #[test]
    fn a_cdb_that_is_too_short_is_not_a_cdb() {
        assert!(Cdb::new(&[0x28; 9], 10).is_none());
        assert_eq!(Cdb::new(&[0x28; 16], 10).unwrap().bytes().len(), 10);
    }
}
