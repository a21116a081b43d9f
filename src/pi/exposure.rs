//! Who sees a LUN's protection information, and how it travels. Words for configuration and command line.
//!
//! `exposure = target`: initiators see a plain disk, and every tuple is ours. `exposure = initiator`: the disk says
//! PROTECT = 1, and initiators read and write tuples of their own.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Who makes and sees the tuples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exposure {
    /// The handler alone, at rest.
    #[default]
    Target,
    /// Initiators too: application tags, and the reference tags of types 2 and 3, are theirs.
    Initiator,
}

/// How tuples travel between initiator and handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transfer {
    /// In a buffer of their own, which the kernel has to deliver (`iov_dif`).
    #[default]
    Separate,
    /// After each block, in the data buffer: for programs that build their own commands (SG_IO).
    Interleaved,
}

/// A word that is none of those that fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{word}' is neither {one} nor {other}")]
pub struct UnknownWord {
    /// The word.
    pub word: String,
    /// One that would fit.
    pub one: &'static str,
    /// The other.
    pub other: &'static str,
}

impl Exposure {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Exposure::Target => "target",
            Exposure::Initiator => "initiator",
        }
    }
}

impl Transfer {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Transfer::Separate => "separate",
            Transfer::Interleaved => "interleaved",
        }
    }
}

impl fmt::Display for Exposure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Exposure {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Exposure, UnknownWord> {
        let all = [Exposure::Target, Exposure::Initiator];
        let unknown = || UnknownWord { word: word.to_owned(), one: "target", other: "initiator" };
        all.into_iter().find(|e| e.word() == word).ok_or_else(unknown)
    }
}

impl FromStr for Transfer {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Transfer, UnknownWord> {
        let all = [Transfer::Separate, Transfer::Interleaved];
        let unknown = || UnknownWord { word: word.to_owned(), one: "separate", other: "interleaved" };
        all.into_iter().find(|t| t.word() == word).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_parsed_back_and_anything_else_is_named() {
        for e in [Exposure::Target, Exposure::Initiator] {
            assert_eq!(e.to_string().parse(), Ok(e));
        }
        for t in [Transfer::Separate, Transfer::Interleaved] {
            assert_eq!(t.to_string().parse(), Ok(t));
        }
        let wrong = "both".parse::<Exposure>().unwrap_err();
        assert_eq!(wrong.to_string(), "'both' is neither target nor initiator");
    }
}
