//! The guard by tables: sixteen bytes a step, each looked up in the table of its distance from the end of the step.
//! The last resort, and a second opinion on every other kernel. Called by [`super::Guard`].

use super::weights::POLY;

/// `TABLES[k][b]`: the CRC of byte `b` followed by `k` zero bytes.
static TABLES: [[u16; 256]; 16] = tables();

const fn tables() -> [[u16; 256]; 16] {
    let mut t = [[0u16; 256]; 16];
    let mut b = 0;
    while b < 256 {
        let mut crc = (b as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { (crc << 1) ^ POLY } else { crc << 1 };
            bit += 1;
        }
        t[0][b] = crc;
        b += 1;
    }
    let mut k = 1;
    while k < 16 {
        let mut b = 0;
        while b < 256 {
            let prev = t[k - 1][b];
            t[k][b] = (prev << 8) ^ t[0][(prev >> 8) as usize];
            b += 1;
        }
        k += 1;
    }
    t
}

pub(super) fn update(mut crc: u16, bytes: &[u8]) -> u16 {
    let (steps, rest) = bytes.as_chunks::<16>();
    for step in steps {
        let [hi, lo] = crc.to_be_bytes();
        crc = TABLES[15][usize::from(step[0] ^ hi)] ^ TABLES[14][usize::from(step[1] ^ lo)];
        for (i, byte) in step.iter().enumerate().skip(2) {
            crc ^= TABLES[15 - i][usize::from(*byte)];
        }
    }
    for byte in rest {
        crc = (crc << 8) ^ TABLES[0][usize::from((crc >> 8) as u8 ^ byte)];
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_check_value_and_every_length() {
        assert_eq!(update(0, b"123456789"), 0xd0db);
        let oracle = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF);
        let data: Vec<u8> = (0..400u32).map(|i| (i.wrapping_mul(2654435761) >> 13) as u8).collect();
        for len in 0..data.len() {
            assert_eq!(update(0, &data[..len]), oracle.checksum(&data[..len]), "{len}");
            assert_eq!(update(update(0, &data[..len]), &data[len..]), oracle.checksum(&data), "{len}");
        }
    }
}
