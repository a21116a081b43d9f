//! Protection information that a copy takes along: the source answers blocks with the tuples that were verified on its medium, and the
//! destination writes these guards, and none that it has computed of what lies in memory by then. So a bit that flips between the two
//! media ends the copy, and never becomes a block that matches.
//!
//! That goes where both keep tuples of one type for blocks of one size. Anywhere else a copy is a read that is verified, and a write that
//! gets protection information of its own. Called by [`Target::run_errand`].

use super::{Failure, Target, protect::Asked};
use crate::{
    pi::tuple::{TUPLE_LEN, Tuple},
    scsi::{cdb::Cdb, neighbour::Along},
    sys::mem::Sg,
    units::{BlockSize, ByteOffset, Lba},
    volume::{AtRest, IoError, IoErrorKind, IoOp, PiMismatch, PiTag, PiType, Volume},
};

/// What blocks of a copy are written with.
pub(super) struct Taken {
    asked: Asked,
    /// As they are to stand on the medium; `None`: whatever a plain write gives.
    tuples: Option<Vec<u8>>,
}

/// The CDB of READ (16) or WRITE (16) as far as protection looks at it: without a protection field.
pub(super) fn plain_cdb(bytes: &mut [u8; 16]) -> Cdb<'_> {
    bytes[0] = 0x88;
    Cdb::whole(bytes)
}

impl Along {
    /// Whether so many blocks of that size, protected so, can keep the guards.
    fn fits(&self, own: AtRest, size: BlockSize, blocks: u64) -> bool {
        let here = own.kind == self.at_rest.kind && self.block_size == size;
        here && self.tuples.len() as u64 == blocks * TUPLE_LEN as u64
    }
}

/// The tuple of a block at its destination. Its guard is the source's; its tags are the destination's own, but for those that are
/// initiators' on both sides.
fn at_its_place(kind: PiType, came: Tuple, own: Tuple, initiators: bool) -> Tuple {
    match (initiators, kind) {
        (false, _) => Tuple { guard: came.guard, ..own },
        // The reference tag says where the block is.
        (true, PiType::Type1 | PiType::Type2) => Tuple { reference: own.reference, ..came },
        (true, PiType::Type3) => came,
    }
}

impl<V: Volume> Target<V> {
    /// Reads blocks that are to be copied, verified, and their tuples.
    pub(super) async fn fetch_along(
        &self,
        at: ByteOffset,
        to: &Sg,
        asked: &Asked,
    ) -> Result<Option<Along>, Failure> {
        let before = self.volume.at_rest();
        let tuples = match asked.kind {
            // Whatever DPICZ says: nothing is copied that is not known to be right.
            Some(_) => Some(self.fetch(at, to, asked, asked.field.on_medium(false), 0).await?),
            None => self.volume.read_along(at, to).await.map_err(|e| self.failure(e))?,
        };
        // Commands may have gone over to another image meanwhile.
        let same = before.filter(|_| before == self.volume.at_rest());
        let along = |(tuples, at_rest)| Along { at_rest, block_size: self.block_size, tuples };
        Ok(tuples.zip(same).map(along))
    }

    /// What the blocks in `data`, copied to `lba`, are written with. A block that comes without protection information gets some, as
    /// one that is written without any does.
    ///
    /// # Errors
    /// The guard's, with the first block that is no longer what the source has verified; that the unit takes nothing without protection
    /// information (RWWP).
    pub(super) fn taken_along(&self, lba: Lba, data: &Sg, along: Option<Along>) -> Result<Taken, Failure> {
        let blocks = data.len() as u64 >> self.block_size.shift();
        let came = self.volume.at_rest().zip(along);
        let Some((own, along)) = came.filter(|(own, along)| along.fits(*own, self.block_size, blocks)) else {
            let asked = self.asked_to_write(plain_cdb(&mut [0; 16]), lba)?;
            return Ok(Taken { asked, tuples: None });
        };
        let (kind, initiators) = (own.kind, own.initiators && along.at_rest.initiators);
        let mut tuples = along.tuples;
        let (mut wrong, mut made) = (None, 0);
        let (slots, _) = tuples.as_chunks_mut::<TUPLE_LEN>();
        self.checker(kind).guards(data, |i, found| {
            let Some(slot) = slots.get_mut(i) else { return };
            let lba = Lba(lba.0 + i as u64);
            let (came, own) = (Tuple::from_bytes(*slot), Tuple::new(kind, found, lba));
            let tuple = if came.is_escape(kind) {
                made += 1;
                own
            } else {
                if came.guard != found {
                    let (expected, found) = (u32::from(came.guard), u32::from(found));
                    wrong = wrong.or(Some(PiMismatch { lba, tag: PiTag::Guard, expected, found }));
                }
                at_its_place(kind, came, own, initiators)
            };
            *slot = tuple.to_bytes();
        });
        if let Some(m) = wrong {
            self.count(|c| c.guard_errors += 1);
            let e = IoError::new(IoErrorKind::Protection(m), IoOp::Write);
            return Err(
                self.failure(e.detail("not what the source of the copy has verified; nothing was written"))
            );
        }
        let mut cdb = [0; 16];
        let cdb = plain_cdb(&mut cdb);
        let asked = if made == 0 { self.asked(cdb, lba)? } else { self.asked_to_write(cdb, lba)? };
        // What the application tag mode page has for a block is what every later read expects.
        asked.put_tags(lba, 0, &mut tuples);
        self.count(|c| {
            c.generated += made;
            c.verified += blocks - made;
        });
        Ok(Taken { asked, tuples: Some(tuples) })
    }

    /// Writes them.
    pub(super) async fn store_along(&self, at: ByteOffset, data: &Sg, taken: Taken) -> Result<(), Failure> {
        let flags = self.write_flags(false);
        match taken.tuples {
            None => self.store(at, data, None, flags, &taken.asked, 0).await,
            Some(tuples) => {
                let done = self.volume.write_with_tuples(at, data, tuples, flags).await;
                done.map_err(|e| self.failure(e))
            }
        }
    }
}
