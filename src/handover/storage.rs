//! What goes with a LUN whose storage the other host does not have: its blocks, piece by piece, over the handover's own connection.
//!
//! The LUN's thread makes pieces ([`Parcel`]) and waits for their answers; [`carry`] sends them in their order, several before the first is answered, and hands the answers back. The
//! destination answers each when it has it, also in their order. So whatever a piece overwrites was sent before it, and a flush answers for all before it.
//!
//! Protection information goes in the same message as its blocks, which NBD has no place for.

use std::{
    borrow::Cow,
    collections::VecDeque,
    fmt,
    io::{self, Read, Write},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    Failure,
    wire::{Message, receive, send, send_piece},
};

/// Most bytes of data in one piece.
pub const MOST: usize = 1 << 20;

/// Pieces that are sent before the first of them is answered.
const WINDOW: usize = 16;

/// How often the other side hears from one who has nothing to send. It waits a minute.
const SIGN: Duration = Duration::from_secs(10);

/// How often it is looked whether there is something to end.
const LOOK: Duration = Duration::from_millis(100);

/// What protection information the new image keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The type of the tuples, as in SBC-4: 1 to 3.
    pub kind: u8,
    /// They are kept true across a crash by a journal, and not by a bitmap.
    pub journal: bool,
    /// Application tags, and other tags than those of type 1, are the initiators' own.
    pub initiators: bool,
    /// FORMAT UNIT has turned protection off as far as initiators see.
    pub hidden: bool,
}

/// One thing that is done to the new image.
#[derive(Clone, PartialEq, Eq)]
pub enum Piece {
    /// It is made, with that protection information. The first of all.
    Begin(Option<Kept>),
    /// Blocks at that byte, with their tuples.
    Write {
        /// The first byte.
        at: u64,
        /// The blocks.
        data: Vec<u8>,
        /// Eight bytes for each, of a LUN with protection information.
        tuples: Option<Vec<u8>>,
    },
    /// So many bytes read as zeros.
    Zeroes {
        /// The first byte.
        at: u64,
        /// Bytes.
        len: u64,
        /// They need take no space.
        may_unmap: bool,
    },
    /// So many bytes are of no use any more.
    Discard {
        /// The first byte.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// All before this is made durable.
    Flush,
    /// Nothing: a sign of life.
    Nothing,
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Piece::Begin(kept) => write!(f, "Begin({kept:?})"),
            Piece::Write { at, data, tuples } => {
                write!(f, "Write({} at {at}, tuples: {})", data.len(), tuples.is_some())
            }
            Piece::Zeroes { at, len, may_unmap } => write!(f, "Zeroes({len} at {at}, {may_unmap})"),
            Piece::Discard { at, len } => write!(f, "Discard({len} at {at})"),
            Piece::Flush => f.write_str("Flush"),
            Piece::Nothing => f.write_str("Nothing"),
        }
    }
}

/// Bytes before the data: what it is (1), the first byte (8), bytes (8), a flag (1).
const HEAD: usize = 18;

fn nonsense(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Piece {
    /// The message's body in parts, which are sent one after the other; blocks and tuples from where they are.
    pub(super) fn parts(&self) -> io::Result<[Cow<'_, [u8]>; 3]> {
        let head = |what: u8, at: u64, len: u64, flag: bool| {
            Cow::from([&[what][..], &at.to_be_bytes(), &len.to_be_bytes(), &[u8::from(flag)]].concat())
        };
        let none = Cow::Borrowed(&[][..]);
        let bare = |head| [head, none.clone(), none.clone()];
        Ok(match self {
            Piece::Begin(kept) => [head(0, 0, 0, false), serde_json::to_vec(kept)?.into(), none],
            Piece::Write { at, data, tuples } => {
                let head = head(1, *at, data.len() as u64, tuples.is_some());
                [head, data.into(), tuples.as_deref().unwrap_or_default().into()]
            }
            Piece::Zeroes { at, len, may_unmap } => bare(head(2, *at, *len, *may_unmap)),
            Piece::Discard { at, len } => bare(head(3, *at, *len, false)),
            Piece::Flush => bare(head(4, 0, 0, false)),
            Piece::Nothing => bare(head(5, 0, 0, false)),
        })
    }

    /// From a message's body.
    pub(super) fn parse(mut body: Vec<u8>) -> io::Result<Piece> {
        if body.len() < HEAD {
            return Err(nonsense("a piece of the LUN's storage is too short"));
        }
        let number = |at: usize| body[at..at + 8].iter().fold(0, |n: u64, byte| n << 8 | u64::from(*byte));
        let (what, at, len, flag) = (body[0], number(1), number(9), body[17] != 0);
        let rest = body.split_off(HEAD);
        let empty = || match rest.is_empty() {
            true => Ok(()),
            false => Err(nonsense("a piece of the LUN's storage is too long")),
        };
        Ok(match what {
            0 => Piece::Begin(serde_json::from_slice(&rest)?),
            1 => {
                let most = MOST as u64;
                if len > most || len > rest.len() as u64 || !flag && len < rest.len() as u64 {
                    return Err(nonsense("a piece of the LUN's storage has another length than it says"));
                }
                let mut data = rest;
                let tuples = data.split_off(len as usize);
                Piece::Write { at, data, tuples: flag.then_some(tuples) }
            }
            2 => empty().map(|()| Piece::Zeroes { at, len, may_unmap: flag })?,
            3 => empty().map(|()| Piece::Discard { at, len })?,
            4 => empty().map(|()| Piece::Flush)?,
            5 => empty().map(|()| Piece::Nothing)?,
            _ => return Err(nonsense("a piece of the LUN's storage is of an unknown kind")),
        })
    }
}

type Give = Box<dyn FnOnce(Result<(), Failure>) + Send>;

/// The way back to whoever waits for a piece. Dropped, it says that there is no connection any more.
pub struct Back(Option<Give>);

impl Back {
    /// Calls that, once.
    pub fn new(give: impl FnOnce(Result<(), Failure>) + Send + 'static) -> Back {
        Back(Some(Box::new(give)))
    }

    fn give(mut self, answer: Result<(), Failure>) {
        if let Some(give) = self.0.take() {
            give(answer);
        }
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        if let Some(give) = self.0.take() {
            give(Err(Failure::new("the connection to the destination has ended")));
        }
    }
}

impl fmt::Debug for Back {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Back")
    }
}

