//! Sizes as people write them: bytes, or with K, M, G, T, P, E (powers of 1024), as qemu-img has it.

pub use crate::units::parse_size as parse;

/// A size for people: `10 GiB`, `1.5 GiB`, `700 B`.
pub fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = if bytes == 0 { 0 } else { bytes.ilog2() / 10 };
    let name = units.get(unit as usize).copied().unwrap_or("EiB");
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let text = format!("{value:.2}");
    format!("{} {name}", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("1", 1),
            ("512", 512),
            ("4K", 4096),
            ("4k", 4096),
            ("10G", 10 << 30),
            ("1T", 1 << 40),
            ("2GiB", 2 << 30),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "-1", "1.5G", "G", "1X", "8E", "99999999999999999999", "1 G", "10GG"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn people_read_three_digits() {
        for (bytes, text) in
            [(0, "0 B"), (700, "700 B"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"), (100 << 20, "100 MiB")]
        {
            assert_eq!(human(bytes), text);
        }
    }
}
