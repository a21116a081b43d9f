//! The guard by bit matrices: GFNI on 512-bit registers, eight stretches of 512 bytes at once.
//!
//! Multiplying a byte by a constant modulo P is linear in its bits: for each of the product's two bytes an 8×8 bit matrix,
//! and `vgf2p8affineqb` multiplies 64 bytes by eight matrices at a time, one for each 64-bit word. So:
//!
//! 1. Of each line of 64 bytes, every word gets the matrices of its distance from the end of the stretch, as if each of the
//!    word's bytes were its last. The results of all eight lines are added up: `high` and `low`, 64 bytes each.
//! 2. The eight words of `high` are added up, and those of `low`, for eight stretches at once, in a tree of unpacks and lane
//!    shuffles: word s of what comes out belongs to stretch s.
//! 3. For blocks of 4096 bytes, word s gets the matrices of x^(4096 (7 − s)), and the eight are added up: the same two
//!    words for eight stretches as before for one.
//! 4. The bytes are transposed, so that word b holds byte b of all eight, and get the matrices of x^(8 (7 − b)), which step 1
//!    has left out. The eight words are added up: the eight high bytes and the eight low bytes of the guards.
//!
//! A line costs a load, two matrix products and a three-way XOR; the sixteen registers of matrices stay where they are. The sequence
//! is written over [`Lanes`], so that it runs without AVX-512 too, as slowly as that goes, in tests.

use super::{
    engine::{Engine, Group},
    lanes::Lanes,
    tags::{ESCAPED_APP, Guards, Mask, Tags},
    weights::{matrices, power},
};

/// Bytes that step 1 sees as one: eight lines.
const STRETCH: usize = 512;

/// How far ahead of the matrices memory is asked for, in bytes.
const AHEAD: usize = 8192;

/// Step 1: for each line the matrices of its words, for the high byte and for the low byte.
static LINES: [[[u64; 8]; 2]; 8] = {
    let mut out = [[[0; 8]; 2]; 8];
    let mut line = 0;
    while line < 8 {
        let mut word = 0;
        while word < 8 {
            let [high, low] = matrices(power(8 * (504 - 64 * line - 8 * word) + 16), 0);
            (out[line][0][word], out[line][1][word]) = (high, low);
            word += 1;
        }
        line += 1;
    }
    out
};

/// The matrices of a step that takes a high and a low byte to a high and a low byte, word s multiplied by x^(`bits` (7 − s)):
/// high to high, high to low, low to high, low to low.
const fn steps(bits: usize) -> [[u64; 8]; 4] {
    let mut out = [[0; 8]; 4];
    let mut word = 0;
    while word < 8 {
        let weight = power(bits * (7 - word));
        let ([hh, hl], [lh, ll]) = (matrices(weight, 8), matrices(weight, 0));
        (out[0][word], out[1][word], out[2][word], out[3][word]) = (hh, hl, lh, ll);
        word += 1;
    }
    out
}

/// Step 3.
static STRETCHES: [[u64; 8]; 4] = steps(8 * STRETCH);

/// Step 4.
static BYTES: [[u64; 8]; 4] = steps(8);

/// Step 4: byte 8 b + s comes from byte 8 s + b.
static TRANSPOSE: [u8; 64] = {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = (i % 8 * 8 + i / 8) as u8;
        i += 1;
    }
    out
};

/// Two bytes of guard for each word, the rest zero.
static SPREAD: [u8; 64] = {
    let mut out = [0x80; 64];
    let mut word = 0;
    while word < 8 {
        (out[8 * word], out[8 * word + 1]) = (2 * word as u8, 2 * word as u8 + 1);
        word += 1;
    }
    out
};

/// The bytes of each word, turned round.
const SWAP: [u8; 16] = [7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8];

/// The kernel over an implementation of its operations, with the matrices of step 1 at hand.
#[derive(Clone, Copy)]
pub(super) struct Gfni<L>([[L; 2]; 8]);

