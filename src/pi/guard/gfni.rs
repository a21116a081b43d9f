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

use std::marker::PhantomData;

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

/// The kernel over an implementation of its operations.
#[derive(Clone, Copy)]
pub(super) struct Gfni<L>(PhantomData<L>);

#[cfg(target_arch = "x86_64")]
mod native {
    use super::{
        super::{
            blocks::Blocks,
            engine::{Job, drive},
        },
        Gfni,
    };
    use std::{arch::x86_64::__m512i, marker::PhantomData};

    impl Gfni<__m512i> {
        /// The kernel, if this processor runs it.
        pub(in super::super) fn new() -> Option<Self> {
            let features = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("gfni");
            features.then_some(Gfni(PhantomData))
        }

        /// [`drive`], compiled for the kernel's features.
        ///
        /// # Safety
        /// As of [`drive`], but for the processor's features.
        pub(in super::super) unsafe fn run<J: Job>(self, from: Blocks<'_>, to: Option<Blocks<'_>>, job: J) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
            unsafe fn with_features<J: Job>(
                engine: Gfni<__m512i>,
                from: Blocks<'_>,
                to: Option<Blocks<'_>>,
                job: J,
            ) {
                // SAFETY: the features are those of this function; the rest is its caller's promise.
                unsafe { drive(engine, from, to, job) }
            }
            // SAFETY: only `new` makes a `self`, which proves the features; the rest is the caller's promise.
            unsafe { with_features(self, from, to, job) }
        }
    }
}

#[cfg(test)]
impl Gfni<super::lanes::Plain> {
    /// The same sequence on any processor.
    pub(super) const PLAIN: Self = Gfni(PhantomData);
}

impl<L: Lanes> Engine for Gfni<L> {
    #[inline(always)]
    unsafe fn guards<const COPY: bool>(self, group: &Group, size: usize) -> Guards {
        // SAFETY: the features and the places are the caller's promise.
        unsafe {
            if size == STRETCH {
                return finish(sums::<L, COPY>(|s| (group.from[s], group.to[s])));
            }
            let (mut high, mut low) = ([0; 8], [0; 8]);
            for i in 0..group.count {
                let (from, to) = (group.from[i], group.to[i]);
                let at = |s: usize| (from.add(STRETCH * s), to.wrapping_add(STRETCH * s));
                let both = multiplied(sums::<L, COPY>(at), &STRETCHES);
                let sums = u128::from_le_bytes(added_up(both).first_lane());
                (high[i], low[i]) = (sums as u64, (sums >> 64) as u64);
            }
            finish((L::words(high), L::words(low)))
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

/// Steps 1 and 2 for eight stretches. `at` says where stretch s lies, and where it goes.
///
/// # Safety
/// [`Lanes`]' features; 512 bytes at every place.
#[inline(always)]
unsafe fn sums<L: Lanes, const COPY: bool>(at: impl Fn(usize) -> (*const u8, *mut u8)) -> (L, L) {
    // SAFETY: as for the function. (Closures in place of functions, because they have the features of where they stand.)
    unsafe {
        let two = |s: usize| {
            let ((h0, l0), (h1, l1)) = (stretch::<L, COPY>(at(s)), stretch::<L, COPY>(at(s + 1)));
            (pairs(h0, h1), pairs(l0, l1))
        };
        let four = |s: usize| {
            let ((h0, l0), (h1, l1)) = (two(s), two(s + 2));
            (lanes(h0, h1), lanes(l0, l1))
        };
        let ((h0, l0), (h1, l1)) = (four(0), four(4));
        (lanes(h0, h1), lanes(l0, l1))
    }
}

/// Step 1 for one stretch.
///
/// # Safety
/// [`Lanes`]' features; 512 bytes at both places, or at the first if nothing is copied.
#[inline(always)]
unsafe fn stretch<L: Lanes, const COPY: bool>((from, to): (*const u8, *mut u8)) -> (L, L) {
    // SAFETY: as for the function.
    unsafe {
        let line = |n: usize| {
            L::ask_for(from.wrapping_add(64 * n + AHEAD));
            let data = L::load(from.add(64 * n));
            if COPY {
                data.store(to.add(64 * n));
            }
            let [high, low] = &LINES[n];
            (data.affine(L::words(*high)), data.affine(L::words(*low)))
        };
        let ((h0, l0), (h1, l1), (h2, l2)) = (line(0), line(1), line(2));
        let (mut high, mut low) = (h0.xor3(h1, h2), l0.xor3(l1, l2));
        for n in [3, 5] {
            let ((h0, l0), (h1, l1)) = (line(n), line(n + 1));
            (high, low) = (high.xor3(h0, h1), low.xor3(l0, l1));
        }
        let (h, l) = line(7);
        (high.xor(h), low.xor(l))
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
        let [hh, hl, lh, ll] = [L::words(*hh), L::words(*hl), L::words(*lh), L::words(*ll)];
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
        let tags = first.add_halves(L::words(growth)).shuffle(L::in_every_lane(SWAP));
        L::in_every_lane(guards).shuffle(L::load(SPREAD.as_ptr())).or(tags)
    }
}
