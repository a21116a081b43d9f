//! The blocks of a scatter list, cut anywhere, one after the other or with eight bytes of tuple between them.
//!
//! [`Blocks`] is what callers hand to [`super::Guard`]; [`Walk`] is how [`super::engine`] goes through it.

use std::ptr::NonNull;

use crate::{
    pi::tuple::TUPLE_LEN,
    sys::mem::{Runs, Sg},
    units::BlockSize,
};

/// Whole blocks in a scatter list. Bytes at its end that make no whole block are left alone.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    sg: &'a Sg,
    size: BlockSize,
    gap: usize,
}

impl<'a> Blocks<'a> {
    /// Blocks that stand one after the other.
    pub fn of(sg: &'a Sg, size: BlockSize) -> Blocks<'a> {
        Blocks { sg, size, gap: 0 }
    }

    /// Blocks each of which is followed by its tuple, as an interleaved transfer has them (SBC-4 4.21.1).
    pub fn interleaved(sg: &'a Sg, size: BlockSize) -> Blocks<'a> {
        Blocks { sg, size, gap: TUPLE_LEN }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        match self.gap {
            0 => self.sg.len() >> self.size.shift(),
            gap => self.sg.len() / (self.bytes() + gap),
        }
    }

    /// Bytes of a block, without what stands between.
    pub(super) fn bytes(&self) -> usize {
        self.size.bytes() as usize
    }

    pub(super) fn gap(&self) -> usize {
        self.gap
    }

    pub(super) fn walk(&self) -> Walk<'a> {
        Walk { rest: self.sg.runs(), run: NonNull::dangling(), left: 0 }
    }

    /// The tuples that stand between the blocks, one after the other; none if there are none.
    pub fn tuples(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.count() * self.gap);
        let mut walk = self.walk();
        for _ in 0..self.count() {
            walk.pieces(self.bytes(), |_, _| ());
            walk.pieces(self.gap, |from, n| {
                // SAFETY: the piece lies in memory that the scatter list keeps alive, and nothing writes to it meanwhile.
                out.extend_from_slice(unsafe { std::slice::from_raw_parts(from, n) })
            });
        }
        out
    }

    /// Puts tuples between the blocks.
    ///
    /// # Panics
    /// If they are not as many as the blocks.
    pub fn put_tuples(&self, tuples: &[u8]) {
        assert_eq!(tuples.len(), self.count() * self.gap, "as many tuples as there are blocks");
        let (mut walk, mut done) = (self.walk(), 0);
        for _ in 0..self.count() {
            walk.pieces(self.bytes(), |_, _| ());
            walk.pieces(self.gap, |to, n| {
                // SAFETY: the piece lies in live memory, and the pieces add up to the length of `tuples`.
                unsafe { std::ptr::copy(tuples.as_ptr().add(done), to, n) };
                done += n;
            });
        }
    }
}

/// A place in a scatter list that moves forward.
pub(super) struct Walk<'a> {
    rest: Runs<'a>,
    run: NonNull<u8>,
    left: usize,
}

impl Walk<'_> {
    /// Whether the next `n` bytes lie in one piece, as far as can be told without moving to the next segment.
    #[inline(always)]
    pub(super) fn has(&self, n: usize) -> bool {
        self.left >= n
    }

    /// The next `n` bytes, if they lie in one piece; else the place stays where it is.
    #[inline(always)]
    pub(super) fn whole(&mut self, n: usize) -> Option<*mut u8> {
        if self.left == 0
            && let Some((run, left)) = self.rest.next()
        {
            (self.run, self.left) = (run, left);
        }
        if self.left < n {
            return None;
        }
        let at = self.run.as_ptr();
        self.advance(n);
        Some(at)
    }

    #[inline(always)]
    fn advance(&mut self, n: usize) {
        self.left -= n;
        // SAFETY: the callers have seen to it that n is at most what was left of the run.
        self.run = unsafe { self.run.add(n) };
    }

    /// Calls `f` with the pieces of the next `n` bytes, fewer only at the list's end.
    pub(super) fn pieces(&mut self, mut n: usize, mut f: impl FnMut(*mut u8, usize)) {
        while n > 0 {
            if self.left == 0 {
                let Some((run, left)) = self.rest.next() else { return };
                (self.run, self.left) = (run, left);
            }
            let part = n.min(self.left);
            f(self.run.as_ptr(), part);
            self.advance(part);
            n -= part;
        }
    }
}
