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
    unsafe fn guards<const SIZE: usize, const COPY: bool>(self, group: &Group) -> Guards {
        // SAFETY: the features and the places are the caller's promise.
        unsafe {
            let mut sums = [_mm256_setzero_si256(); 4];
            for (pair, sum) in sums.iter_mut().enumerate() {
                let (first, second) = (2 * pair, 2 * pair + 1);
                if second < group.count {
                    *sum = dot_products::<SIZE, COPY>(
                        [group.from[first], group.from[second]],
                        [group.to[first], group.to[second]],
                    );
                } else if first < group.count {
                    *sum = dot_product::<SIZE, COPY>(group.from[first], group.to[first]);
                }
            }
            reduce(sums)
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
            let mask = _mm256_set1_epi64x(mask.bytes() as i64);
            let low = clear(_mm256_loadu_si256(from), tuples(guards, tags, 0), mask);
            let high = clear(_mm256_loadu_si256(from.add(1)), tuples(guards, tags, 4), mask);
            !(low | high << 4)
        }
    }
}

/// Which of four stored tuples equal four others under the mask and are not escaped, as bits.
#[inline]
#[target_feature(enable = "avx2")]
fn clear(stored: __m256i, made: __m256i, mask: __m256i) -> u8 {
    let differs = _mm256_and_si256(_mm256_xor_si256(stored, made), mask);
    let same = _mm256_cmpeq_epi64(differs, _mm256_setzero_si256());
    let escape = _mm256_set1_epi64x(super::tags::ESCAPED_APP as i64);
    let escaped = _mm256_cmpeq_epi64(_mm256_and_si256(stored, escape), escape);
    _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_andnot_si256(escaped, same))) as u8
}

/// The weights of a block's lines of 32 bytes.
#[inline]
fn weights_of<const SIZE: usize>() -> *const __m256i {
    const { assert!(SIZE <= 4096 && SIZE.is_multiple_of(64)) };
    // A pointer into the table, which has 4096 bytes.
    WEIGHTS.0.as_ptr().cast::<u8>().wrapping_add(4096 - SIZE).cast()
}

/// A line of 32 bytes times its weights, two products a lane, added to a sum; copied if so told.
///
/// # Safety
/// 32 bytes lie at `from`, at `to` if anything is copied, and at `weights`, which is aligned.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq,vpclmulqdq")]
unsafe fn line<const COPY: bool>(sum: __m256i, from: *const u8, to: *mut u8, weights: __m256i) -> __m256i {
    // Reverses each 16 bytes: the first byte is the highest.
    let reverse =
        _mm256_set_epi64x(0x0001020304050607, 0x08090a0b0c0d0e0f, 0x0001020304050607, 0x08090a0b0c0d0e0f);
    // SAFETY: as for the function.
    let data = unsafe { _mm256_loadu_si256(from.cast()) };
    if COPY {
        // SAFETY: as for the function.
        unsafe { _mm256_storeu_si256(to.cast(), data) };
    }
    let words = _mm256_shuffle_epi8(data, reverse);
    let low = _mm256_clmulepi64_epi128::<0x00>(words, weights);
    let high = _mm256_clmulepi64_epi128::<0x11>(words, weights);
    _mm256_xor_si256(sum, _mm256_xor_si256(low, high))
}

/// The sums of two blocks' words times their weights, 80 bits in each lane.
///
/// # Safety
/// `SIZE` bytes lie at all places, or at the first two if nothing is copied.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq,vpclmulqdq")]
unsafe fn dot_products<const SIZE: usize, const COPY: bool>(
    [from0, from1]: [*const u8; 2],
    [to0, to1]: [*mut u8; 2],
) -> __m256i {
    let weights = weights_of::<SIZE>();
    let (mut sum0, mut sum1) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    let mut at = 0;
    while at < SIZE {
        // SAFETY: both lines are inside the blocks, and inside the table, which is aligned. A prefetch may be of any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(from0.wrapping_add(at + AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(from1.wrapping_add(at + AHEAD).cast());
            let weight = _mm256_load_si256(weights.add(at / 32));
            sum0 = line::<COPY>(sum0, from0.add(at), to0.wrapping_add(at), weight);
            sum1 = line::<COPY>(sum1, from1.add(at), to1.wrapping_add(at), weight);
            let (at, weight) = (at + 32, _mm256_load_si256(weights.add(at / 32 + 1)));
            sum0 = line::<COPY>(sum0, from0.add(at), to0.wrapping_add(at), weight);
            sum1 = line::<COPY>(sum1, from1.add(at), to1.wrapping_add(at), weight);
        }
        at += 64;
    }
    _mm256_xor_si256(
        _mm256_permute2x128_si256::<0x20>(sum0, sum1),
        _mm256_permute2x128_si256::<0x31>(sum0, sum1),
    )
}

