//! Reading a command descriptor block: fields by their place, and the address and length that the block commands share.
//!
//! A [`Cdb`] has as many bytes as its row in [`super::opcodes`] says; the target checks that once, so nothing here can run
//! past the end.

use crate::units::{Blocks, Lba};

/// OPERATION CODE of the commands of variable length; which one it is stands in SERVICE ACTION, bytes 8 and 9.
pub(super) const VARIABLE_LENGTH: u8 = 0x7f;

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

    /// A command of 16 bytes, as it is.
    pub fn whole(bytes: &'a [u8; 16]) -> Cdb<'a> {
        Cdb(bytes)
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

    /// Whether it is of variable length (operation code 7Fh): its fields begin 8 bytes later.
    pub fn is_variable(self) -> bool {
        self.0[0] == VARIABLE_LENGTH
    }

    /// Where the CONTROL byte stands: at the end of CDBs of 6 to 16 bytes, second in those of variable length (SAM-5 5.2).
    pub fn control_at(self) -> usize {
        if self.is_variable() { 1 } else { self.0.len() - 1 }
    }

    /// NACA of the CONTROL byte.
    pub fn naca(self) -> bool {
        self.0[self.control_at()] & 0x04 != 0
    }

    /// Where the byte of flags stands: the protection field, DPO, FUA, BYTCHK and their like.
    pub fn flags_at(self) -> u16 {
        if self.is_variable() { 10 } else { 1 }
    }

    /// A bit of the byte of flags.
    pub fn flag(self, bit: u8) -> bool {
        self.bit(usize::from(self.flags_at()), bit)
    }

    /// RDPROTECT, WRPROTECT, VRPROTECT or ORPROTECT; 6-byte commands have none.
    pub fn protection_field(self) -> u8 {
        if self.0.len() == 6 { 0 } else { self.0[usize::from(self.flags_at())] >> 5 }
    }

    /// EXPECTED INITIAL LOGICAL BLOCK REFERENCE TAG, EXPECTED LOGICAL BLOCK APPLICATION TAG and LOGICAL BLOCK APPLICATION TAG
    /// MASK of the 32-byte commands.
    pub fn expected_tags(self) -> Option<(u32, u16, u16)> {
        self.is_variable().then(|| (self.u32(20), self.u16(24), self.u16(26)))
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
            32 => Range { lba: Lba(self.u64(12)), blocks: Blocks(u64::from(self.u32(28))), length_at: 28 },
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
    fn thirty_two_bytes_keep_flags_tags_and_lengths_in_their_own_places() {
        let mut bytes: Vec<u8> = (0..32).collect();
        (bytes[0], bytes[1], bytes[7], bytes[10]) = (0x7f, 0x04, 0x18, 0x68);
        let c = Cdb::new(&bytes, 32).unwrap();
        assert_eq!(range(&bytes), (0x0c0d_0e0f_1011_1213, 0x1c1d_1e1f));
        assert_eq!(c.expected_tags(), Some((0x1415_1617, 0x1819, 0x1a1b)));
        assert!(c.naca() && c.flag(3) && !c.flag(4));
        assert_eq!((c.protection_field(), c.flags_at()), (3, 10));
        let ten = [0x28, 0xa8, 0, 0, 0, 0, 0, 0, 0, 4];
        let c = Cdb::new(&ten, 10).unwrap();
        assert!(c.naca() && c.flag(3) && c.expected_tags().is_none());
        assert_eq!((c.protection_field(), c.flags_at()), (5, 1));
    }

    #[test]
    fn a_cdb_that_is_too_short_is_not_a_cdb() {
        assert!(Cdb::new(&[0x28; 9], 10).is_none());
        assert_eq!(Cdb::new(&[0x28; 16], 10).unwrap().bytes().len(), 10);
    }
}
