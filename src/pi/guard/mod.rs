//! The guard: CRC-16/T10-DIF (polynomial 8BB7h, initial value 0, not reflected, no final XOR; SBC-4 4.21.4.2).
//!
//! There are several kernels, and all give the same numbers. [`Guard::best`] picks the fastest that this machine runs;
//! tests and benches name one. A kernel has two doors: whole blocks that lie in one piece of memory, where a wide one can
//! work on several at a time, and a running CRC for blocks that are cut by the border of a segment.

mod slice;

use crc_fast::{CrcAlgorithm, Digest};

/// A way to compute guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// The crate `crc-fast`: carry-less multiplication where the processor has it.
    Fast,
    /// Sixteen tables, sixteen bytes at a time: any processor.
    Slice16,
}

/// A kernel that this machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard(Kernel);

impl Kernel {
    /// Every kernel there is, the fastest first.
    pub const ALL: [Kernel; 2] = [Kernel::Fast, Kernel::Slice16];

    /// Its name, as `TCMU_DIF_GUARD` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Fast => "crc-fast",
            Kernel::Slice16 => "slice16",
        }
    }

    fn available(self) -> bool {
        match self {
            // Without carry-less multiplication the crate falls back to a table of its own.
            Kernel::Fast => true,
            Kernel::Slice16 => true,
        }
    }
}

impl Guard {
    /// The kernel that the environment variable `TCMU_DIF_GUARD` names, if it can be run, or the fastest.
    pub fn best() -> Guard {
        let named = std::env::var("TCMU_DIF_GUARD").ok();
        Guard::all().find(|g| Some(g.kernel().name()) == named.as_deref()).unwrap_or_else(|| {
            let [first, ..] = Kernel::ALL;
            Guard::all().next().unwrap_or(Guard(first))
        })
    }

    /// Every kernel that this machine runs, the fastest first.
    pub fn all() -> impl Iterator<Item = Guard> {
        Kernel::ALL.into_iter().filter(|k| k.available()).map(Guard)
    }

    /// Which it is.
    pub fn kernel(self) -> Kernel {
        self.0
    }

    /// The CRC of what gave `crc` so far (0 at the start) followed by `bytes`.
    pub fn update(self, crc: u16, bytes: &[u8]) -> u16 {
        match self.0 {
            Kernel::Fast => {
                let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc16T10Dif, u64::from(crc));
                digest.update(bytes);
                digest.finalize() as u16
            }
            Kernel::Slice16 => slice::update(crc, bytes),
        }
    }

    /// The guards of whole blocks that stand one after the other; calls `each` with the index and the guard, in order.
    pub fn blocks(self, data: &[u8], block_size: usize, mut each: impl FnMut(usize, u16)) {
        for (i, block) in data.chunks_exact(block_size).enumerate() {
            each(i, self.update(0, block));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORACLE: crc::Crc<u16> = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF);

    fn noise(len: usize, mut seed: u64) -> Vec<u8> {
        (0..len)
            .map(|_| {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (seed >> 56) as u8
            })
            .collect()
    }

    #[test]
    fn every_kernel_gives_the_catalogue_check_value() {
        for g in Guard::all() {
            assert_eq!(g.update(0, b"123456789"), 0xd0db, "{:?}", g.kernel());
        }
    }

    #[test]
    fn every_kernel_equals_the_oracle_at_every_length_and_odd_alignment() {
        let data = noise(5000, 1);
        for g in Guard::all() {
            for len in (0..300).chain([511, 512, 513, 1024, 4095, 4096, 4097]) {
                for start in [0, 1, 3, 7, 8, 15, 31, 63] {
                    let part = &data[start..start + len];
                    assert_eq!(g.update(0, part), ORACLE.checksum(part), "{:?} {start}+{len}", g.kernel());
                }
            }
        }
    }

    #[test]
    fn every_kernel_sees_every_single_bit_of_a_block() {
        for g in Guard::all() {
            for size in [512usize, 4096] {
                let mut block = vec![0; size];
                for bit in 0..size * 8 {
                    block[bit / 8] = 0x80 >> (bit % 8);
                    let crc = g.update(0, &block);
                    assert_ne!(crc, 0, "{:?} bit {bit} of {size}", g.kernel());
                    if bit % 61 == 0 {
                        assert_eq!(crc, ORACLE.checksum(&block), "{:?} bit {bit} of {size}", g.kernel());
                    }
                    block[bit / 8] = 0;
                }
            }
        }
    }

    #[test]
    fn a_running_crc_may_be_cut_anywhere() {
        let data = noise(4096, 2);
        let whole = ORACLE.checksum(&data);
        for g in Guard::all() {
            for cut in (0..=4096).step_by(13) {
                assert_eq!(
                    g.update(g.update(0, &data[..cut]), &data[cut..]),
                    whole,
                    "{:?} {cut}",
                    g.kernel()
                );
            }
        }
    }

    #[test]
    fn blocks_gives_one_guard_a_block_in_order() {
        let data = noise(8 * 4096 + 100, 3);
        for g in Guard::all() {
            for size in [512usize, 4096] {
                let mut got = Vec::new();
                g.blocks(&data, size, |i, crc| got.push((i, crc)));
                let want: Vec<_> = data.chunks_exact(size).map(|b| ORACLE.checksum(b)).enumerate().collect();
                assert_eq!(got, want);
            }
        }
    }
}