/// The same for one block, in the lower lane.
///
/// # Safety
/// `SIZE` bytes lie at both places, or at the first if nothing is copied.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq,vpclmulqdq")]
unsafe fn dot_product<const SIZE: usize, const COPY: bool>(from: *const u8, to: *mut u8) -> __m256i {
    let weights = weights_of::<SIZE>();
    let (mut sum0, mut sum1) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    let mut at = 0;
    while at < SIZE {
        // SAFETY: as in `dot_products`.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at + AHEAD).cast());
            let (weight0, weight1) =
                (_mm256_load_si256(weights.add(at / 32)), _mm256_load_si256(weights.add(at / 32 + 1)));
            sum0 = line::<COPY>(sum0, from.add(at), to.wrapping_add(at), weight0);
            sum1 = line::<COPY>(sum1, from.add(at + 32), to.wrapping_add(at + 32), weight1);
        }
        at += 64;
    }
    let sum = _mm256_xor_si256(sum0, sum1);
    _mm256_castsi128_si256(_mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum)))
}

/// The guards of eight blocks from their sums, two in each register: sums modulo P.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq,vpclmulqdq")]
fn reduce(sums: [__m256i; 4]) -> Guards {
    let [a, b, c, d] = [modulo(sums[0]), modulo(sums[1]), modulo(sums[2]), modulo(sums[3])];
    // The even blocks in the lower lane, the odd ones in the upper.
    let ab = _mm256_or_si256(a, _mm256_slli_epi64::<16>(b));
    let cd = _mm256_or_si256(_mm256_slli_epi64::<32>(c), _mm256_slli_epi64::<48>(d));
    let all = _mm256_or_si256(ab, cd);
    let in_order = _mm_unpacklo_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
    let swap = _mm_set_epi64x(0x0e0f_0c0d_0a0b_0809, 0x0607_0405_0203_0001);
    let mut out = Guards::default();
    // SAFETY: there are 16 bytes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_shuffle_epi8(in_order, swap)) };
    out
}

/// Two sums of 80 bits modulo P.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq,vpclmulqdq")]
fn modulo(sums: __m256i) -> __m256i {
    // The upper 16 bits come down to the lower 64.
    let down = _mm256_clmulepi64_epi128::<0x01>(sums, _mm256_set1_epi64x(X64 as i64));
    let rest = _mm256_xor_si256(sums, down);
    // The quotient by P is the upper half of the product with x^64 / P, exactly: nothing is carried.
    let quotient = _mm256_clmulepi64_epi128::<0x00>(rest, _mm256_set1_epi64x(QUOTIENT as i64));
    let multiple = _mm256_clmulepi64_epi128::<0x01>(quotient, _mm256_set1_epi64x(POLY as i64));
    let guards = _mm256_xor_si256(rest, multiple);
    _mm256_blend_epi16::<0b0000_0001>(_mm256_setzero_si256(), guards)
}

/// Four tuples, the first of which is that of block `at` (0 or 4).
#[inline]
#[target_feature(enable = "avx2")]
fn tuples(guards: Guards, tags: Tags, at: i32) -> __m256i {
    // SAFETY: the 16 bytes are read from an array of 16.
    let guards = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(guards.as_ptr().cast()) });
    // Two bytes of guard for each eight, the rest zero.
    let place = _mm256_set_epi64x(PLACES + 0x0606, PLACES + 0x0404, PLACES + 0x0202, PLACES);
    let place = _mm256_add_epi8(place, _mm256_set1_epi64x(i64::from(2 * at) * 0x0101));
    let guards = _mm256_shuffle_epi8(guards, place);
    // The tags as numbers, the reference tag below the application tag, then turned into big-endian.
    let steps = _mm256_mullo_epi32(
        _mm256_set1_epi32(tags.step as i32),
        _mm256_add_epi32(_mm256_set1_epi32(at), _mm256_set_epi32(0, 3, 0, 2, 0, 1, 0, 0)),
    );
    let reference = _mm256_add_epi32(_mm256_set1_epi32(tags.reference as i32), steps);
    let both = _mm256_blend_epi32::<0b1010_1010>(reference, _mm256_set1_epi32(i32::from(tags.app)));
    let swap =
        _mm256_set_epi64x(0x08090a0b0c0d0e0f, 0x0001020304050607, 0x08090a0b0c0d0e0f, 0x0001020304050607);
    _mm256_or_si256(guards, _mm256_shuffle_epi8(both, swap))
}

/// For `pshufb`: byte 0, byte 1, then zeros.
const PLACES: i64 = 0x8080_8080_8080_0100_u64 as i64;

/// Of x^64 by P.
const QUOTIENT: u64 = quotient_of_x64();

/// x^64 modulo P.
const X64: u16 = power(64);
