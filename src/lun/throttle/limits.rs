//! What a LUN's commands are limited to, in the words and by the rules of QEMU's `block_set_io_throttle` (`qapi/block-core.json`,
//! BlockIOThrottle; the rules are `throttle_is_valid` in its `util/throttle.c`).
//!
//! The same words stand in `create --throttle`, in a file of `luns.d`, in the kernel's `dev_config`, in QMP and in the file that keeps
//! what was set while the LUN was in use; they are parsed and printed here and nowhere else.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::units::parse_size;

/// The largest rate (QEMU's THROTTLE_VALUE_MAX).
pub const MAX_RATE: u64 = 1_000_000_000_000_000;

/// The longest burst, in seconds; with [`MAX_RATE`] no product overflows.
pub const MAX_LENGTH: u64 = 86_400;

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Bytes.
    Bytes,
    /// Commands.
    Commands,
}

/// Whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Those of reads and writes together.
    Both,
    /// Those of reads.
    Read,
    /// Those of writes.
    Write,
}

/// Every limit: its word, what it counts and whose.
pub const ALL: [(&str, Of, Way); 6] = [
    ("bps", Of::Bytes, Way::Both),
    ("bps_rd", Of::Bytes, Way::Read),
    ("bps_wr", Of::Bytes, Way::Write),
    ("iops", Of::Commands, Way::Both),
    ("iops_rd", Of::Commands, Way::Read),
    ("iops_wr", Of::Commands, Way::Write),
];

/// Behind a limit's word: what may pass in a second of a burst.
const MAX: &str = "_max";
/// Behind a limit's word: how many seconds a burst lasts.
const LENGTH: &str = "_max_length";
/// How many bytes count as one command.
const SIZE: &str = "iops_size";

/// One limit; all 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rate {
    /// Bytes or commands a second, in the long run.
    pub rate: u64,
    /// The same during a burst; 0 for no burst.
    pub max: u64,
    /// Seconds that a burst lasts at most; 0 if it was not given, which is one second.
    pub length: u64,
}

/// All limits of a LUN, in the order of [`ALL`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "BTreeMap<String, u64>", try_from = "BTreeMap<String, u64>")]
pub struct Limits {
    /// The limits.
    pub rates: [Rate; ALL.len()],
    /// Bytes for which a command counts once; a longer one counts for more. 0: each counts once.
    pub iops_size: u64,
}

