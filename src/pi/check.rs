//! Making and checking tuples for the blocks in a scatter list. Blocks may span segments, cut anywhere.
//!
//! Called by the decorator ([`super::protected`]) on every read and write, and by the tools. Tuples are here in the form
//! that travels: eight bytes a block, big-endian ([`super::tuple`]).

use super::{
    exposure::Exposure,
    guard::{Blocks, Guard, Mask, Tags},
    tuple::{PiType, TUPLE_LEN, Tuple, tuples},
};
use crate::{
    sys::mem::Sg,
    units::{BlockSize, Lba},
    volume::{PiMismatch, PiTag},
};

/// What is needed to make or check tuples of a LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checker {
    /// The kernel that computes guards.
    pub guard: Guard,
    /// The LUN's type of protection.
    pub kind: PiType,
    /// The LUN's block size.
    pub block_size: BlockSize,
    /// Who made the tags: only of our own is it known what they should be.
    pub tags: Exposure,
}

/// How a check without a mismatch went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checked {
    /// Blocks that match their tuple.
    pub verified: u64,
    /// Blocks whose tuple is the escape.
    pub unprotected: u64,
}

impl Checker {
    /// The blocks in a scatter list.
    fn blocks<'a>(&self, data: &'a Sg) -> Blocks<'a> {
        Blocks::of(data, self.block_size)
    }

    /// The tags that this handler gives a run of blocks: application tag 0.
    fn tags(&self, first: Lba) -> Tags {
        let reference = |lba| self.kind.reference(lba);
        let step = reference(Lba(1)).wrapping_sub(reference(Lba(0)));
        Tags { app: 0, reference: reference(first), step }
    }

    /// What the fast comparison looks at. A block that it lets pass matches; of one that it doesn't, [`Checker::check_one`] says.
    fn fast_mask(&self) -> Mask {
        match (self.tags, self.kind) {
            (Exposure::Target, _) => Mask::ALL,
            (Exposure::Initiator, PiType::Type1) => Mask { app: 0, ..Mask::ALL },
            // Reference tags that an initiator chose.
            (Exposure::Initiator, _) => Mask { app: 0, reference: 0, ..Mask::ALL },
        }
    }

    /// Calls `each` with the index and the guard of every whole block in `data`, in order.
    pub fn guards(&self, data: &Sg, mut each: impl FnMut(usize, u16)) {
        // One copy of the kernels for all callers: none of them is on the path of a plain read or write.
        let each: &mut dyn FnMut(usize, u16) = &mut each;
        self.guard.guards(self.blocks(data), each);
    }

    /// The tuples of the blocks in `data`, the first of which is `first`.
    pub fn generate(&self, data: &Sg, first: Lba) -> Vec<u8> {
        let data = self.blocks(data);
        let mut out = vec![0; data.count() * TUPLE_LEN];
        self.guard.generate(data, self.tags(first), &mut out);
        out
    }

    /// The tuple that a block gets whose data are taken as they are: the tags that an initiator gave it stay.
    pub fn mend(&self, lba: Lba, guard: u16, old: Tuple) -> Tuple {
        let new = Tuple::new(self.kind, guard, lba);
        if self.tags == Exposure::Target || old.is_escape(self.kind) {
            return new;
        }
        let reference = if self.kind == PiType::Type1 { new.reference } else { old.reference };
        Tuple { guard, app: old.app, reference }
    }

    /// Checks the blocks in `data`, the first of which is `first`, against as many tuples.
    ///
    /// # Errors
    /// The mismatch of the lowest LBA.
    pub fn verify(&self, data: &Sg, first: Lba, tuples: &[u8]) -> Result<Checked, PiMismatch> {
        let mut wrong = None;
        let checked = self.verify_all(data, first, tuples, |mismatch| {
            wrong = wrong.or(Some(mismatch));
            false
        });
        match wrong {
            None => Ok(checked),
            Some(mismatch) => Err(mismatch),
        }
    }

    /// Checks every block, eight at a time where they match; calls `wrong` with each that does not, in order, and counts it as
    /// unprotected if that says so. This is what reads use; [`Checker::check`] is slower and says more.
    pub fn verify_all(
        &self,
        data: &Sg,
        first: Lba,
        stored: &[u8],
        mut wrong: impl FnMut(PiMismatch) -> bool,
    ) -> Checked {
        let data = self.blocks(data);
        let (mut unprotected, mut mismatches) = (0, 0);
        self.guard.verify(data, self.tags(first), self.fast_mask(), stored, |i, guard| {
            let lba = Lba(first.0.wrapping_add(i as u64));
            let tuple = tuples(&stored[i * TUPLE_LEN..]).next().unwrap_or(Tuple::ESCAPE);
            match self.check_one(lba, guard, tuple) {
                Ok(true) => (),
                Ok(false) => unprotected += 1,
                Err(mismatch) if wrong(mismatch) => unprotected += 1,
                Err(_) => mismatches += 1,
            }
        });
        Checked { verified: data.count() as u64 - unprotected - mismatches, unprotected }
    }

    /// Checks every block; calls `each` with the index, the guard of the data, and whether the block matches (`false`: its
    /// tuple is the escape) or what does not.
    pub fn check(
        &self,
        data: &Sg,
        first: Lba,
        stored: &[u8],
        mut each: impl FnMut(usize, u16, Result<bool, PiMismatch>),
    ) {
        debug_assert_eq!(stored.len() / TUPLE_LEN, self.blocks(data).count());
        let mut stored = tuples(stored);
        self.guards(data, |i, guard| {
            let lba = Lba(first.0.wrapping_add(i as u64));
            let tuple = stored.next().unwrap_or(Tuple::ESCAPE);
            each(i, guard, self.check_one(lba, guard, tuple));
        });
    }

    /// Checks one block by its guard: guard first, then application tag, then reference tag, as SBC-4 4.21.4 has it.
    fn check_one(&self, lba: Lba, guard: u16, found: Tuple) -> Result<bool, PiMismatch> {
        if found.is_escape(self.kind) {
            return Ok(false);
        }
        let want = Tuple::new(self.kind, guard, lba);
        let wrong = |tag, expected: u32, found: u32| Err(PiMismatch { lba, tag, expected, found });
        if found.guard != want.guard {
            // Expected is what the tuple says, found is what the data give: the block is the suspect.
            return wrong(PiTag::Guard, u32::from(found.guard), u32::from(want.guard));
        }
        let ours = self.tags == Exposure::Target;
        if ours && found.app != want.app {
            return wrong(PiTag::Application, u32::from(want.app), u32::from(found.app));
        }
        // The reference tag of type 3 is ours too (zero), and a damaged one says that the tuple is damaged.
        if (ours || self.kind == PiType::Type1) && found.reference != want.reference {
            return wrong(PiTag::Reference, want.reference, found.reference);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{storage::sim::Rng, sys::mem::Buffer};

    fn checker(guard: Guard, kind: PiType, block_size: BlockSize) -> Checker {
        Checker { guard, kind, block_size, tags: Exposure::Target }
    }

    /// The same bytes in segments cut at random places.
    fn scatter(bytes: &[u8], rng: &mut Rng) -> Sg {
        let mut sg = Sg::new();
        let mut at = 0;
        while at < bytes.len() {
            let longest = if rng.one_in(2) { 100 } else { 6000 };
            let n = (1 + rng.below(longest) as usize).min(bytes.len() - at);
            // An odd offset into a buffer of its own, so that neither address nor length is aligned.
            let buffer = Buffer::zeroed(n + 1);
            let part = buffer.sg().slice(1, n);
            part.copy_in(0, &bytes[at..at + n]);
            sg.append(&part);
            at += n;
        }
        sg
    }

    #[test]
    fn tuples_do_not_depend_on_where_the_segments_are_cut() {
        let oracle = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF);
        let mut rng = Rng::new(1);
        for round in 0..60 {
            for guard in Guard::all() {
                let size = if round % 2 == 0 { BlockSize::B512 } else { BlockSize::B4096 };
                let blocks = 1 + rng.below(9) as usize;
                let bytes = rng.bytes(size.bytes() as usize * blocks);
                let first = Lba(rng.next() >> 1);
                let c = checker(guard, PiType::Type1, size);
                let data = scatter(&bytes, &mut rng);
                let got = c.generate(&data, first);
                let want: Vec<u8> = bytes
                    .chunks(size.bytes() as usize)
                    .enumerate()
                    .flat_map(|(i, b)| {
                        let reference = (first.0 + i as u64) as u32;
                        Tuple { guard: oracle.checksum(b), app: 0, reference }.to_bytes()
                    })
                    .collect();
                assert_eq!(got, want);
                let n = bytes.len() as u64 / size.bytes();
                assert_eq!(c.verify(&data, first, &got), Ok(Checked { verified: n, unprotected: 0 }));
            }
        }
    }

    #[test]
    fn any_flipped_bit_is_found_at_its_block_and_an_escape_is_not_checked() {
        let mut rng = Rng::new(2);
        for kind in [PiType::Type1, PiType::Type3] {
            let c = checker(Guard::best(), kind, BlockSize::B512);
            let bytes = rng.bytes(8 * 512);
            let good = c.generate(&Buffer::from_slice(&bytes).sg(), Lba(100));
            for _ in 0..500 {
                let (mut bytes, mut stored) = (bytes.clone(), good.clone());
                let block = rng.below(8) as usize;
                let in_data = rng.one_in(2);
                let bit = if in_data {
                    let bit = rng.below(4096) as usize;
                    bytes[block * 512 + bit / 8] ^= 1 << (bit % 8);
                    bit
                } else {
                    let bit = rng.below(64) as usize;
                    stored[block * 8 + bit / 8] ^= 1 << (bit % 8);
                    bit
                };
                let data = scatter(&bytes, &mut rng);
                let wrong = c.verify(&data, Lba(100), &stored).unwrap_err();
                assert_eq!(wrong.lba, Lba(100 + block as u64));
                let tag = match (in_data, bit / 8) {
                    (true, _) | (_, 0 | 1) => PiTag::Guard,
                    (_, 2 | 3) => PiTag::Application,
                    _ => PiTag::Reference,
                };
                assert_eq!(wrong.tag, tag);
                assert_ne!(wrong.expected, wrong.found);
                stored[block * 8..][..8].fill(0xff);
                let ok = Ok(Checked { verified: 7, unprotected: 1 });
                assert_eq!(c.verify(&data, Lba(100), &stored), ok);
            }
        }
    }

    #[test]
    fn the_lowest_block_is_the_one_reported() {
        let c = checker(Guard::best(), PiType::Type1, BlockSize::B512);
        let data = Buffer::zeroed(4 * 512);
        let tuples = c.generate(&data.sg(), Lba(0));
        data.sg().copy_in(1024, &[1]);
        data.sg().copy_in(1536, &[1]);
        assert_eq!(c.verify(&data.sg(), Lba(0), &tuples).unwrap_err().lba, Lba(2));
        // The same blocks somewhere else: a misdirected read.
        let moved = c.verify(&Buffer::zeroed(4 * 512).sg(), Lba(8), &tuples).unwrap_err();
        let want = PiMismatch { lba: Lba(8), tag: PiTag::Reference, expected: 8, found: 0 };
        assert_eq!(moved, want);
    }
}
