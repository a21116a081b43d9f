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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pi::{exposure::Exposure, guard::Guard, tuple::PiType},
        storage::sim::{Rng, scaled},
        sys::mem::Buffer,
        units::BlockSize,
        volume::AppRange,
    };

    #[test]
    fn eight_at_a_time_says_what_block_by_block_says() {
        let oracle = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF);
        let mut rng = Rng::new(1);
        let mut seen = [0; 2];
        for _ in 0..scaled(2000) {
            let kind = [PiType::Type1, PiType::Type2, PiType::Type3][rng.below(3) as usize];
            let (first, blocks) = (Lba(rng.below(1 << 33)), 1 + rng.below(20) as usize);
            let data = rng.bytes(512 * blocks);
            let tag = if rng.one_in(4) { 0xffff } else { rng.next() as u16 };
            let initial = rng.next() as u32;
            let told = TupleCheck {
                guard: !rng.one_in(4),
                app: match rng.below(4) {
                    0 => AppTags::Unknown,
                    1 => AppTags::One { tag, mask: rng.next() as u16 },
                    2 => AppTags::One { tag, mask: u16::MAX },
                    _ => AppTags::ByRange([AppRange { first, blocks: 3, tag }].into()),
                },
                reference: (!rng.one_in(3)).then_some(initial),
            };
            let mut stored: Vec<Tuple> = data
                .chunks(512)
                .enumerate()
                .map(|(i, b)| Tuple {
                    guard: oracle.checksum(b),
                    app: tag,
                    reference: initial.wrapping_add(i as u32),
                })
                .collect();
            for _ in 0..rng.below(3) {
                let tuple = &mut stored[rng.below(blocks as u64) as usize];
                match rng.below(5) {
                    0 => tuple.guard ^= 1 << rng.below(16),
                    1 => tuple.app ^= 1 << rng.below(16),
                    2 => tuple.reference ^= 1 << rng.below(32),
                    3 => *tuple = Tuple::ESCAPE,
                    _ => tuple.app = 0xffff,
                }
            }
            let mut want = Ok(Checked::default());
            for (i, (block, tuple)) in data.chunks(512).zip(&stored).enumerate() {
                let Ok(checked) = &mut want else { break };
                let guard = told.guard.then(|| oracle.checksum(block));
                if tuple.is_escape(kind) {
                    checked.unprotected += 1;
                } else if let Err(m) = tags(&told, i, Lba(first.0 + i as u64), guard, *tuple) {
                    want = Err(m);
                } else {
                    checked.verified += 1;
                }
            }
            seen[usize::from(want.is_err())] += 1;
            let stored: Vec<u8> = stored.iter().flat_map(|t| t.to_bytes()).collect();
            let sg = Buffer::from_slice(&data).sg();
            for guard in Guard::all() {
                let checker = Checker { guard, kind, block_size: BlockSize::B512, tags: Exposure::Initiator };
                assert_eq!(checker.verify_as_told(&sg, first, &stored, &told), want, "{told:?}");
            }
        }
        assert!(seen[0] > 50 && seen[1] > 50, "{seen:?}");
    }
}