/// Why limits are refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LimitsError {
    /// A word that there is not.
    #[error(
        "there is no limit {0:?}: they are bps, bps_rd, bps_wr, iops, iops_rd, iops_wr, each also with _max and _max_length, and iops_size"
    )]
    Unknown(String),
    /// A word without a number.
    #[error("{value:?} is no value for {word}: give a number, or bytes with K, M, G")]
    Value {
        /// The word.
        word: String,
        /// What stood there.
        value: String,
    },
    /// A word that stands there twice.
    #[error("{0} is set twice")]
    Twice(String),
    /// A total beside a part of it.
    #[error(
        "{total} and {part} cannot be set at the same time: give the total, or those of reads and writes"
    )]
    TotalAndPart {
        /// The total.
        total: String,
        /// The part.
        part: String,
    },
    /// A burst of what is not limited.
    #[error("{0} needs {1} to be set")]
    Without(String, String),
    /// A burst that is slower than the limit.
    #[error("{word}_max of {max} is lower than {word} of {rate}")]
    Lower {
        /// The limit's word.
        word: &'static str,
        /// During a burst.
        max: u64,
        /// In the long run.
        rate: u64,
    },
    /// More than makes sense.
    #[error("{word} of {value} is out of range: give {least} to {most}")]
    Range {
        /// The word.
        word: String,
        /// Its value.
        value: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Limits::default()
    }

    /// From words and numbers; 0 is no limit.
    ///
    /// # Errors
    /// A word that there is not, and what contradicts itself.
    pub fn of(words: impl IntoIterator<Item = (String, u64)>) -> Result<Limits, LimitsError> {
        let mut limits = Limits::default();
        for (word, value) in words {
            if word.ends_with(LENGTH) && value == 0 {
                return Err(LimitsError::Range { word, value, least: 1, most: MAX_LENGTH });
            }
            *limits.cell(&word).ok_or_else(|| LimitsError::Unknown(word.clone()))? = value;
        }
        limits.check()?;
        Ok(limits)
    }

    /// Whether that is a limit's word.
    pub fn is_word(word: &str) -> bool {
        Limits::default().cell(word).is_some()
    }

    fn cell(&mut self, word: &str) -> Option<&mut u64> {
        if word == SIZE {
            return Some(&mut self.iops_size);
        }
        let (name, part) = match (word.strip_suffix(LENGTH), word.strip_suffix(MAX)) {
            (Some(name), _) => (name, LENGTH),
            (None, Some(name)) => (name, MAX),
            (None, None) => (word, ""),
        };
        let at = ALL.iter().position(|(known, ..)| *known == name)?;
        let rate = &mut self.rates[at];
        Some(match part {
            LENGTH => &mut rate.length,
            MAX => &mut rate.max,
            _ => &mut rate.rate,
        })
    }

    /// What is set, by its words.
    pub fn words(&self) -> impl Iterator<Item = (String, u64)> + use<> {
        let each = ALL.iter().zip(self.rates).flat_map(|((name, ..), r)| {
            [
                ((*name).to_owned(), r.rate),
                (format!("{name}{MAX}"), r.max),
                (format!("{name}{LENGTH}"), r.length),
            ]
        });
        each.chain([(SIZE.to_owned(), self.iops_size)]).filter(|(_, value)| *value > 0)
    }

    /// As QEMU's BlockIOThrottle has them, by their words: the rates always, the rest where it is set.
    pub fn in_full(&self) -> BTreeMap<String, u64> {
        ALL.iter().map(|(word, ..)| ((*word).to_owned(), 0)).chain(self.words()).collect()
    }

    fn check(&self) -> Result<(), LimitsError> {
        for total in [0, 3] {
            let is_set = |r: Rate| r.rate > 0 || r.max > 0;
            for part in [total + 1, total + 2] {
                if is_set(self.rates[total]) && is_set(self.rates[part]) {
                    let word = |i: usize| {
                        let suffix = if self.rates[i].rate > 0 { "" } else { MAX };
                        format!("{}{suffix}", ALL[i].0)
                    };
                    return Err(LimitsError::TotalAndPart { total: word(total), part: word(part) });
                }
            }
        }
        for ((word, ..), r) in ALL.iter().zip(self.rates) {
            for (suffix, value) in [("", r.rate), (MAX, r.max)] {
                if value > MAX_RATE {
                    let word = format!("{word}{suffix}");
                    return Err(LimitsError::Range { word, value, least: 0, most: MAX_RATE });
                }
            }
            if r.length > MAX_LENGTH {
                let word = format!("{word}{LENGTH}");
                return Err(LimitsError::Range { word, value: r.length, least: 1, most: MAX_LENGTH });
            }
            if r.max > 0 && r.rate == 0 {
                return Err(LimitsError::Without(format!("{word}{MAX}"), (*word).to_owned()));
            }
            if r.length > 1 && r.max == 0 {
                return Err(LimitsError::Without(format!("{word}{LENGTH}"), format!("{word}{MAX}")));
            }
            if r.max > 0 && r.max < r.rate {
                return Err(LimitsError::Lower { word, max: r.max, rate: r.rate });
            }
        }
        if self.iops_size > MAX_RATE {
            let (word, value) = (SIZE.to_owned(), self.iops_size);
            return Err(LimitsError::Range { word, value, least: 0, most: MAX_RATE });
        }
        if self.iops_size > 0 && self.rates[3..].iter().all(|r| r.rate == 0) {
            return Err(LimitsError::Without(SIZE.to_owned(), "iops, iops_rd or iops_wr".to_owned()));
        }
        Ok(())
    }
}

