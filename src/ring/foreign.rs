//! An in-flight record of another version, as far as its first 40 bytes go, which mean the same in all: after an upgrade or its
//! opposite a ring is taken up where that is safe, and else left alone. Called by [`super::record`] before it touches anything.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{
    device::{HEAD, TAIL},
    record::{AT_PLAIN, AT_RING, AT_TAIL, AT_VALID, NAME, RingId, VERSION},
};
use crate::sys::mem::Mapping;

/// Why a record can't be taken up.
#[derive(Debug)]
pub enum RecordError {
    /// The file can't be made, or there is no room for it.
    Io(io::Error),
    /// It is of that version, and knows more of the ring than can be told without it.
    Version(u8),
}

impl From<io::Error> for RecordError {
    fn from(e: io::Error) -> RecordError {
        RecordError::Io(e)
    }
}

/// What the first bytes of a record of another version say of a ring.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Foreign {
    /// It is none, or of another ring.
    No,
    /// The ring can be taken up as it stands.
    Plain(u8),
    /// The rest would be needed.
    Unknown(u8),
}

impl Foreign {
    /// Reads them.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn look(file: &File, id: RingId, ring: &Mapping) -> io::Result<Foreign> {
        let mut head = [0; AT_VALID as usize];
        if file.metadata()?.len() < head.len() as u64 {
            return Ok(Foreign::No);
        }
        file.read_exact_at(&mut head, 0)?;
        let version = head[NAME.len()];
        // Version 0 is a record that was being begun.
        if head[..NAME.len()] != NAME
            || [0, VERSION].contains(&version)
            || head[AT_RING as usize..][..16] != id.bytes()
        {
            return Ok(Foreign::No);
        }
        let word = |at: u64| {
            let at = at as usize;
            u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
        };
        let tail = ring.load_acquire(TAIL);
        let stopped = word(AT_PLAIN) == 1 && word(AT_TAIL) == tail;
        Ok(if stopped || tail == ring.load_acquire(HEAD) {
            Foreign::Plain(version)
        } else {
            Foreign::Unknown(version)
        })
    }
}