/// A piece, and who waits for its answer.
#[derive(Debug)]
pub struct Parcel {
    /// The piece.
    pub piece: Piece,
    /// Who waits.
    pub back: Back,
}

/// What comes next.
enum Next {
    Parcel(Parcel),
    /// Nothing yet.
    Quiet,
    /// Nothing any more.
    End,
}

fn next(from: &Receiver<Parcel>, wait: Option<Duration>) -> Next {
    match wait {
        None => from.try_recv().map_err(|e| e == TryRecvError::Disconnected),
        Some(time) => from.recv_timeout(time).map_err(|e| e == RecvTimeoutError::Disconnected),
    }
    .map_or_else(|ended| if ended { Next::End } else { Next::Quiet }, Next::Parcel)
}

/// Carries pieces to the destination until there are no more, or it is told to stop and has had its answers.
///
/// # Errors
/// Why the destination does not go on; whoever waits is told that too.
pub(super) fn carry(
    connection: &mut (impl Read + Write),
    parcels: Receiver<Parcel>,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let mut awaited: VecDeque<Back> = VecDeque::new();
    let mut heard = Instant::now();
    let done = loop {
        let turn = step(connection, &parcels, &mut awaited, &mut heard, stop);
        match turn {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(failure) => break Err(failure),
        }
    };
    if let Err(failure) = &done {
        awaited.into_iter().for_each(|back| back.give(Err(failure.clone())));
    }
    done
}

/// Sends what there is, and takes one answer; false at the end.
fn step(
    connection: &mut (impl Read + Write),
    parcels: &Receiver<Parcel>,
    awaited: &mut VecDeque<Back>,
    heard: &mut Instant,
    stop: &AtomicBool,
) -> Result<bool, Failure> {
    let lost = |e: io::Error| super::give::lost(&e);
    while awaited.len() < WINDOW {
        match next(parcels, awaited.is_empty().then_some(LOOK)) {
            Next::Parcel(Parcel { piece, back }) => {
                awaited.push_back(back);
                send_piece(connection, &piece).map_err(|e| said_before(connection, &e))?;
            }
            Next::End if awaited.is_empty() => return Ok(false),
            Next::Quiet if awaited.is_empty() => {
                if stop.load(Ordering::Acquire) {
                    return Ok(false);
                }
                if heard.elapsed() >= SIGN {
                    awaited.push_back(Back::new(|_| ()));
                    send_piece(connection, &Piece::Nothing).map_err(|e| said_before(connection, &e))?;
                }
            }
            Next::Quiet | Next::End => break,
        }
    }
    let answer = receive(connection).map_err(lost)?;
    *heard = Instant::now();
    match (answer, awaited.pop_front()) {
        (Message::Landed, Some(back)) => {
            back.give(Ok(()));
            Ok(true)
        }
        (Message::Failed(failure), back) => {
            back.into_iter().for_each(|back| back.give(Err(failure.clone())));
            Err(failure)
        }
        (_, back) => {
            drop(back);
            Err(super::give::unexpected())
        }
    }
}

/// Why nothing can be sent any more: what the destination said before it went, if it said something.
fn said_before(connection: &mut impl Read, e: &io::Error) -> Failure {
    for _ in 0..=WINDOW {
        match receive(connection) {
            Ok(Message::Landed) => {}
            Ok(Message::Failed(failure)) => return failure,
            _ => break,
        }
    }
    super::give::lost(e)
}

/// Takes what a source had sent before it heard that it came to nothing, until it ends the connection: one that is closed over unread messages may lose what was said last.
pub(super) fn hear_out(connection: &mut impl Read) {
    for _ in 0..2 * WINDOW {
        match receive(connection) {
            Ok(Message::Failed(_)) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// Answers for a piece that has come.
pub(super) fn landed(connection: &mut impl Write) -> io::Result<()> {
    send(connection, &Message::Landed)
}
