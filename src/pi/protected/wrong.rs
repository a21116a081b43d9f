//! Blocks that do not match their tuple, and what comes of it: a count, an error, or on a volume that nobody may mend, nothing.
//! Called by the reads of [`Protected`].

use super::Protected;
use crate::{
    pi::tuple::TUPLE_LEN,
    storage::Storage,
    sys::mem::Sg,
    units::{ByteOffset, Lba},
    volume::{IoError, IoErrorKind, IoOp, PiMismatch, PiTag, Result, Volume},
};

impl<V: Volume, S: Storage> Protected<V, S> {
    /// Reads blocks and their tuples, checks all that is known of them, and counts.
    pub(super) async fn read_and_check(&self, at: ByteOffset, to: &Sg) -> Result<Vec<u8>> {
        let (lba, mut tuples) = self.get(at, to).await?;
        let mut seen = self.counters.get();
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
        seen.verified += checked.verified;
        seen.unprotected += checked.unprotected;
        self.counters.set(seen);
        if let Some(m) = wrong {
            return Err(self.mismatch(at, m));
        }
        in_doubt.into_iter().for_each(|i| tuples[i * TUPLE_LEN..][..TUPLE_LEN].fill(0xff));
        Ok(tuples)
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
