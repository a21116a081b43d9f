//! What stands beside the guards: the tags of a run of blocks, which of them are compared, and the plain way to make
//! and compare a line of eight tuples. Made by [`crate::pi::check`]; the wide kernels do the same in registers.

use crate::pi::tuple::TUPLE_LEN;

/// The application and reference tags of a run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tags {
    /// LOGICAL BLOCK APPLICATION TAG of every block.
    pub app: u16,
    /// LOGICAL BLOCK REFERENCE TAG of the first block.
    pub reference: u32,
    /// What it grows by from block to block: 1 in types 1 and 2, 0 in type 3.
    pub step: u32,
}

/// Which bits of a tuple are compared: those that are 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    /// Of the guard.
    pub guard: u16,
    /// Of the application tag.
    pub app: u16,
    /// Of the reference tag.
    pub reference: u32,
}

impl Mask {
    /// Every bit.
    pub const ALL: Mask = Mask { guard: 0xffff, app: 0xffff, reference: 0xffff_ffff };

    /// As the bytes of a tuple, in the order that memory has them.
    pub(super) fn bytes(self) -> u64 {
        word(self.guard.to_be_bytes(), Tags { app: self.app, reference: self.reference, step: 0 })
    }
}

impl Tags {
    /// Those of the block `n` further on.
    pub(super) fn after(self, n: usize) -> Tags {
        Tags { reference: self.reference.wrapping_add(self.step.wrapping_mul(n as u32)), ..self }
    }
}

/// The application tag of the escape, in a tuple as memory has it: types 1, 2 and 3 have it in common.
pub(super) const ESCAPED_APP: u64 = u64::from_le_bytes([0, 0, 0xff, 0xff, 0, 0, 0, 0]);

/// Eight guards, big-endian, in the order of their blocks.
pub(super) type Guards = [u8; 16];

fn word(guard: [u8; 2], tags: Tags) -> u64 {
    let ([g0, g1], [a0, a1], [r0, r1, r2, r3]) =
        (guard, tags.app.to_be_bytes(), tags.reference.to_be_bytes());
    u64::from_le_bytes([g0, g1, a0, a1, r0, r1, r2, r3])
}

/// The tuples of the blocks that fit in `out`, at most eight.
pub(super) fn put(guards: Guards, tags: Tags, out: &mut [u8]) {
    let slots = out.as_chunks_mut::<TUPLE_LEN>().0.iter_mut();
    for (i, (slot, guard)) in slots.zip(guards.as_chunks::<2>().0).enumerate() {
        *slot = word(*guard, tags.after(i)).to_le_bytes();
    }
}

/// Which of at most eight stored tuples want a second look, as bits: they differ under the mask, or their application tag is
/// the escape's.
pub(super) fn suspects(guards: Guards, tags: Tags, mask: Mask, stored: &[u8]) -> u8 {
    let mut out = 0;
    let pairs = stored.as_chunks::<TUPLE_LEN>().0.iter().zip(guards.as_chunks::<2>().0);
    for (i, (stored, guard)) in pairs.enumerate() {
        let stored = u64::from_le_bytes(*stored);
        let differs = (stored ^ word(*guard, tags.after(i))) & mask.bytes() != 0;
        out |= u8::from(differs || stored & ESCAPED_APP == ESCAPED_APP) << i;
    }
    out
}
