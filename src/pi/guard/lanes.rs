//! The few operations on 64 bytes that [`super::gfni`] is made of, as a trait: once by AVX-512's instructions, once in
//! plain Rust ([`Plain`]), so that a processor without them can still run the very same sequence in tests.

/// 64 bytes, or eight 64-bit words, or four lanes of 128 bits.
pub(super) trait Lanes: Copy {
    /// The bytes at a place, which need not be aligned.
    ///
    /// # Safety
    /// 64 bytes can be read there; the processor has the features of the implementation (as for all that follow).
    unsafe fn load(from: *const u8) -> Self;
    /// Puts the bytes to a place, which need not be aligned.
    ///
    /// # Safety
    /// 64 bytes can be written there.
    unsafe fn store(self, to: *mut u8);
    /// Eight words.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn words(words: &[u64; 8]) -> Self;
    /// Eight times the same word.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn splat(word: u64) -> Self;
    /// The sums of the sixteen 32-bit halves of words, modulo 2^32.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn add_halves(self, b: Self) -> Self;
    /// Sixteen bytes in every lane.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn in_every_lane(bytes: [u8; 16]) -> Self;
    /// The first 16 bytes.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn first_lane(self) -> [u8; 16];
    /// The same, and the compiler no longer knows from where it came: it stays in a register, where else it might be loaded
    /// again for every use.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn kept(self) -> Self;
    /// Bitwise exclusive or.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn xor(self, b: Self) -> Self;
    /// Exclusive or of three (`vpternlogq`).
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn xor3(self, b: Self, c: Self) -> Self;
    /// Every byte times the 8×8 matrix in the same word of `matrices` (`vgf2p8affineqb`): bit i of the result is the parity of
    /// the byte under byte 7 − i of the matrix.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn affine(self, matrices: Self) -> Self;
    /// In each lane the lower word of both (`vpunpcklqdq`).
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn low_words(self, b: Self) -> Self;
    /// In each lane the upper word of both (`vpunpckhqdq`).
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn high_words(self, b: Self) -> Self;
    /// Lanes 0 and 2 of both, in this order (`vshufi64x2`).
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn even_lanes(self, b: Self) -> Self;
    /// Lanes 1 and 3 of both, in this order (`vshufi64x2`).
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn odd_lanes(self, b: Self) -> Self;
    /// Byte i of the result is the byte that `from[i] % 64` names (`vpermb`).
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn permute(self, from: Self) -> Self;
    /// In each lane, byte i of the result is the lane's byte that `from[i] % 16` names, or 0 where `from[i]` is 80h or more
    /// (`vpshufb`).
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn shuffle(self, from: Self) -> Self;
    /// Bitwise and.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn and(self, b: Self) -> Self;
    /// Bitwise or.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn or(self, b: Self) -> Self;
    /// Which words differ, as bits.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn words_that_differ(self, b: Self) -> u8;
    /// Asks for the memory at a place, which need not exist.
    ///
    /// # Safety
    /// The processor's features.
    unsafe fn ask_for(at: *const u8);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Lanes;
    use std::arch::x86_64::*;

    impl Lanes for __m512i {
        #[inline(always)]
        unsafe fn load(from: *const u8) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut u8) {
            // SAFETY: the trait's promise.
            unsafe { _mm512_storeu_si512(to.cast(), self) }
        }

        #[inline(always)]
        unsafe fn words(words: &[u64; 8]) -> Self {
            // SAFETY: the trait's promise; the array has 64 bytes.
            unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
        }

        #[inline(always)]
        unsafe fn splat(word: u64) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_set1_epi64(word as i64) }
        }

        #[inline(always)]
        unsafe fn add_halves(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_add_epi32(self, b) }
        }

        #[inline(always)]
        unsafe fn in_every_lane(bytes: [u8; 16]) -> Self {
            // SAFETY: the trait's promise; the array has 16 bytes.
            unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().cast())) }
        }

        #[inline(always)]
        unsafe fn first_lane(self) -> [u8; 16] {
            let mut out = [0; 16];
            // SAFETY: the trait's promise; the array has 16 bytes.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_castsi512_si128(self)) }
            out
        }

        #[inline(always)]
        unsafe fn kept(self) -> Self {
            #[inline]
            #[target_feature(enable = "avx512f")]
            unsafe fn keep(mut lanes: __m512i) -> __m512i {
                // SAFETY: no instruction at all.
                unsafe {
                    std::arch::asm!("/* {0} */", inout(zmm_reg) lanes, options(pure, nomem, nostack, preserves_flags));
                }
                lanes
            }
            // SAFETY: the trait's promise.
            unsafe { keep(self) }
        }

        #[inline(always)]
        unsafe fn xor(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_xor_si512(self, b) }
        }

        #[inline(always)]
        unsafe fn xor3(self, b: Self, c: Self) -> Self {
            // SAFETY: the trait's promise. 96h is the truth table of a ^ b ^ c.
            unsafe { _mm512_ternarylogic_epi64::<0x96>(self, b, c) }
        }

        #[inline(always)]
        unsafe fn affine(self, matrices: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_gf2p8affine_epi64_epi8::<0>(self, matrices) }
        }

        #[inline(always)]
        unsafe fn low_words(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_unpacklo_epi64(self, b) }
        }

        #[inline(always)]
        unsafe fn high_words(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_unpackhi_epi64(self, b) }
        }

        #[inline(always)]
        unsafe fn even_lanes(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_shuffle_i64x2::<0b10_00_10_00>(self, b) }
        }

        #[inline(always)]
        unsafe fn odd_lanes(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_shuffle_i64x2::<0b11_01_11_01>(self, b) }
        }

        #[inline(always)]
        unsafe fn permute(self, from: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_permutexvar_epi8(from, self) }
        }

        #[inline(always)]
        unsafe fn shuffle(self, from: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_shuffle_epi8(self, from) }
        }

        #[inline(always)]
        unsafe fn and(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_and_si512(self, b) }
        }

        #[inline(always)]
        unsafe fn or(self, b: Self) -> Self {
            // SAFETY: the trait's promise.
            unsafe { _mm512_or_si512(self, b) }
        }

        #[inline(always)]
        unsafe fn words_that_differ(self, b: Self) -> u8 {
            // SAFETY: the trait's promise.
            unsafe { _mm512_cmpneq_epi64_mask(self, b) }
        }

        #[inline(always)]
        unsafe fn ask_for(at: *const u8) {
            // SAFETY: the trait's promise; a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
    }
}

