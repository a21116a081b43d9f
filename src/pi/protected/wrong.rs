//! Blocks that do not match their tuple, and what comes of it: a count, an error, or on a volume that nobody may mend, nothing.
//! Called by the reads of [`Protected`].

use super::Protected;
use crate::{
    pi::{store::Source, tuple::TUPLE_LEN},
    storage::Storage,
    sys::mem::Sg,
    units::{ByteOffset, Lba},
    volume::{IoError, IoErrorKind, IoOp, PiMismatch, PiTag, Result, TupleCheck, Volume},
};

impl<V: Volume, S: Storage> Protected<V, S> {
    /// Reads blocks and their tuples, checks all that is known of them, and counts.
    pub(super) async fn read_and_check(&self, at: ByteOffset, to: &Sg) -> Result<Vec<u8>> {
        let mut source = Source::Memory;
        loop {
            let (lba, mut tuples) = self.get(at, to, source).await?;
            let (mut wrong, mut in_doubt) = (None, Vec::new());
            let checked = self.checker().verify_all(to, lba, &tuples, |m| {
                // What a crash has left in doubt cannot be rechecked by one who may not write.
                let doubted = self.read_only && self.sidecar.is_marked(m.lba);
                if doubted {
                    in_doubt.push((m.lba.0 - lba.0) as usize);
                } else {
                    wrong = wrong.or(Some(m));
                }
                doubted
            });
            if wrong.is_some() && source == Source::Memory && self.memory_may_err(lba, to) {
                source = Source::File;
                continue;
            }
            self.count(|c| {
                c.verified += checked.verified;
                c.unprotected += checked.unprotected;
            });
            if let Some(m) = wrong {
                return Err(self.mismatch(at, m));
            }
            in_doubt.into_iter().for_each(|i| tuples[i * TUPLE_LEN..][..TUPLE_LEN].fill(0xff));
            return Ok(tuples);
        }
    }

    /// Reads blocks and their tuples for an initiator, who says what is to be checked, and counts.
    pub(super) async fn read_as_told(&self, at: ByteOffset, to: &Sg, check: &TupleCheck) -> Result<Vec<u8>> {
        let mut source = Source::Memory;
        loop {
            let (lba, mut tuples) = self.get(at, to, source).await?;
            if self.read_only {
                self.forgive(lba, to, &mut tuples);
            }
            match self.checker().verify_as_told(to, lba, &tuples, check) {
                Ok(seen) => {
                    self.count(|c| {
                        c.verified += seen.verified;
                        c.unprotected += seen.unprotected;
                    });
                    return Ok(tuples);
                }
                Err(_) if source == Source::Memory && self.memory_may_err(lba, to) => source = Source::File,
                Err(m) => return Err(self.mismatch(at, m)),
            }
        }
    }

    /// Blocks do not match their tuples: if those came from memory, they may have been damaged there, and the file has the last word.
    fn memory_may_err(&self, lba: Lba, data: &Sg) -> bool {
        self.sidecar.doubt_memory(lba, self.block_size().blocks_in(data.len() as u64).0)
    }

    /// Counts a mismatch, and says it as an error.
    pub(super) fn mismatch(&self, at: ByteOffset, m: PiMismatch) -> IoError {
        self.count(|c| match m.tag {
            PiTag::Guard => c.guard_errors += 1,
            PiTag::Application => c.app_errors += 1,
            PiTag::Reference => c.ref_errors += 1,
        });
        let place = m.lba.to_bytes(self.checker().block_size).unwrap_or(at);
        IoError::new(IoErrorKind::Protection(m), IoOp::Read).at(place)
    }

    /// On a volume that may not be written nobody could settle what a crash has cut off: there a block of a marked region
    /// that does not match its tuple has none.
    pub(in crate::pi) fn forgive(&self, first: Lba, data: &Sg, tuples: &mut [u8]) {
        let stored = tuples.to_vec();
        self.checker().check(data, first, &stored, |i, _, found| {
            if let Err(m) = found
                && self.sidecar.is_marked(m.lba)
            {
                tuples[i * TUPLE_LEN..][..TUPLE_LEN].fill(0xff);
            }
        });
    }
}
