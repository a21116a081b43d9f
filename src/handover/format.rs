//! The outer form of a LUN's state: named sections, each with its version and a CRC, that can be told apart without knowing what stands in them.
//!
//! Numbers are big-endian.
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | magic `TCMUSTAT` |
//! | 4 | version of this form: 1 |
//! | | then sections, each: |
//! | 1 | bytes of the name; 0 is the end, after which nothing comes |
//! | n | the name, ASCII |
//! | 1 | flags: bit 0, the section may not be skipped; other bits 0 |
//! | 2 | version of the section |
//! | 4 | bytes of its content |
//! | n | the content: JSON |
//! | 4 | CRC-32C of the section up to here |
//!
//! Who reads it skips sections that it does not know, or of which it knows no such version, unless they may not be skipped: then it refuses the whole.
//! Members of the JSON that it does not know it ignores; what changes the meaning of others needs a new version of the section.

use std::fmt::Write as _;

use crc_fast::{CrcAlgorithm, checksum};
use serde::{Serialize, de::DeserializeOwned};

const MAGIC: [u8; 8] = *b"TCMUSTAT";
const VERSION: u32 = 1;
const NEEDED: u8 = 1;

/// The longest state that is read, in bytes.
pub const MAX_LEN: usize = 16 << 20;

/// Why a state cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It does not begin as one.
    #[error("it is no state of a LUN")]
    Magic,
    /// Its form is of another version.
    #[error("it is of version {0}, and this program knows {VERSION}")]
    Version(u32),
    /// It ends before its end, or goes on after it.
    #[error("it is cut off, or goes on after its end")]
    Length,
    /// A section has changed on the way.
    #[error("the section '{0}' is damaged")]
    Damaged(String),
    /// It has flags that are not known.
    #[error("the section '{name}' has the unknown flags {flags:#x}")]
    Flags {
        /// The section.
        name: String,
        /// Its flags.
        flags: u8,
    },
    /// A section stands there twice.
    #[error("the section '{0}' is there twice")]
    Twice(String),
    /// A section that may not be skipped is not known.
    #[error("the section '{name}' of version {version} is not known here, and may not be skipped")]
    Unknown {
        /// The section.
        name: String,
        /// Its version.
        version: u16,
    },
    /// A section that has to be there is not.
    #[error("there is no section '{0}'")]
    Missing(&'static str),
    /// Its content makes no sense.
    #[error("the section '{name}' makes no sense: {why}")]
    Content {
        /// The section.
        name: &'static str,
        /// In words.
        why: String,
    },
}

/// One section, whatever stands in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its name: 1 to 255 ASCII characters.
    pub name: String,
    /// Who does not know it refuses the whole.
    pub needed: bool,
    /// Of its content.
    pub version: u16,
    /// JSON.
    pub content: Vec<u8>,
}

/// A state taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sections(pub Vec<Section>);

fn crc_of(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Takes bytes off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (front, rest) = self.0.split_at_checked(n).ok_or(FormatError::Length)?;
        self.0 = rest;
        Ok(front)
    }

    fn number(&mut self, n: usize) -> Result<u64, FormatError> {
        Ok(self.take(n)?.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }
}

impl Sections {
    /// Adds one.
    ///
    /// # Errors
    /// [`FormatError::Content`] if it cannot be written as JSON.
    pub fn add(
        &mut self,
        name: &'static str,
        version: u16,
        needed: bool,
        content: &impl Serialize,
    ) -> Result<(), FormatError> {
        let content =
            serde_json::to_vec(content).map_err(|e| FormatError::Content { name, why: e.to_string() })?;
        self.0.push(Section { name: name.to_owned(), needed, version, content });
        Ok(())
    }

