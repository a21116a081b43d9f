//! Tuples as an initiator makes them: a guard by a table of 256, and the tags that a type wants. Independent of `pi/`.

/// Bytes of a tuple.
pub const LEN: usize = 8;

/// CRC-16/T10-DIF of each byte (polynomial 8BB7h).
const TABLE: [u16; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = (i as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { crc << 1 ^ 0x8bb7 } else { crc << 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

/// The LOGICAL BLOCK GUARD of a block.
pub fn guard(block: &[u8]) -> u16 {
    block.iter().fold(0, |crc, byte| crc << 8 ^ TABLE[usize::from((crc >> 8) as u8 ^ byte)])
}

/// The three tags of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    pub guard: u16,
    pub app: u16,
    pub reference: u32,
}

impl Tuple {
    /// The right tuple of a block at `lba`, with an application tag of the caller's.
    pub fn of(block: &[u8], lba: u64, app: u16) -> Tuple {
        Tuple { guard: guard(block), app, reference: lba as u32 }
    }

    pub fn bytes(self) -> [u8; LEN] {
        let (g, a, r) = (self.guard.to_be_bytes(), self.app.to_be_bytes(), self.reference.to_be_bytes());
        [g[0], g[1], a[0], a[1], r[0], r[1], r[2], r[3]]
    }

    /// From the first eight bytes; nothing if there are fewer.
    pub fn parse(b: &[u8]) -> Option<Tuple> {
        let b: [u8; LEN] = b.get(..LEN)?.try_into().ok()?;
        Some(Tuple {
            guard: u16::from_be_bytes([b[0], b[1]]),
            app: u16::from_be_bytes([b[2], b[3]]),
            reference: u32::from_be_bytes([b[4], b[5], b[6], b[7]]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guard_is_crc_16_t10_dif() {
        assert_eq!(guard(b"123456789"), 0xd0db);
        assert_eq!(guard(&[0; 512]), 0);
        let crc = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF);
        let block: Vec<u8> = (0..4096u32).map(|i| ((i * i) >> 3) as u8).collect();
        assert_eq!(guard(&block), crc.checksum(&block));
    }

    #[test]
    fn a_tuple_is_big_endian() {
        let tuple = Tuple { guard: 0x0102, app: 0x0304, reference: 0x0506_0708 };
        assert_eq!(tuple.bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Tuple::parse(&tuple.bytes()), Some(tuple));
        assert_eq!(Tuple::parse(&[0; 7]), None);
    }
}