/// The operations in plain Rust, as the manuals describe the instructions (Intel SDM volume 2).
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plain([u8; 64]);

#[cfg(test)]
mod plain {
    use super::{Lanes, Plain};
    use std::array::from_fn;

    impl Plain {
        fn word(self, i: usize) -> u64 {
            u64::from_le_bytes(from_fn(|k| self.0[8 * i + k]))
        }

        fn from_words(word: impl Fn(usize) -> u64) -> Plain {
            Plain(from_fn(|i| word(i / 8).to_le_bytes()[i % 8]))
        }

        fn lanes(self, b: Plain, [l0, l1]: [usize; 2]) -> Plain {
            let lanes = [(self, l0), (self, l1), (b, l0), (b, l1)];
            Plain(from_fn(|i| {
                let (of, lane) = lanes[i / 16];
                of.0[16 * lane + i % 16]
            }))
        }
    }

    // Never inlined: the kernel is one function of a hundred of these, which is nothing in instructions, and minutes of compiling
    // in loops.
    impl Lanes for Plain {
        #[inline(never)]
        unsafe fn load(from: *const u8) -> Self {
            // SAFETY: the trait's promise.
            Plain(unsafe { from.cast::<[u8; 64]>().read_unaligned() })
        }

        #[inline(never)]
        unsafe fn store(self, to: *mut u8) {
            // SAFETY: the trait's promise.
            unsafe { to.cast::<[u8; 64]>().write_unaligned(self.0) }
        }

        #[inline(never)]
        unsafe fn words(words: &[u64; 8]) -> Self {
            Plain::from_words(|i| words[i])
        }

        #[inline(never)]
        unsafe fn splat(word: u64) -> Self {
            Plain::from_words(|_| word)
        }

        #[inline(never)]
        unsafe fn add_halves(self, b: Self) -> Self {
            Plain::from_words(|i| {
                let half = |shift: u32| (self.word(i) >> shift) as u32;
                let other = |shift: u32| (b.word(i) >> shift) as u32;
                let sum = |shift| u64::from(half(shift).wrapping_add(other(shift)));
                sum(32) << 32 | sum(0)
            })
        }

        #[inline(never)]
        unsafe fn in_every_lane(bytes: [u8; 16]) -> Self {
            Plain(from_fn(|i| bytes[i % 16]))
        }

        #[inline(never)]
        unsafe fn first_lane(self) -> [u8; 16] {
            from_fn(|i| self.0[i])
        }

        #[inline(never)]
        unsafe fn kept(self) -> Self {
            self
        }

        #[inline(never)]
        unsafe fn xor(self, b: Self) -> Self {
            Plain(from_fn(|i| self.0[i] ^ b.0[i]))
        }

        #[inline(never)]
        unsafe fn xor3(self, b: Self, c: Self) -> Self {
            Plain(from_fn(|i| self.0[i] ^ b.0[i] ^ c.0[i]))
        }

        #[inline(never)]
        unsafe fn affine(self, matrices: Self) -> Self {
            Plain(from_fn(|i| {
                let row = |bit: usize| matrices.0[i / 8 * 8 + 7 - bit];
                (0..8).fold(0, |out, bit| out | ((self.0[i] & row(bit)).count_ones() as u8 & 1) << bit)
            }))
        }

        #[inline(never)]
        unsafe fn low_words(self, b: Self) -> Self {
            Plain::from_words(|i| if i % 2 == 0 { self.word(i) } else { b.word(i - 1) })
        }

        #[inline(never)]
        unsafe fn high_words(self, b: Self) -> Self {
            Plain::from_words(|i| if i % 2 == 0 { self.word(i + 1) } else { b.word(i) })
        }

        #[inline(never)]
        unsafe fn even_lanes(self, b: Self) -> Self {
            self.lanes(b, [0, 2])
        }

        #[inline(never)]
        unsafe fn odd_lanes(self, b: Self) -> Self {
            self.lanes(b, [1, 3])
        }

        #[inline(never)]
        unsafe fn permute(self, from: Self) -> Self {
            Plain(from_fn(|i| self.0[usize::from(from.0[i] % 64)]))
        }

        #[inline(never)]
        unsafe fn shuffle(self, from: Self) -> Self {
            Plain(from_fn(|i| match from.0[i] {
                0x80.. => 0,
                k => self.0[i / 16 * 16 + usize::from(k % 16)],
            }))
        }

        #[inline(never)]
        unsafe fn and(self, b: Self) -> Self {
            Plain(from_fn(|i| self.0[i] & b.0[i]))
        }

        #[inline(never)]
        unsafe fn or(self, b: Self) -> Self {
            Plain(from_fn(|i| self.0[i] | b.0[i]))
        }

        #[inline(never)]
        unsafe fn words_that_differ(self, b: Self) -> u8 {
            (0..8).fold(0, |out, i| out | u8::from(self.word(i) != b.word(i)) << i)
        }

        #[inline(never)]
        unsafe fn ask_for(_: *const u8) {}
    }
}
