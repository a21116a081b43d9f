//! What a kernel has to be able to do, and the loop that feeds it: eight blocks at a time, wherever they lie.
//!
//! A [`Job`] says what becomes of the guards. The loop is compiled once for every kernel and job, inside a function that has
//! the kernel's processor features; [`super::Guard`] picks which of them runs.

use std::mem::MaybeUninit;

use super::{
    blocks::{Blocks, Walk},
    tags::{self, Guards, Mask, Tags},
};
use crate::pi::tuple::TUPLE_LEN;

/// The longest block.
const LONGEST: usize = 4096;

/// Up to eight blocks. All eight places are valid: those past the last block repeat the first.
pub(super) struct Group {
    /// Where they lie.
    pub(super) from: [*const u8; 8],
    /// Where they go, if they are copied.
    pub(super) to: [*mut u8; 8],
    /// How many there are, 1 to 8.
    pub(super) count: usize,
}

/// A kernel.
pub(super) trait Engine: Copy {
    /// The guards of the group's blocks; what stands past the last is of no worth. With `COPY` it copies them too.
    ///
    /// # Safety
    /// The processor has the kernel's features; every place in the group has `SIZE` bytes, and `SIZE` is 512 or 4096.
    unsafe fn guards<const SIZE: usize, const COPY: bool>(self, group: &Group) -> Guards;

    /// As [`tags::put`], for eight.
    ///
    /// # Safety
    /// The processor has the kernel's features.
    #[inline(always)]
    unsafe fn put(self, guards: Guards, tags: Tags, out: &mut [u8; 64]) {
        tags::put(guards, tags, out);
    }

    /// As [`tags::suspects`], for eight.
    ///
    /// # Safety
    /// The processor has the kernel's features.
    #[inline(always)]
    unsafe fn suspects(self, guards: Guards, tags: Tags, mask: Mask, stored: &[u8; 64]) -> u8 {
        tags::suspects(guards, tags, mask, stored)
    }
}

/// A kernel that computes one CRC after the other.
#[derive(Clone, Copy)]
pub(super) struct OneByOne(pub(super) fn(&[u8]) -> u16);

impl Engine for OneByOne {
    #[inline(always)]
    unsafe fn guards<const SIZE: usize, const COPY: bool>(self, group: &Group) -> Guards {
        let mut out = Guards::default();
        for (i, slot) in out.as_chunks_mut::<2>().0.iter_mut().enumerate().take(group.count) {
            // SAFETY: the group's places have `SIZE` bytes (the caller's promise), and are not written to before the
            // slice is gone; `copy` allows both places to be the same.
            unsafe {
                *slot = self.0(std::slice::from_raw_parts(group.from[i], SIZE)).to_be_bytes();
                if COPY {
                    std::ptr::copy(group.from[i], group.to[i], SIZE);
                }
            }
        }
        out
    }
}

/// What becomes of guards.
pub(super) trait Job {
    /// The blocks `index` and after it, `count` (1 to 8) of them, have these guards.
    ///
    /// # Safety
    /// The processor has the engine's features.
    unsafe fn take<E: Engine>(&mut self, engine: E, index: usize, count: usize, guards: Guards);
}

/// Calls a closure with index and guard.
pub(super) struct Each<F>(pub(super) F);

impl<F: FnMut(usize, u16)> Job for Each<F> {
    #[inline(always)]
    unsafe fn take<E: Engine>(&mut self, _: E, index: usize, count: usize, guards: Guards) {
        for (i, guard) in guards.as_chunks::<2>().0.iter().enumerate().take(count) {
            self.0(index + i, u16::from_be_bytes(*guard));
        }
    }
}

/// Makes tuples.
pub(super) struct Generate<'a> {
    /// The tags of block 0.
    pub(super) tags: Tags,
    /// Where they go, eight bytes a block.
    pub(super) out: &'a mut [u8],
}

impl Job for Generate<'_> {
    #[inline(always)]
    unsafe fn take<E: Engine>(&mut self, engine: E, index: usize, count: usize, guards: Guards) {
        let tags = self.tags.after(index);
        let out = &mut self.out[index * TUPLE_LEN..][..count * TUPLE_LEN];
        match out.as_chunks_mut::<64>() {
            // SAFETY: the caller's promise.
            ([line], _) => unsafe { engine.put(guards, tags, line) },
            _ => tags::put(guards, tags, out),
        }
    }
}

/// Compares with stored tuples; calls a closure with index and guard where they want a second look.
pub(super) struct Verify<'a, F> {
    /// The tags of block 0.
    pub(super) tags: Tags,
    /// What is compared.
    pub(super) mask: Mask,
    /// The stored tuples, eight bytes a block.
    pub(super) stored: &'a [u8],
    /// Who looks again.
    pub(super) suspect: F,
}

impl<F: FnMut(usize, u16)> Job for Verify<'_, F> {
    #[inline(always)]
    unsafe fn take<E: Engine>(&mut self, engine: E, index: usize, count: usize, guards: Guards) {
        let tags = self.tags.after(index);
        let stored = &self.stored[index * TUPLE_LEN..][..count * TUPLE_LEN];
        let suspects = match stored.as_chunks::<64>() {
            // SAFETY: the caller's promise.
            ([line], _) => unsafe { engine.suspects(guards, tags, self.mask, line) },
            _ => tags::suspects(guards, tags, self.mask, stored),
        };
        if suspects != 0 {
            self.look_again(suspects, index, count, guards);
        }
    }
}