impl<L: Lanes> Gfni<L> {
    /// The kernel, with its matrices in registers.
    ///
    /// # Safety
    /// [`Lanes`]' features.
    #[inline(always)]
    unsafe fn ready() -> Gfni<L> {
        // SAFETY: as for the function; whatever the lanes are made of, the array is overwritten whole.
        unsafe {
            let mut lines = [[L::splat(0); 2]; 8];
            for (line, from) in lines.iter_mut().zip(&LINES) {
                *line = [L::words(&from[0]).kept(), L::words(&from[1]).kept()];
            }
            Gfni(lines)
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod native {
    use super::{
        super::{
            blocks::Blocks,
            engine::{Job, drive},
        },
        Gfni,
    };
    use std::arch::x86_64::__m512i;

    /// Proof that the processor has what the kernel needs, which only [`Native::new`] makes.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Native(());

    impl Native {
        /// The kernel, if this processor runs it.
        pub(in super::super) fn new() -> Option<Native> {
            let features = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("gfni");
            features.then_some(Native(()))
        }

        /// [`drive`], compiled for the kernel's features.
        ///
        /// # Safety
        /// As of [`drive`], but for the processor's features.
        pub(in super::super) unsafe fn run<J: Job>(self, from: Blocks<'_>, to: Option<Blocks<'_>>, job: J) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
            unsafe fn with_features<J: Job>(from: Blocks<'_>, to: Option<Blocks<'_>>, job: J) {
                // SAFETY: the features are those of this function; the rest is its caller's promise.
                unsafe { drive(Gfni::<__m512i>::ready(), from, to, job) }
            }
            // SAFETY: `self` proves the features; the rest is the caller's promise.
            unsafe { with_features(from, to, job) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use native::Native;

#[cfg(test)]
impl Gfni<super::lanes::Plain> {
    /// The same sequence on any processor.
    pub(super) fn plain() -> Self {
        // SAFETY: these lanes need no features.
        unsafe { Gfni::ready() }
    }
}

impl<L: Lanes> Engine for Gfni<L> {
    #[inline(always)]
    unsafe fn guards<const SIZE: usize, const COPY: bool>(self, group: &Group) -> Guards {
        // SAFETY: the features and the places are the caller's promise.
        unsafe {
            if SIZE == STRETCH {
                return finish(sums::<L, COPY>(&self.0, &group.from, &group.to));
            }
            let (mut high, mut low) = ([0; 8], [0; 8]);
            for i in 0..group.count {
                let (from, to) = (group.from[i], group.to[i]);
                let mut stretches = ([from; 8], [to; 8]);
                for s in 1..8 {
                    stretches.0[s] = from.add(STRETCH * s);
                    stretches.1[s] = to.wrapping_add(STRETCH * s);
                }
                let both = multiplied(sums::<L, COPY>(&self.0, &stretches.0, &stretches.1), &STRETCHES);
                let sums = u128::from_le_bytes(added_up(both).first_lane());
                (high[i], low[i]) = (sums as u64, (sums >> 64) as u64);
            }
            finish((L::words(&high), L::words(&low)))
        }
    }

    #[inline(always)]
    unsafe fn put(self, guards: Guards, tags: Tags, out: &mut [u8; 64]) {
        // SAFETY: the features are the caller's promise.
        unsafe { tuples::<L>(guards, tags).store(out.as_mut_ptr()) }
    }

    #[inline(always)]
    unsafe fn suspects(self, guards: Guards, tags: Tags, mask: Mask, stored: &[u8; 64]) -> u8 {
        // SAFETY: the features are the caller's promise.
        unsafe {
            let stored = L::load(stored.as_ptr());
            let differ = stored.xor(tuples::<L>(guards, tags)).and(L::splat(mask.bytes()));
            let escape = L::splat(ESCAPED_APP);
            differ.words_that_differ(L::splat(0)) | !stored.and(escape).words_that_differ(escape)
        }
    }
}

/// Steps 1 and 2 for eight stretches.
///
/// # Safety
/// [`Lanes`]' features; 512 bytes at every place, and at those to copy to if anything is copied.
#[inline(always)]
unsafe fn sums<L: Lanes, const COPY: bool>(
    by: &[[L; 2]; 8],
    from: &[*const u8; 8],
    to: &[*mut u8; 8],
) -> (L, L) {
    // SAFETY: as for the function.
    unsafe {
        let ((h0, l0), (h1, l1)) = (four::<L, COPY, 0>(by, from, to), four::<L, COPY, 4>(by, from, to));
        (lanes(h0, h1), lanes(l0, l1))
    }
}

/// Part of the tree: the stretches `S` to `S` + 3. (A function, as all here, for the sake of `inline(always)`: a closure
/// may be left without the features of the place where it stands.)
///
/// # Safety
/// As of [`sums`].
#[inline(always)]
unsafe fn four<L: Lanes, const COPY: bool, const S: usize>(
    by: &[[L; 2]; 8],
    from: &[*const u8; 8],
    to: &[*mut u8; 8],
) -> (L, L) {
    // SAFETY: as for the function.
    unsafe {
        let (h0, l0) = stretch::<L, COPY>(by, from[S], to[S]);
        let (h1, l1) = stretch::<L, COPY>(by, from[S + 1], to[S + 1]);
        let (h01, l01) = (pairs(h0, h1), pairs(l0, l1));
        let (h2, l2) = stretch::<L, COPY>(by, from[S + 2], to[S + 2]);
        let (h3, l3) = stretch::<L, COPY>(by, from[S + 3], to[S + 3]);
        (lanes(h01, pairs(h2, h3)), lanes(l01, pairs(l2, l3)))
    }
}

/// Step 1 for one stretch.
///
/// # Safety
/// [`Lanes`]' features; 512 bytes at both places, or at the first if nothing is copied.
#[inline(always)]
unsafe fn stretch<L: Lanes, const COPY: bool>(by: &[[L; 2]; 8], from: *const u8, to: *mut u8) -> (L, L) {
    // SAFETY: as for the function.
    unsafe {
        let (h0, l0) = line::<L, COPY, 0>(by, from, to);
        let (h1, l1) = line::<L, COPY, 1>(by, from, to);
        let (h2, l2) = line::<L, COPY, 2>(by, from, to);
        let (high, low) = (h0.xor3(h1, h2), l0.xor3(l1, l2));
        let (h0, l0) = line::<L, COPY, 3>(by, from, to);
        let (h1, l1) = line::<L, COPY, 4>(by, from, to);
        let (high, low) = (high.xor3(h0, h1), low.xor3(l0, l1));
        let (h0, l0) = line::<L, COPY, 5>(by, from, to);
        let (h1, l1) = line::<L, COPY, 6>(by, from, to);
        let (high, low) = (high.xor3(h0, h1), low.xor3(l0, l1));
        let (h0, l0) = line::<L, COPY, 7>(by, from, to);
        (high.xor(h0), low.xor(l0))
    }
}

/// Step 1 for the line `N` of a stretch.
///
/// # Safety
/// As of [`stretch`].
#[inline(always)]
unsafe fn line<L: Lanes, const COPY: bool, const N: usize>(
    by: &[[L; 2]; 8],
    from: *const u8,
    to: *mut u8,
) -> (L, L) {
    // SAFETY: as for the function.
    unsafe {
        L::ask_for(from.wrapping_add(64 * N + AHEAD));
        let data = L::load(from.add(64 * N));
        if COPY {
            data.store(to.add(64 * N));
        }
        (data.affine(by[N][0]), data.affine(by[N][1]))
    }
}

/// In each lane: the sum of the words of `a`, then that of `b`.
///
/// # Safety
/// [`Lanes`]' features.
#[inline(always)]
unsafe fn pairs<L: Lanes>(a: L, b: L) -> L {
    // SAFETY: as for the function.
    unsafe { a.low_words(b).xor(a.high_words(b)) }
}

/// The sums of lanes 0 and 1 of `a`, of lanes 2 and 3, and the same of `b`.
///
/// # Safety
/// [`Lanes`]' features.
#[inline(always)]
unsafe fn lanes<L: Lanes>(a: L, b: L) -> L {
    // SAFETY: as for the function.
    unsafe { a.even_lanes(b).xor(a.odd_lanes(b)) }
}

/// High and low bytes through the matrices of a step.
///
/// # Safety
/// [`Lanes`]' features.
#[inline(always)]
unsafe fn multiplied<L: Lanes>((high, low): (L, L), [hh, hl, lh, ll]: &[[u64; 8]; 4]) -> (L, L) {
    // SAFETY: as for the function.
    unsafe {
        let [hh, hl, lh, ll] = [L::words(hh), L::words(hl), L::words(lh), L::words(ll)];
        (high.affine(hh).xor(low.affine(lh)), high.affine(hl).xor(low.affine(ll)))
    }
}

/// In every lane: the sum of all words of `high`, then that of `low`.
///
/// # Safety
/// [`Lanes`]' features.
#[inline(always)]
unsafe fn added_up<L: Lanes>((high, low): (L, L)) -> L {
    // SAFETY: as for the function.
    unsafe {
        let sums = pairs(high, low);
        let sums = lanes(sums, sums);
        lanes(sums, sums)
    }
}

/// Step 4.
///
/// # Safety
/// [`Lanes`]' features.
#[inline(always)]
unsafe fn finish<L: Lanes>((high, low): (L, L)) -> Guards {
    const PAIRED: [u8; 16] = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];
    // SAFETY: as for the function; the table has 64 bytes.
    unsafe {
        let transpose = L::load(TRANSPOSE.as_ptr());
        let both = multiplied((high.permute(transpose), low.permute(transpose)), &BYTES);
        added_up(both).shuffle(L::in_every_lane(PAIRED)).first_lane()
    }
}

/// A line of eight tuples.
///
/// # Safety
/// [`Lanes`]' features.
#[inline(always)]
unsafe fn tuples<L: Lanes>(guards: Guards, tags: Tags) -> L {
    // SAFETY: as for the function; the table has 64 bytes.
    unsafe {
        let mut growth = [0; 8];
        for (n, word) in growth.iter_mut().enumerate() {
            *word = u64::from(tags.after(n).reference.wrapping_sub(tags.reference));
        }
        // As numbers, the reference tag below the application tag; then turned into big-endian.
        let first = L::splat(u64::from(tags.app) << 32 | u64::from(tags.reference));
        let tags = first.add_halves(L::words(&growth)).shuffle(L::in_every_lane(SWAP));
        L::in_every_lane(guards).shuffle(L::load(SPREAD.as_ptr())).or(tags)
    }
}
