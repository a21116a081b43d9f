//! The messages of a handover: a kind (1 byte), the length of what follows (4 bytes, big-endian), and that: JSON, or a LUN's state.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

use super::{Failure, Identity, format::MAX_LEN};

/// The version of the protocol: both sides have to have the same one.
pub const PROTOCOL: u32 = 1;

/// What is said first, by the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Offer {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The program's version, for people.
    pub program: String,
    /// What is to go over.
    pub identity: Identity,
}

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The source: this LUN?
    Offer(Box<Offer>),
    /// The destination could have it.
    Ready,
    /// The source: the image has been given back, and this is the LUN's state.
    State(Vec<u8>),
    /// The destination has it, and it serves: what was made.
    Done(serde_json::Value),
    /// Either side cannot go on. Nothing of the LUN is at the destination.
    Failed(Failure),
}

fn nonsense(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|e| nonsense(format!("a message makes no sense: {e}")))
}

/// Sends one.
///
/// # Errors
/// The connection's; InvalidInput for one that is too long.
pub fn send(to: &mut impl Write, message: &Message) -> io::Result<()> {
    let (kind, body) = match message {
        Message::Offer(offer) => (1, serde_json::to_vec(offer)?),
        Message::Ready => (2, Vec::new()),
        Message::State(bytes) => (3, bytes.clone()),
        Message::Done(value) => (4, serde_json::to_vec(value)?),
        Message::Failed(failure) => (5, serde_json::to_vec(failure)?),
    };
    if body.len() > MAX_LEN {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a message is longer than 16 MiB"));
    }
    let mut bytes = vec![kind];
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    to.write_all(&bytes)?;
    to.flush()
}

/// Receives one.
///
/// # Errors
/// The connection's; UnexpectedEof if it has ended; InvalidData for what is no message.
pub fn receive(from: &mut impl Read) -> io::Result<Message> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if len > MAX_LEN {
        return Err(nonsense("a message of more than 16 MiB"));
    }
    // What comes is what takes memory, and not what is announced.
    let mut body = Vec::new();
    from.take(len as u64).read_to_end(&mut body)?;
    if body.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(match head[0] {
        1 => Message::Offer(Box::new(json(&body)?)),
        2 => Message::Ready,
        3 => Message::State(body),
        4 => Message::Done(json(&body)?),
        5 => Message::Failed(json(&body)?),
        kind => return Err(nonsense(format!("a message of the unknown kind {kind}"))),
    })
}
