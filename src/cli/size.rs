//! Sizes as people write them: bytes, or with K, M, G, T, P, E (powers of 1024), as qemu-img has it.

/// Parses a size.
///
/// # Errors
/// In words, what a size is.
pub fn parse(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let shift = match unit.to_ascii_uppercase().trim_end_matches("IB") {
        "" | "B" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        "T" => Some(40),
        "P" => Some(50),
        "E" => Some(60),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok();
    let bytes = number.zip(shift).and_then(|(n, s)| n.checked_mul(1 << s));
    bytes.filter(|b| *b > 0 && i64::try_from(*b).is_ok()).ok_or_else(|| {
        "a size is a number of bytes above 0, or one with K, M, G, T or P, as in 10G".to_owned()
    })
}

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
