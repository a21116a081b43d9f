//! The messages of a handover: a kind (1 byte), the length of what follows (4 bytes, big-endian), and that: JSON, or a LUN's state.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

use super::{Failure, Identity, format::MAX_LEN, storage::Piece};

/// The version of the protocol: both sides have to have the same one.
pub const PROTOCOL: u32 = 1;

/// That of a handover in which the LUN's storage goes along. One who does not know it refuses.
pub const WITH_STORAGE: u32 = 2;

/// What is said first, by the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Offer {
    /// [`PROTOCOL`], or [`WITH_STORAGE`].
    pub protocol: u32,
    /// The program's version, for people.
    pub program: String,
    /// What is to go over.
    pub identity: Identity,
}

/// A host, as the image that stays behind names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Host {
    /// Its machine id.
    pub id: [u8; 16],
    /// Its name, for people.
    pub name: String,
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
    /// The source: this is done to the new image.
    Piece(Piece),
    /// The destination has done the oldest piece that it had not answered.
    Landed,
    /// The destination has all of the new image, and the state: that host could serve it now, and does not.
    Prepared(Host),
    /// The source does not serve the LUN any more, whatever comes: it is the destination's.
    Commit,
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
        Message::Piece(piece) => return send_piece(to, piece),
        Message::Landed => (7, Vec::new()),
        Message::Prepared(host) => (8, serde_json::to_vec(host)?),
        Message::Commit => (9, Vec::new()),
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

/// Sends a piece of the LUN's storage.
pub(super) fn send_piece(to: &mut impl Write, piece: &Piece) -> io::Result<()> {
    let parts = piece.parts()?;
    let len = parts.iter().map(|part| part.len()).sum::<usize>() as u32;
    to.write_all(&[&[6][..], &len.to_be_bytes(), &parts[0]].concat())?;
    for part in parts[1..].iter().filter(|part| !part.is_empty()) {
        to.write_all(part)?;
    }
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
        6 => Message::Piece(Piece::parse(body)?),
        7 => Message::Landed,
        8 => Message::Prepared(json(&body)?),
        9 => Message::Commit,
        kind => return Err(nonsense(format!("a message of the unknown kind {kind}"))),
    })
}
