//! Blocks that do not match their tuple, and what comes of it: a count, an error, or on a volume that nobody may mend, nothing.
//! Called by the reads of [`Protected`].

use super::Protected;
use crate::{
    pi::tuple::TUPLE_LEN,
    storage::Storage,
    sys::mem::Sg,
    units::{ByteOffset, Lba},
    volume::{IoError, IoErrorKind, IoOp, PiMismatch, PiTag, Volume},
};

impl<V: Volume, S: Storage> Protected<V, S> {
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
