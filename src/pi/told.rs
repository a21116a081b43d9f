//! Checking tuples as a command asks for it: which tags, and against what (SBC-4 tables of RDPROTECT, WRPROTECT and
//! VRPROTECT). Called by the decorator for reads and by the SCSI target for what initiators send.

use super::{
    check::{Checked, Checker},
    tuple::{TUPLE_LEN, Tuple, tuples},
};
use crate::{
    sys::mem::Sg,
    units::Lba,
    volume::{PiMismatch, PiTag, TupleCheck},
};

impl Checker {
    /// Checks the blocks in `data`, the first of which is `first`, against `stored`, of which there have to be as many
    /// as blocks. Counts blocks that were looked at and found well as verified, escapes as unprotected.
    ///
    /// # Errors
    /// The mismatch of the lowest LBA.
    pub fn verify_as_told(
        &self,
        data: &Sg,
        first: Lba,
        stored: &[u8],
        told: &TupleCheck,
    ) -> Result<Checked, PiMismatch> {
        debug_assert_eq!(stored.len() / TUPLE_LEN, data.len() / self.block_size.bytes() as usize);
        let mut checked = Checked::default();
        let mut wrong: Option<PiMismatch> = None;
        let mut stored = tuples(stored);
        let mut one = |i: usize, guard: Option<u16>| {
            let lba = Lba(first.0.wrapping_add(i as u64));
            let tuple = stored.next().unwrap_or(Tuple::ESCAPE);
            if tuple.is_escape(self.kind) {
                checked.unprotected += 1;
                return;
            }
            match tags(told, i, lba, guard, tuple) {
                Ok(()) => checked.verified += 1,
                Err(m) => wrong = wrong.or(Some(m)),
            }
        };
        if told.guard {
            self.guards(data, |i, guard| one(i, Some(guard)));
        } else {
            (0..data.len() / self.block_size.bytes() as usize).for_each(|i| one(i, None));
        }
        match wrong {
            None => Ok(checked),
            Some(mismatch) => Err(mismatch),
        }
    }
}

fn tags(told: &TupleCheck, i: usize, lba: Lba, guard: Option<u16>, found: Tuple) -> Result<(), PiMismatch> {
    let wrong = |tag, expected: u32, found: u32| Err(PiMismatch { lba, tag, expected, found });
    if let Some(guard) = guard
        && guard != found.guard
    {
        // Expected is what the tuple says, found is what the data give.
        return wrong(PiTag::Guard, u32::from(found.guard), u32::from(guard));
    }
    if let Some((tag, mask)) = told.app.of(lba)
        && (tag ^ found.app) & mask != 0
    {
        return wrong(PiTag::Application, u32::from(tag), u32::from(found.app));
    }
    if let Some(initial) = told.reference {
        let expected = initial.wrapping_add(i as u32);
        if expected != found.reference {
            return wrong(PiTag::Reference, expected, found.reference);
        }
    }
    Ok(())
}
