//! The guard by carry-less multiplication, 256 bits at a time: VPCLMULQDQ with AVX2.
//!
//! Every 64-bit word of a block is multiplied by its weight ([`super::weights`]), 16 bits, and the products of 80 bits
//! are added up; nothing is reduced before the block's end, and no step waits for the one before, as it does where a
//! CRC is folded. What is left at the end of a block is reduced by three multiplications, for two blocks at once.
//!
//! There is no form of 512 bits: a processor that has it (Ice Lake, Zen 4 and later) has GFNI too, which is faster.

use std::arch::x86_64::*;

use super::{
    blocks::Blocks,
    engine::{Engine, Group, Job, drive},
    tags::{Guards, Mask, Tags},
    weights::{POLY, power, quotient_of_x64},
};

/// How far ahead of the multiplications memory is asked for, in bytes.
const AHEAD: usize = 2048;

/// The weights of a block of 4096 bytes, for each 16 bytes that of the last eight and that of the first eight, which is the
/// order they have after their bytes have been reversed. A shorter block takes the table's end.
static WEIGHTS: Weights = Weights(weights());

#[repr(align(64))]
struct Weights([u64; 512]);

const fn weights() -> [u64; 512] {
    let mut out = [0; 512];
    let mut word = 0;
    while word < 512 {
        // The word is followed by this many bits of the block, and by the guard's 16.
        out[word ^ 1] = power(64 * (511 - word) + 16) as u64;
        word += 1;
    }
    out
}

/// Proof that the processor has what the kernel needs, which only [`Clmul::new`] makes.
#[derive(Clone, Copy)]
pub(super) struct Clmul(());

impl Clmul {
    /// The kernel, if this processor runs it.
    pub(super) fn new() -> Option<Clmul> {
        let features = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("pclmulqdq")
            && is_x86_feature_detected!("vpclmulqdq");
        features.then_some(Clmul(()))
    }

    /// [`drive`], compiled for the kernel's features.
    ///
    /// # Safety
    /// As of [`drive`], but for the processor's features.
    pub(super) unsafe fn run<J: Job>(self, from: Blocks<'_>, to: Option<Blocks<'_>>, job: J) {
        #[target_feature(enable = "avx2,pclmulqdq,vpclmulqdq")]
        unsafe fn with_features<J: Job>(engine: Clmul, from: Blocks<'_>, to: Option<Blocks<'_>>, job: J) {
            // SAFETY: the features are those of this function; the rest is its caller's promise.
            unsafe { drive(engine, from, to, job) }
        }
        // SAFETY: `self` proves the features; the rest is the caller's promise.
        unsafe { with_features(self, from, to, job) }
    }
}