    /// The bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_be_bytes());
        for section in &self.0 {
            let begin = out.len();
            let name = &section.name.as_bytes()[..section.name.len().min(255)];
            out.push(name.len() as u8);
            out.extend(name);
            out.push(if section.needed { NEEDED } else { 0 });
            out.extend(section.version.to_be_bytes());
            out.extend((section.content.len() as u32).to_be_bytes());
            out.extend(&section.content);
            let crc = crc_of(&out[begin..]);
            out.extend(crc.to_be_bytes());
        }
        out.push(0);
        out
    }

    /// Takes a state apart; looks at no content.
    ///
    /// # Errors
    /// What of it is no state, cut off or damaged.
    pub fn parse(bytes: &[u8]) -> Result<Sections, FormatError> {
        let mut left = Reader(bytes);
        if left.take(8).map_err(|_| FormatError::Magic)? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = left.number(4)? as u32;
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let mut out: Vec<Section> = Vec::new();
        loop {
            let begin = left.0;
            let len = left.number(1)? as usize;
            if len == 0 {
                return if left.0.is_empty() { Ok(Sections(out)) } else { Err(FormatError::Length) };
            }
            let name = printable(left.take(len)?);
            let flags = left.number(1)? as u8;
            let version = left.number(2)? as u16;
            let len = left.number(4)? as usize;
            let content = left.take(len)?.to_vec();
            let crc = crc_of(&begin[..begin.len() - left.0.len()]);
            if left.number(4)? != u64::from(crc) {
                return Err(FormatError::Damaged(name));
            }
            if flags & !NEEDED != 0 {
                return Err(FormatError::Flags { name, flags });
            }
            if out.iter().any(|there| there.name == name) {
                return Err(FormatError::Twice(name));
            }
            out.push(Section { name, needed: flags & NEEDED != 0, version, content });
        }
    }

    /// Refuses sections that may not be skipped and are none of those, by name and newest version.
    ///
    /// # Errors
    /// [`FormatError::Unknown`].
    pub fn check_known(&self, known: &[(&str, u16)]) -> Result<(), FormatError> {
        let is_known = |s: &Section| known.iter().any(|(n, v)| *n == s.name && (1..=*v).contains(&s.version));
        match self.0.iter().find(|s| s.needed && !is_known(s)) {
            None => Ok(()),
            Some(s) => Err(FormatError::Unknown { name: s.name.clone(), version: s.version }),
        }
    }

    /// The content of a section of at most that version, if it is there.
    ///
    /// # Errors
    /// [`FormatError::Content`].
    pub fn get<T: DeserializeOwned>(
        &self,
        name: &'static str,
        version: u16,
    ) -> Result<Option<T>, FormatError> {
        let mine = |s: &&Section| s.name == name && (1..=version).contains(&s.version);
        let Some(section) = self.0.iter().find(mine) else { return Ok(None) };
        let read = serde_json::from_slice(&section.content);
        read.map(Some).map_err(|e| FormatError::Content { name, why: e.to_string() })
    }

    /// The same of a section that has to be there.
    ///
    /// # Errors
    /// [`FormatError::Missing`] and [`FormatError::Content`].
    pub fn need<T: DeserializeOwned>(&self, name: &'static str, version: u16) -> Result<T, FormatError> {
        self.get(name, version)?.ok_or(FormatError::Missing(name))
    }
}

/// A name as it can be told.
fn printable(name: &[u8]) -> String {
    let mut out = String::new();
    for byte in name {
        if byte.is_ascii_graphic() {
            out.push(char::from(*byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn some() -> Sections {
        let mut sections = Sections::default();
        sections.add("identity", 1, true, &"vm1").unwrap();
        sections.add("later", 3, false, &vec![1, 2, 3]).unwrap();
        sections
    }

    #[test]
    fn sections_are_told_apart_by_who_knows_none_of_them() {
        let sections = Sections::parse(&some().to_bytes()).unwrap();
        assert_eq!(sections, some());
        assert_eq!(sections.need::<String>("identity", 1), Ok("vm1".to_owned()));
        assert_eq!(sections.get::<Vec<u8>>("later", 2), Ok(None), "a version that is not known is skipped");
        assert_eq!(sections.need::<u8>("none", 1), Err(FormatError::Missing("none")));
        assert!(matches!(sections.get::<u8>("identity", 1), Err(FormatError::Content { .. })));
        sections.check_known(&[("identity", 1)]).unwrap();
        let unknown = |name: &str, version| Err(FormatError::Unknown { name: name.into(), version });
        assert_eq!(sections.check_known(&[]), unknown("identity", 1));
        assert_eq!(Sections::parse(&[]), Err(FormatError::Magic));
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_seen() {
        let bytes = some().to_bytes();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Sections::parse(&bytes).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Sections::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert_eq!(Sections::parse(&[bytes, vec![0]].concat()), Err(FormatError::Length));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused_without_a_panic(bytes: Vec<u8>) {
            let _ = Sections::parse(&bytes);
            let _ = Sections::parse(&[&MAGIC[..], &1u32.to_be_bytes(), &bytes].concat());
        }
    }
}