impl FromStr for Limits {
    type Err = LimitsError;

    /// `iops=500,bps=100M`; `off` for none.
    fn from_str(text: &str) -> Result<Limits, LimitsError> {
        if text == "off" {
            return Ok(Limits::default());
        }
        let mut words: Vec<(String, u64)> = Vec::new();
        for part in text.split(',') {
            let (word, value) = part.split_once('=').unwrap_or((part, ""));
            if !Limits::is_word(word) {
                return Err(LimitsError::Unknown(word.to_owned()));
            }
            if words.iter().any(|(there, _)| there == word) {
                return Err(LimitsError::Twice(word.to_owned()));
            }
            words.push((word.to_owned(), Limits::value(word, value)?));
        }
        Limits::of(words)
    }
}

impl Limits {
    /// A value as a person writes it, for that word.
    ///
    /// # Errors
    /// What is no number.
    pub fn value(word: &str, text: &str) -> Result<u64, LimitsError> {
        // A size is never 0, and here 0 is a word for none.
        let value = text.parse().or_else(|_| parse_size(text));
        value.map_err(|_| LimitsError::Value { word: word.to_owned(), value: text.to_owned() })
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("off");
        }
        for (i, (word, value)) in self.words().enumerate() {
            write!(f, "{}{word}={value}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

impl From<Limits> for BTreeMap<String, u64> {
    fn from(limits: Limits) -> Self {
        limits.words().collect()
    }
}

impl TryFrom<BTreeMap<String, u64>> for Limits {
    type Error = LimitsError;

    fn try_from(words: BTreeMap<String, u64>) -> Result<Limits, LimitsError> {
        Limits::of(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Limits, String> {
        text.parse().map_err(|e: LimitsError| e.to_string())
    }

    #[test]
    fn what_is_printed_is_parsed_back_and_off_is_no_limit() {
        for text in [
            "off",
            "iops=500",
            "bps=104857600,bps_max=209715200,bps_max_length=10,iops_rd=5,iops_wr=7,iops_wr_max=9,iops_size=4096",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("bps=100M").unwrap().to_string(), "bps=104857600");
        assert_eq!(parse("iops=0"), parse("off"), "0 is no limit, as in QEMU");
        let limits = parse("bps_rd=1M,iops=5,iops_max=6").unwrap();
        let json = serde_json::to_value(limits).unwrap();
        assert_eq!(serde_json::from_value::<Limits>(json).unwrap(), limits);
        assert!(serde_json::from_str::<Limits>("{\"bps\":1,\"bps_rd\":1}").is_err());
    }

    #[test]
    fn a_contradiction_is_refused_and_named() {
        for (text, words) in [
            ("", "there is no limit \"\""),
            ("iop=5", "there is no limit \"iop\""),
            ("bps", "\"\" is no value for bps"),
            ("bps=fast", "\"fast\" is no value for bps"),
            ("bps=1,bps=1", "bps is set twice"),
            ("bps=1,bps_rd=1", "bps and bps_rd cannot be set at the same time"),
            ("iops_wr=1,iops=1", "iops and iops_wr cannot be set at the same time"),
            ("iops_max=5", "iops_max needs iops to be set"),
            ("iops=5,iops_max=4", "iops_max of 4 is lower than iops of 5"),
            ("iops=5,iops_max_length=2", "iops_max_length needs iops_max to be set"),
            ("iops=5,iops_max=9,iops_max_length=0", "iops_max_length of 0 is out of range"),
            ("iops=5,iops_max=9,iops_max_length=90000", "out of range: give 1 to 86400"),
            ("iops_size=4096", "iops_size needs iops, iops_rd or iops_wr to be set"),
            ("bps=1000000000000001", "out of range"),
        ] {
            let e = parse(text).unwrap_err();
            assert!(e.contains(words), "{text}: {e}");
        }
    }
}