impl Engine for Clmul {
    #[inline(always)]
    unsafe fn guards<const COPY: bool>(self, group: &Group, size: usize) -> Guards {
        // SAFETY: the features and the places are the caller's promise; the table is read inside its bounds, because
        // `size` is 4096 at most.
        unsafe {
            let weights = WEIGHTS.0.as_ptr().cast::<u8>().add(4096 - size);
            // Reverses each 16 bytes: the first byte is the highest.
            let reverse = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0001020304050607, 0x08090a0b0c0d0e0f));
            let mut sums = [_mm_setzero_si128(); 8];
            for i in 0..group.count {
                let (from, to) = (group.from[i], group.to[i]);
                let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                for at in (0..size).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at + AHEAD).cast());
                    for at in [at, at + 32] {
                        let data = _mm256_loadu_si256(from.add(at).cast());
                        if COPY {
                            _mm256_storeu_si256(to.add(at).cast(), data);
                        }
                        let words = _mm256_shuffle_epi8(data, reverse);
                        let weight = _mm256_load_si256(weights.add(at).cast());
                        low = _mm256_xor_si256(low, _mm256_clmulepi64_epi128::<0x00>(words, weight));
                        high = _mm256_xor_si256(high, _mm256_clmulepi64_epi128::<0x11>(words, weight));
                    }
                }
                let sum = _mm256_xor_si256(low, high);
                sums[i] = _mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            }
            let mut out = Guards::default();
            for (pair, out) in sums.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<4>().0) {
                let [first, second] = reduce(_mm256_set_m128i(pair[1], pair[0]));
                *out = (u32::from(first) << 16 | u32::from(second)).to_be_bytes();
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn put(self, guards: Guards, tags: Tags, out: &mut [u8; 64]) {
        // SAFETY: the features are the caller's promise; each half of the line is 32 bytes.
        unsafe {
            let to = out.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(to, tuples(guards, tags, 0));
            _mm256_storeu_si256(to.add(1), tuples(guards, tags, 4));
        }
    }

    #[inline(always)]
    unsafe fn suspects(self, guards: Guards, tags: Tags, mask: Mask, stored: &[u8; 64]) -> u8 {
        // SAFETY: as in `put`.
        unsafe {
            let from = stored.as_ptr().cast::<__m256i>();
            let (mask, zero) = (_mm256_set1_epi64x(mask.bytes() as i64), _mm256_setzero_si256());
            let escape = _mm256_set1_epi64x(super::tags::ESCAPED_APP as i64);
            let half = |at: usize| {
                let stored = _mm256_loadu_si256(from.add(at / 4));
                let differs = _mm256_and_si256(_mm256_xor_si256(stored, tuples(guards, tags, at)), mask);
                let same = _mm256_cmpeq_epi64(differs, zero);
                let escaped = _mm256_cmpeq_epi64(_mm256_and_si256(stored, escape), escape);
                _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_andnot_si256(escaped, same))) as u8
            };
            !(half(0) | half(4) << 4)
        }
    }
}

/// Four tuples, the first of which is that of block `at` (0 or 4).
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn tuples(guards: Guards, tags: Tags, at: usize) -> __m256i {
    // SAFETY: as for the function; the 16 bytes are read from an array of 16.
    unsafe {
        let guards = _mm256_broadcastsi128_si256(_mm_loadu_si128(guards.as_ptr().cast()));
        let first = (2 * at) as i64;
        // Two bytes of guard for each eight, the rest zero.
        let place = |n: i64| (-1i64 << 16) | (first + 2 * n) | (first + 2 * n + 1) << 8;
        let guards = _mm256_shuffle_epi8(guards, _mm256_set_epi64x(place(3), place(2), place(1), place(0)));
        // The tags as numbers, the reference tag below the application tag, then turned into big-endian.
        let fixed = _mm256_set1_epi64x(i64::from(tags.app) << 32);
        let steps = _mm256_mullo_epi32(
            _mm256_set1_epi32(tags.step as i32),
            _mm256_add_epi32(_mm256_set1_epi32(at as i32), _mm256_set_epi32(0, 3, 0, 2, 0, 1, 0, 0)),
        );
        let reference = _mm256_add_epi32(_mm256_set1_epi32(tags.reference as i32), steps);
        let reference = _mm256_blend_epi32::<0b1010_1010>(reference, fixed);
        let swap = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x08090a0b0c0d0e0f, 0x0001020304050607));
        _mm256_or_si256(guards, _mm256_shuffle_epi8(reference, swap))
    }
}

/// Two sums of 80 bits modulo P.
///
/// # Safety
/// The processor has AVX2 and VPCLMULQDQ.
#[inline(always)]
unsafe fn reduce(sums: __m256i) -> [u16; 2] {
    const X64: i64 = power(64) as i64;
    // SAFETY: as for the function.
    unsafe {
        // The upper 16 bits come down to the lower 64.
        let down = _mm256_clmulepi64_epi128::<0x01>(sums, _mm256_set1_epi64x(X64));
        let rest = _mm256_xor_si256(sums, down);
        // The quotient by P is the upper half of the product with x^64 / P, exactly: nothing is carried.
        let quotient = _mm256_clmulepi64_epi128::<0x00>(rest, _mm256_set1_epi64x(quotient_of_x64() as i64));
        let multiple = _mm256_clmulepi64_epi128::<0x01>(quotient, _mm256_set1_epi64x(POLY as i64));
        let guards = _mm256_xor_si256(rest, multiple);
        [_mm256_extract_epi16::<0>(guards) as u16, _mm256_extract_epi16::<8>(guards) as u16]
    }
}
