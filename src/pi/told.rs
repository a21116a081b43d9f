//! Checking tuples as a command asks for it: which tags, and against what (SBC-4 tables of RDPROTECT, WRPROTECT and
//! VRPROTECT). Called by the decorator for reads and by the SCSI target for what initiators send.

use super::{
    check::{Checked, Checker},
    guard::{Blocks, Mask, Tags},
    tuple::{TUPLE_LEN, Tuple, tuples},
};
use crate::{
    sys::mem::Sg,
    units::Lba,
    volume::{AppTags, PiMismatch, PiTag, TupleCheck},
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
        let blocks = stored.len() / TUPLE_LEN;
        debug_assert_eq!(blocks, data.len() / self.block_size.bytes() as usize);
        let (mut unprotected, mut mismatches) = (0, 0);
        let mut wrong: Option<PiMismatch> = None;
        let mut one = |i: usize, guard: Option<u16>| {
            let lba = Lba(first.0.wrapping_add(i as u64));
            let tuple = tuples(&stored[i * TUPLE_LEN..]).next().unwrap_or(Tuple::ESCAPE);
            if tuple.is_escape(self.kind) {
                unprotected += 1;
            } else if let Err(m) = tags(told, i, lba, guard, tuple) {
                mismatches += 1;
                wrong = wrong.or(Some(m));
            }
        };
        match (told.guard, fast(told)) {
            // Eight at a time, and a closer look at those alone that differ or may be the escape.
            (true, Some((tags, mask))) => {
                let data = Blocks::of(data, self.block_size);
                self.guard.verify(data, tags, mask, stored, |i, guard| one(i, Some(guard)));
            }
            (true, None) => self.guards(data, |i, guard| one(i, Some(guard))),
            (false, _) => (0..blocks).for_each(|i| one(i, None)),
        }
        let checked = Checked { verified: blocks as u64 - unprotected - mismatches, unprotected };
        match wrong {
            None => Ok(checked),
            Some(mismatch) => Err(mismatch),
        }
    }
}

/// What the fast comparison looks at, unless the application tags differ from block to block.
fn fast(told: &TupleCheck) -> Option<(Tags, Mask)> {
    let (app, app_mask) = match &told.app {
        AppTags::Unknown => (0, 0),
        AppTags::One { tag, mask } => (*tag, *mask),
        AppTags::ByRange(_) => return None,
    };
    let tags = Tags { app, reference: told.reference.unwrap_or(0), step: 1 };
    let reference = if told.reference.is_some() { u32::MAX } else { 0 };
    Some((tags, Mask { app: app_mask, reference, ..Mask::ALL }))
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
