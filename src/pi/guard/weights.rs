//! The constants of the wide kernels, computed by the compiler from the polynomial alone.
//!
//! A guard is linear: it is the sum (XOR) over the parts of a block of each part times x to its distance from the end
//! of the block, plus 16, modulo P = x^16 + 8BB7h. Such a power of x is a number of 16 bits that depends on the position
//! only, a *weight*; so a guard is a dot product of the block with a constant vector. [`super::clmul`] multiplies by
//! weights with carry-less multiplication, [`super::gfni`] with 8×8 bit matrices. Bit k of a number here is the
//! coefficient of x^k.

/// P without its leading term.
pub(super) const POLY: u16 = 0x8bb7;

/// `a` times x, modulo P.
const fn times_x(a: u16) -> u16 {
    (a << 1) ^ if a & 0x8000 != 0 { POLY } else { 0 }
}

/// `a` times `b`, modulo P.
pub(super) const fn times(a: u16, b: u16) -> u16 {
    let (mut sum, mut bit) = (0, 16);
    while bit > 0 {
        bit -= 1;
        sum = times_x(sum);
        if b >> bit & 1 != 0 {
            sum ^= a;
        }
    }
    sum
}

/// x to the `n`, modulo P.
pub(super) const fn power(n: usize) -> u16 {
    let (mut result, mut square, mut left) = (1, 2, n);
    while left > 0 {
        if left & 1 != 0 {
            result = times(result, square);
        }
        square = times(square, square);
        left >>= 1;
    }
    result
}

/// The quotient of x^64 by P, 49 bits: with it the quotient of any 64-bit number is one multiplication (Barrett).
pub(super) const fn quotient_of_x64() -> u64 {
    let mut rest: u128 = 1 << 64;
    let (mut quotient, mut k) = (0, 49);
    while k > 0 {
        k -= 1;
        if rest >> (k + 16) & 1 != 0 {
            rest ^= (0x1_0000 | POLY as u128) << k;
            quotient |= 1 << k;
        }
    }
    quotient
}

/// The two 8×8 matrices, in the order that `gf2p8affineqb` wants, of: a byte, standing `shift` bits up, times `weight`
/// modulo P. The first gives the product's high byte, the second its low byte.
pub(super) const fn matrices(weight: u16, shift: usize) -> [u64; 2] {
    let (mut high, mut low) = (0, 0);
    let mut column = 0;
    while column < 8 {
        let product = times(power(shift + column), weight);
        let mut row = 0;
        while row < 8 {
            // The row that makes bit `row` of the result is byte 7 − row of the matrix.
            let place = 8 * (7 - row) + column;
            high |= ((product >> (8 + row) & 1) as u64) << place;
            low |= ((product >> row & 1) as u64) << place;
            row += 1;
        }
        column += 1;
    }
    [high, low]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_x_are_what_shifting_gives() {
        let mut by_shifting = 1;
        for n in 0..70_000 {
            if n % 97 == 0 || n < 100 {
                assert_eq!(power(n), by_shifting, "x^{n}");
            }
            by_shifting = times_x(by_shifting);
        }
    }

    #[test]
    fn the_quotient_leaves_the_rest_that_x_to_the_64_has() {
        let mut product: u128 = 0;
        for bit in 0..49 {
            if quotient_of_x64() >> bit & 1 != 0 {
                product ^= (0x1_0000 | u128::from(POLY)) << bit;
            }
        }
        assert_eq!(product ^ 1 << 64, u128::from(power(64)));
    }

    #[test]
    fn a_matrix_does_what_multiplying_does() {
        for (weight, shift) in [(power(4112), 0), (power(16), 8), (0x1234, 0), (1, 8)] {
            let [high, low] = matrices(weight, shift);
            let apply = |matrix: u64, byte: u8| {
                (0..8).fold(0u8, |out, row| {
                    let parity = (matrix.to_le_bytes()[7 - row] & byte).count_ones() as u8 & 1;
                    out | parity << row
                })
            };
            for byte in 0..=255u8 {
                let mut want = 0;
                for bit in 0..8 {
                    if byte >> bit & 1 != 0 {
                        want ^= times(power(shift + bit), weight);
                    }
                }
                assert_eq!([apply(high, byte), apply(low, byte)], want.to_be_bytes());
            }
        }
    }
}
