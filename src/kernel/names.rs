//! Names that the kernel will take: a LUN's, and the world wide names of targets.

use std::fmt;

use thiserror::Error;

/// A LUN's name: 1 to 64 letters, digits and `. _ : + -`, the first a letter or a digit. It becomes a directory of configfs,
/// a part of the uio device's name and a file under /run, so it is kept to what all three take.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

/// Why a name is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// No characters.
    #[error("a name has at least one character")]
    Empty,
    /// More than 64.
    #[error("a name has at most 64 characters, and this one has {0}")]
    Long(usize),
    /// A character that isn't taken.
    #[error(
        "{0:?} may not stand there: letters, digits, '.', '_', ':', '+' and '-' may, and the first is a letter or a digit"
    )]
    Character(char),
}

impl Name {
    /// The name, if it is one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(text: &str) -> Result<Name, NameError> {
        let first = text.chars().next().ok_or(NameError::Empty)?;
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '+' | '-');
        if let Some(bad) = text.chars().find(|c| !inner(*c)) {
            return Err(NameError::Character(bad));
        }
        if !first.is_ascii_alphanumeric() {
            return Err(NameError::Character(first));
        }
        if text.len() > 64 {
            return Err(NameError::Long(text.len()));
        }
        Ok(Name(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A world wide name as the fabrics' directories have it: `naa.` and 16 hexadecimal digits in lower case, the first a 5 or
/// a 6 (what libvirt and QEMU take).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Wwn(String);

/// A world wide name that isn't one.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "a world wide name is `naa.`, a 5 or a 6, and 15 more hexadecimal digits, as in naa.5001405aa1b2c3d4"
)]
pub struct WwnError;

impl Wwn {
    /// The name, if it is one; upper case is lowered.
    ///
    /// # Errors
    /// If it isn't.
    pub fn new(text: &str) -> Result<Wwn, WwnError> {
        let digits = text.strip_prefix("naa.").ok_or(WwnError)?.to_ascii_lowercase();
        let form = digits.len() == 16
            && digits.starts_with(['5', '6'])
            && digits.bytes().all(|b| b.is_ascii_hexdigit());
        if form { Ok(Wwn(format!("naa.{digits}"))) } else { Err(WwnError) }
    }

    /// The name that a LUN gets on a fabric when none is asked for: always the same for the same words, so that a second
    /// `create` finds the first. NAA 5 with the OUI 001405 that LIO's own tools use, and 36 bits of a hash.
    pub fn derived(words: &[&str]) -> Wwn {
        // FNV-1a, 64 bits, folded; a 0 byte after each word keeps ("ab", "c") and ("a", "bc") apart.
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for b in words.iter().flat_map(|w| w.bytes().chain([0])) {
            hash = (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        }
        Wwn(format!("naa.5001405{:09x}", (hash ^ (hash >> 36)) & 0xf_ffff_ffff))
    }

    /// The text, `naa.` included.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Wwn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_the_kernel_or_a_path_would_trip_over_is_refused() {
        for (text, error) in [
            ("", NameError::Empty),
            ("a/b", NameError::Character('/')),
            ("..", NameError::Character('.')),
            ("-a", NameError::Character('-')),
            ("a b", NameError::Character(' ')),
            ("a\n", NameError::Character('\n')),
            ("é", NameError::Character('é')),
        ] {
            assert_eq!(Name::new(text), Err(error), "{text:?}");
        }
        assert_eq!(Name::new(&"x".repeat(65)), Err(NameError::Long(65)));
        for text in ["vm1", "0", "vm-1.disk_2:a+b", &"x".repeat(64)] {
            assert_eq!(Name::new(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn a_world_wide_name_has_sixteen_digits() {
        assert_eq!(Wwn::new("naa.5001405AA1B2C3D4").unwrap().as_str(), "naa.5001405aa1b2c3d4");
        for text in [
            "",
            "naa.",
            "5001405aa1b2c3d4",
            "naa.5001405aa1b2c3d",
            "naa.500140/aa1b2c3d4",
            "naa.3001405aa1b2c3d4",
        ] {
            assert_eq!(Wwn::new(text), Err(WwnError), "{text}");
        }
    }

    #[test]
    fn a_derived_name_is_one_and_depends_on_every_word() {
        let a = Wwn::derived(&["vhost", "vm1"]);
        assert_eq!(Wwn::new(a.as_str()), Ok(a.clone()));
        assert_eq!(a, Wwn::derived(&["vhost", "vm1"]));
        for other in [["loopback", "vm1"], ["vhost", "vm2"], ["vhostv", "m1"]] {
            assert_ne!(a, Wwn::derived(&other));
        }
    }
}