impl<F: FnMut(usize, u16)> Verify<'_, F> {
    #[cold]
    #[inline(never)]
    fn look_again(&mut self, suspects: u8, index: usize, count: usize, guards: Guards) {
        for (i, guard) in guards.as_chunks::<2>().0.iter().enumerate().take(count) {
            if suspects >> i & 1 != 0 {
                (self.suspect)(index + i, u16::from_be_bytes(*guard));
            }
        }
    }
}

/// Room for blocks that the border of a segment cuts.
#[repr(align(64))]
struct Bounce([[u8; LONGEST]; 8]);

/// The blocks, taken by groups.
struct Groups<'a> {
    size: usize,
    left: usize,
    source: (Walk<'a>, usize),
    target: Option<(Walk<'a>, usize)>,
    room: Option<Box<MaybeUninit<Bounce>>>,
}

impl Groups<'_> {
    /// The next group, if there is one.
    #[inline(always)]
    fn next(&mut self, group: &mut Group) -> bool {
        group.count = self.left.min(8);
        self.left -= group.count;
        if group.count == 0 {
            return false;
        }
        if group.count < 8 || !self.in_one_piece(group) {
            self.gather(group);
        }
        true
    }

    /// Eight blocks that stand one after the other in one segment, which is the usual case.
    #[inline(always)]
    fn in_one_piece(&mut self, group: &mut Group) -> bool {
        if self.source.1 != 0
            || self.target.as_ref().is_some_and(|(to, gap)| *gap != 0 || !to.has(8 * self.size))
        {
            return false;
        }
        let Some(from) = self.source.0.whole(8 * self.size) else { return false };
        group.from = std::array::from_fn(|i| from.wrapping_add(i * self.size).cast_const());
        if let Some(to) = self.target.as_mut().and_then(|(to, _)| to.whole(8 * self.size)) {
            group.to = std::array::from_fn(|i| to.wrapping_add(i * self.size));
        }
        true
    }

    /// Blocks that stand anyhow.
    #[cold]
    #[inline(never)]
    fn gather(&mut self, group: &mut Group) {
        let size = self.size;
        for i in 0..group.count {
            let (source, gap) = &mut self.source;
            let at = match source.whole(size) {
                Some(at) => at,
                None => {
                    let (at, mut done) = (bounce(&mut self.room, i), 0);
                    source.pieces(size, |piece, n| {
                        // SAFETY: the pieces are live and add up to `size`, at most what the room has.
                        unsafe { std::ptr::copy_nonoverlapping(piece, at.add(done), n) };
                        done += n;
                    });
                    at
                }
            };
            group.from[i] = at;
            source.pieces(*gap, |_, _| ());
            let Some((target, gap)) = &mut self.target else { continue };
            group.to[i] = match target.whole(size) {
                Some(to) => to,
                None => {
                    let mut done = 0;
                    target.pieces(size, |piece, n| {
                        // SAFETY: as above; `copy` does not mind where the two lie.
                        unsafe { std::ptr::copy(at.add(done), piece, n) };
                        done += n;
                    });
                    // The kernel copies it once more, to where nobody looks.
                    bounce(&mut self.room, i)
                }
            };
            target.pieces(*gap, |_, _| ());
        }
        for i in group.count..8 {
            (group.from[i], group.to[i]) = (group.from[0], group.to[0]);
        }
    }
}

/// Where the group's block `i` can stand in one piece.
fn bounce(room: &mut Option<Box<MaybeUninit<Bounce>>>, i: usize) -> *mut u8 {
    let room: *mut Bounce = room.get_or_insert_with(Box::new_uninit).as_mut_ptr();
    // SAFETY: in bounds (i < 8, or this panics); no reference to the uninitialised bytes is made.
    unsafe { (&raw mut (*room).0[i]).cast() }
}

/// Goes through all blocks of `from`, copies them to `to` if there is one, and hands the guards to the job.
///
/// # Safety
/// The processor has the engine's features. `to` has as many blocks as `from`, of the same size.
#[inline(always)]
pub(super) unsafe fn drive<E: Engine, J: Job>(
    engine: E,
    from: Blocks<'_>,
    to: Option<Blocks<'_>>,
    mut job: J,
) {
    let mut groups = Groups {
        size: from.bytes(),
        left: from.count(),
        source: (from.walk(), from.gap()),
        target: to.map(|to| (to.walk(), to.gap())),
        room: None,
    };
    let (mut group, mut index) =
        (Group { from: [std::ptr::null(); 8], to: [std::ptr::null_mut(); 8], count: 0 }, 0);
    while groups.next(&mut group) {
        // SAFETY: every place is a whole block in live memory or in the room, and the caller promises the features.
        unsafe {
            // Two sizes and two ways, each compiled by itself.
            let guards = match (groups.size, to.is_some()) {
                (512, false) => engine.guards::<512, false>(&group),
                (512, true) => engine.guards::<512, true>(&group),
                (_, false) => engine.guards::<LONGEST, false>(&group),
                (_, true) => engine.guards::<LONGEST, true>(&group),
            };
            job.take(engine, index, group.count, guards);
        }
        index += group.count;
    }
}
