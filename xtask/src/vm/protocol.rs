//! What goes over the virtio-serial port between the host and the agent in the guest.
//!
//! A frame is a tag (1 byte), the number of the request it belongs to and the payload's length (32 bits each,
//! big-endian), and the payload. The host sends [`Tag::Run`]; the agent answers with any number of
//! [`Tag::Stdout`] and [`Tag::Stderr`], raw bytes as they come, and one [`Tag::Exit`]. Output that a command's left-over children
//! write later bears the old number, so the host can tell it from the next command's.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};

/// The virtio-serial port's name, as the guest finds it in sysfs.
pub const PORT_NAME: &str = "tcmu-dif.agent";

/// No honest frame is longer.
const MAX_PAYLOAD: u32 = 64 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// The agent is up; sent once, number 0.
    Hello,
    /// Run a script: the payload is a [`Request`] in JSON.
    Run,
    /// Bytes from the script's standard output.
    Stdout,
    /// Bytes from the script's standard error.
    Stderr,
    /// The script ended: the payload is an [`Exit`] in JSON.
    Exit,
}

impl Tag {
    const ALL: [(Self, u8); 5] = [
        (Self::Hello, b'H'),
        (Self::Run, b'R'),
        (Self::Stdout, b'O'),
        (Self::Stderr, b'E'),
        (Self::Exit, b'X'),
    ];

    fn byte(self) -> u8 {
        Self::ALL.iter().find(|(tag, _)| *tag == self).map_or(0, |(_, byte)| *byte)
    }
}

/// A script for bash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The script's text.
    pub script: String,
    /// Runs it with `set -euo pipefail`.
    pub strict: bool,
    /// The agent kills the script's process group after this many seconds.
    pub timeout_s: u64,
}

/// How a script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, if it exited.
    pub status: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// It had to be killed because its time was over (and may still be there, in D state).
    pub timed_out: bool,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub tag: Tag,
    /// The request it belongs to.
    pub number: u32,
    /// Its bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Writes the frame in one call, so that frames of several threads cannot mix within it.
    pub fn write_to(&self, to: &mut impl Write) -> Result<()> {
        let length = u32::try_from(self.payload.len())?;
        let mut bytes = Vec::with_capacity(9 + self.payload.len());
        bytes.push(self.tag.byte());
        bytes.extend(self.number.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(&self.payload);
        to.write_all(&bytes)?;
        to.flush()?;
        Ok(())
    }

    /// Reads one frame.
    pub fn read_from(from: &mut impl Read) -> Result<Self> {
        let mut byte = [0];
        let mut word = [0; 4];
        from.read_exact(&mut byte)?;
        let Some((tag, _)) = Tag::ALL.iter().find(|(_, b)| *b == byte[0]) else {
            bail!("a frame with the unknown tag {:#04x}", byte[0]);
        };
        from.read_exact(&mut word)?;
        let number = u32::from_be_bytes(word);
        from.read_exact(&mut word)?;
        let length = u32::from_be_bytes(word);
        if length > MAX_PAYLOAD {
            bail!("a frame of {length} bytes");
        }
        let mut payload = vec![0; length as usize];
        from.read_exact(&mut payload)?;
        Ok(Self { tag: *tag, number, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_frame_is_read_as_it_was_written() {
        let mut wire = Vec::new();
        let frames: Vec<Frame> = Tag::ALL
            .iter()
            .zip(1..)
            .map(|((tag, _), number)| Frame { tag: *tag, number, payload: vec![7; number as usize] })
            .collect();
        for frame in &frames {
            frame.write_to(&mut wire).unwrap();
        }
        let mut from = wire.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read_from(&mut from).unwrap(), *frame);
        }
        assert!(from.is_empty());
    }

    #[test]
    fn an_unknown_tag_and_an_absurd_length_are_errors() {
        assert!(Frame::read_from(&mut [b'?', 0, 0, 0, 0, 0, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read_from(&mut [b'O', 0, 0, 0, 0, 255, 0, 0, 0].as_slice()).is_err());
    }
}
