//! How blocks and their tuples lie in a command's buffers: each tuple right after its block in one buffer (interleaved),
//! or all of them in a buffer of their own (separate). Buffers may be cut anywhere.
//!
//! Nothing is copied but the tuples themselves: [`Parts::data`] is a view of the command's own memory, which the image
//! reads into and writes from. Called by the SCSI target, before anything is read or written.

use super::tuple::TUPLE_LEN;
use crate::{sys::mem::Sg, units::BlockSize};

/// A command's buffers, taken apart.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The blocks, one after another.
    pub data: Sg,
    /// Their tuples, one after another; or nothing, if none travel.
    pub tuples: Sg,
}

/// Buffers that are not as long as the command says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The data buffer.
    #[error("the data buffer has {has} bytes, and {blocks} blocks{with} take {needs}")]
    Data {
        /// Bytes that are there.
        has: u64,
        /// Bytes that it takes.
        needs: u64,
        /// Blocks that the command names.
        blocks: u64,
        /// Whether tuples lie among them.
        with: With,
    },
    /// The buffer of tuples.
    #[error("the buffer of protection information has {has} bytes, and {blocks} blocks take {needs}")]
    Tuples {
        /// Bytes that are there.
        has: u64,
        /// Bytes that it takes.
        needs: u64,
        /// Blocks that the command names.
        blocks: u64,
    },
}

/// Whether blocks have their tuples with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum With {
    /// Blocks alone.
    Nothing,
    /// Each with its tuple.
    Tuples,
}

impl std::fmt::Display for With {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            With::Nothing => "",
            With::Tuples => " with their protection information",
        })
    }
}

impl Parts {
    /// Blocks alone, at the start of a buffer that may be longer.
    ///
    /// # Errors
    /// [`WireError::Data`] if it is shorter.
    pub fn plain(data: &Sg, size: BlockSize, blocks: u64) -> Result<Parts, WireError> {
        let has = data.len() as u64;
        let needs = blocks.saturating_mul(size.bytes());
        if has < needs {
            return Err(WireError::Data { has, needs, blocks, with: With::Nothing });
        }
        Ok(Parts { data: data.slice(0, needs as usize), tuples: Sg::new() })
    }

    /// Blocks each with its tuple after it. The length has to be exact: from a buffer of another one it cannot be told
    /// where the tuples stand.
    ///
    /// # Errors
    /// [`WireError::Data`].
    pub fn interleaved(data: &Sg, size: BlockSize, blocks: u64) -> Result<Parts, WireError> {
        let has = data.len() as u64;
        let needs = blocks.saturating_mul(size.bytes() + TUPLE_LEN as u64);
        if has != needs {
            return Err(WireError::Data { has, needs, blocks, with: With::Tuples });
        }
        let (data, tuples) = data.deal(size.bytes() as usize, TUPLE_LEN);
        Ok(Parts { data, tuples })
    }

    /// Blocks in one buffer, their tuples in the other.
    ///
    /// # Errors
    /// [`WireError::Data`] if the first is too short, [`WireError::Tuples`] if the second is not exact.
    pub fn separate(data: &Sg, tuples: &Sg, size: BlockSize, blocks: u64) -> Result<Parts, WireError> {
        let Parts { data, .. } = Parts::plain(data, size, blocks)?;
        let has = tuples.len() as u64;
        let needs = blocks.saturating_mul(TUPLE_LEN as u64);
        if has != needs {
            return Err(WireError::Tuples { has, needs, blocks });
        }
        Ok(Parts { data, tuples: tuples.clone() })
    }

    /// The part that holds these blocks, counted from the first.
    pub fn part(&self, size: BlockSize, first: u64, blocks: u64) -> Parts {
        let cut = |sg: &Sg, each: usize| sg.slice(first as usize * each, blocks as usize * each);
        let tuples = if self.tuples.is_empty() { Sg::new() } else { cut(&self.tuples, TUPLE_LEN) };
        Parts { data: cut(&self.data, size.bytes() as usize), tuples }
    }

    /// Puts tuples where they travel.
    pub fn give(&self, tuples: &[u8]) {
        debug_assert_eq!(tuples.len(), self.tuples.len());
        self.tuples.copy_in(0, &tuples[..tuples.len().min(self.tuples.len())]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{storage::sim::Rng, sys::mem::Buffer};

    /// The bytes in a list that is cut at random places.
    fn scatter(bytes: &[u8], rng: &mut Rng) -> Sg {
        let mut sg = Sg::new();
        let mut at = 0;
        while at < bytes.len() {
            let longest = [3, 20, 600, 9000][rng.below(4) as usize];
            let n = (1 + rng.below(longest) as usize).min(bytes.len() - at);
            sg.append(&Buffer::from_slice(&bytes[at..at + n]).sg());
            at += n;
        }
        sg
    }

    #[test]
    fn interleaved_buffers_cut_anywhere_come_apart_and_together_again() {
        let mut rng = Rng::new(1);
        for round in 0..100 {
            let size = if round % 2 == 0 { BlockSize::B512 } else { BlockSize::B4096 };
            let n = size.bytes() as usize;
            let blocks = 1 + rng.below(9);
            let bytes = rng.bytes((n + 8) * blocks as usize);
            let buffer = scatter(&bytes, &mut rng);
            let parts = Parts::interleaved(&buffer, size, blocks).unwrap();
            let data: Vec<u8> = bytes.chunks(n + 8).flat_map(|b| b[..n].to_vec()).collect();
            let tuples: Vec<u8> = bytes.chunks(n + 8).flat_map(|b| b[n..].to_vec()).collect();
            assert_eq!((parts.data.to_vec(), parts.tuples.to_vec()), (data.clone(), tuples.clone()));
            let (first, some) = (rng.below(blocks), 1);
            let part = parts.part(size, first, some);
            assert_eq!(part.data.to_vec(), data[first as usize * n..][..n]);
            assert_eq!(part.tuples.to_vec(), tuples[first as usize * 8..][..8]);

            // Into an empty buffer of the same shape, as a read does.
            let to = scatter(&vec![0; bytes.len()], &mut rng);
            let into = Parts::interleaved(&to, size, blocks).unwrap();
            into.data.copy_in(0, &data);
            into.give(&tuples);
            assert_eq!(to.to_vec(), bytes);
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused_with_both_numbers() {
        let size = BlockSize::B512;
        let sg = |n: usize| Buffer::zeroed(n).sg();
        for has in [0, 1, 1039, 1041, 1024, 2080] {
            let wrong = Parts::interleaved(&sg(has), size, 2).unwrap_err();
            assert_eq!(
                wrong,
                WireError::Data { has: has as u64, needs: 1040, blocks: 2, with: With::Tuples }
            );
        }
        for has in [0, 8, 15, 17, 24] {
            let wrong = Parts::separate(&sg(1024), &sg(has), size, 2).unwrap_err();
            assert_eq!(wrong, WireError::Tuples { has: has as u64, needs: 16, blocks: 2 });
        }
        let short = Parts::separate(&sg(1023), &sg(16), size, 2).unwrap_err();
        assert_eq!(short.to_string(), "the data buffer has 1023 bytes, and 2 blocks take 1024");
        assert!(Parts::plain(&sg(4096), size, u64::MAX).is_err());
        // A longer data buffer is one that a transport has rounded up.
        assert_eq!(Parts::separate(&sg(4096), &sg(16), size, 2).unwrap().data.len(), 1024);
    }
}
