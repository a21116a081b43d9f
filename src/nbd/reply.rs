//! Replies: simple ones and chunks, and whether they are what was asked for.
//!
//! A [`Pending`] is one request that waits. It is shown every head that comes for it, says how the payload has to be taken, and checks
//! it: a server cannot make it write outside its range or twice to one place, keep it waiting with chunks that bring nothing, or have memory
//! allocated beyond what was asked for.

use super::{
    Broken, Cursor, MAX_STRING, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, error, printable,
};

/// Bytes that every reply begins with.
pub const HEAD_LEN: usize = 16;
/// Bytes of a structured reply's head that come after those.
pub const CHUNK_REST_LEN: usize = 4;
/// Extents that a server may tell at once: as many as QEMU does at most.
const MAX_EXTENTS: usize = 1 << 17;
/// Runs of bytes, with others between them missing, that a reply may consist of meanwhile.
const MAX_RUNS: usize = 4096;

/// The head of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// All of it, but for the data of a read.
    Simple {
        /// 0, or of [`super::error`].
        error: u32,
        /// The request.
        cookie: u64,
    },
    /// One chunk; its length follows.
    Chunk {
        /// Of [`super::chunk`].
        flags: u16,
        /// Of [`super::chunk`].
        kind: u16,
        /// The request.
        cookie: u64,
    },
}

impl Head {
    /// Parses what every reply begins with.
    ///
    /// # Errors
    /// That it is none.
    pub fn parse(bytes: &[u8; HEAD_LEN]) -> Result<Head, Broken> {
        let mut c = Cursor::new(bytes);
        match c.u32()? {
            SIMPLE_REPLY_MAGIC => Ok(Head::Simple { error: c.u32()?, cookie: c.u64()? }),
            STRUCTURED_REPLY_MAGIC => Ok(Head::Chunk { flags: c.u16()?, kind: c.u16()?, cookie: c.u64()? }),
            other => Err(Broken::new(format!("a reply begins with {other:#010x}"))),
        }
    }

    /// The request that it answers.
    pub fn cookie(&self) -> u64 {
        match self {
            Head::Simple { cookie, .. } | Head::Chunk { cookie, .. } => *cookie,
        }
    }
}

/// A simple reply, without data.
pub fn simple(error: u32, cookie: u64) -> [u8; HEAD_LEN] {
    let mut out = [0; HEAD_LEN];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The head of a chunk with so many bytes of payload.
pub fn chunk_head(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; HEAD_LEN + CHUNK_REST_LEN] {
    let mut out = [0; HEAD_LEN + CHUNK_REST_LEN];
    out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&length.to_be_bytes());
    out
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Bytes.
    Read {
        /// The first.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// The extents of a range.
    Status {
        /// The number of the context.
        context: u32,
        /// Bytes.
        length: u32,
    },
    /// That it is done.
    Done,
}

/// An extent as a server tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u32,
    /// Of [`super::allocation`].
    pub flags: u32,
}

/// How the payload of a reply is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// There is none.
    None,
    /// So many bytes, for [`Pending::small`].
    Small(usize),
    /// Eight bytes for [`Pending::data_at`], and then so many of the data.
    Data(usize),
    /// So many bytes of the data, from the beginning.
    AllData(usize),
}

/// A request that waits, and what has come of it.
#[derive(Debug, Clone)]
pub struct Pending {
    asked: Asked,
    structured: bool,
    /// Bytes of a read that have come, in order: start and end within it.
    runs: Vec<(u32, u32)>,
    extents: Option<Vec<Extent>>,
    error: Option<(u32, String)>,
    chunks: usize,
    kind: u16,
    last: bool,
}

impl Pending {
    /// One that was just sent. With `structured`, reads and maps are answered in chunks.
    pub fn new(asked: Asked, structured: bool) -> Pending {
        Pending {
            asked,
            structured,
            runs: Vec::new(),
            extents: None,
            error: None,
            chunks: 0,
            kind: chunk::NONE,
            last: false,
        }
    }

    /// A simple reply has come.
    ///
    /// # Errors
    /// That there should be chunks.
    pub fn simple(&mut self, error: u32) -> Result<Payload, Broken> {
        if self.chunks > 0 {
            return Err(Broken::new("a simple reply after chunks"));
        }
        self.last = true;
        if error != 0 {
            self.error = Some((error, String::new()));
            return Ok(Payload::None);
        }
        match self.asked {
            Asked::Done => Ok(Payload::None),
            Asked::Read { length, .. } if !self.structured => {
                self.runs = vec![(0, length)];
                Ok(Payload::AllData(length as usize))
            }
            Asked::Read { .. } => Err(Broken::new("a simple reply to a read, where chunks were agreed on")),
            Asked::Status { .. } => Err(Broken::new("a simple reply to a question for extents")),
        }
    }

    /// The head of a chunk has come, with so many bytes of payload.
    ///
    /// # Errors
    /// A chunk that does not belong here.
    pub fn chunk(&mut self, flags: u16, kind: u16, length: u32) -> Result<Payload, Broken> {
        if !self.structured {
            return Err(Broken::new("a chunk, where none were agreed on"));
        }
        self.chunks += 1;
        let most = match self.asked {
            // No server cuts finer than sectors.
            Asked::Read { length, .. } => length as usize / 512 + 16,
            Asked::Status { .. } | Asked::Done => 16,
        };
        if self.chunks > most {
            return Err(Broken::new(format!("more than {most} chunks for one request")));
        }
        self.kind = kind;
        self.last = flags & chunk::DONE != 0;
        let length = length as usize;
        let reads = matches!(self.asked, Asked::Read { .. });
        match kind {
            chunk::NONE if length == 0 && self.last => Ok(Payload::None),
            chunk::OFFSET_DATA if reads && length > 8 => Ok(Payload::Data(length - 8)),
            chunk::OFFSET_HOLE if reads && length == 12 => Ok(Payload::Small(12)),
            chunk::BLOCK_STATUS
                if matches!(self.asked, Asked::Status { .. })
                    && length >= 12
                    && (length - 4).is_multiple_of(8)
                    && (length - 4) / 8 <= MAX_EXTENTS =>
            {
                Ok(Payload::Small(length))
            }
            // Six bytes, a message, and an offset perhaps. Unknown errors are errors all the same (proto.md).
            _ if kind & chunk::ERROR_BIT != 0 && (6..=6 + MAX_STRING + 8).contains(&length) => {
                Ok(Payload::Small(length))
            }
            _ => Err(Broken::new(format!("a chunk of kind {kind} with {length} bytes for {:?}", self.asked))),
        }
    }

    /// Where in the read's buffer the data go that come now, as its eight bytes say.
    ///
    /// # Errors
    /// A place outside what was asked for, or one that has come already.
    pub fn data_at(&mut self, offset: [u8; 8], length: usize) -> Result<usize, Broken> {
        self.cover(u64::from_be_bytes(offset), length as u64)
    }

    fn cover(&mut self, at: u64, len: u64) -> Result<usize, Broken> {
        let Asked::Read { offset, length } = self.asked else {
            return Err(Broken::new("data for a request that has none"));
        };
        let outside =
            || Broken::new(format!("{len} bytes at {at}, where {length} at {offset} were asked for"));
        let start = at.checked_sub(offset).ok_or_else(outside)?;
        let end =
            start.checked_add(len).filter(|end| *end <= u64::from(length) && len > 0).ok_or_else(outside)?;
        let (start, end) = (start as u32, end as u32);
        let place = self.runs.partition_point(|(s, _)| *s < start);
        let before = place.checked_sub(1).map(|i| self.runs[i].1);
        let after = self.runs.get(place).map(|(s, _)| *s);
        if before.is_some_and(|e| e > start) || after.is_some_and(|s| s < end) {
            return Err(Broken::new(format!("{len} bytes at {at} have come before")));
        }
        match (before == Some(start), after == Some(end)) {
            (true, true) => {
                self.runs[place - 1].1 = self.runs[place].1;
                self.runs.remove(place);
            }
            (true, false) => self.runs[place - 1].1 = end,
            (false, true) => self.runs[place].0 = start,
            (false, false) => self.runs.insert(place, (start, end)),
        }
        if self.runs.len() > MAX_RUNS {
            return Err(Broken::new("data in too many pieces"));
        }
        Ok(start as usize)
    }

    /// A small payload has come. Gives the place and length of zeros in the read's buffer, if that is what it says.
    ///
    /// # Errors
    /// A payload that makes no sense.
    pub fn small(&mut self, bytes: &[u8]) -> Result<Option<(usize, usize)>, Broken> {
        let mut c = Cursor::new(bytes);
        match (self.kind, self.asked) {
            (chunk::OFFSET_HOLE, _) => {
                let (at, len) = (c.u64()?, c.u32()?);
                return Ok(Some((self.cover(at, u64::from(len))?, len as usize)));
            }
            (chunk::BLOCK_STATUS, Asked::Status { context, length }) => {
                let of = c.u32()?;
                if of != context || self.extents.is_some() {
                    return Err(Broken::new(format!(
                        "extents of context {of}, where {context} was asked for once"
                    )));
                }
                let (mut extents, mut sum) = (Vec::new(), 0u64);
                for pair in c.rest().chunks_exact(8) {
                    let mut c = Cursor::new(pair);
                    let extent = Extent { length: c.u32()?, flags: c.u32()? };
                    // Only the last may go on beyond what was asked for.
                    if extent.length == 0 || sum >= u64::from(length) {
                        return Err(Broken::new(format!(
                            "extent {} of {} bytes after {sum}",
                            extents.len(),
                            extent.length
                        )));
                    }
                    sum += u64::from(extent.length);
                    extents.push(extent);
                }
                self.extents = Some(extents);
            }
            _ => {
                let (code, len) = (c.u32()?, usize::from(c.u16()?));
                let message = printable(c.take(len)?);
                // The first is what went wrong; 0 would be no error at all.
                self.error.get_or_insert((if code == 0 { error::EINVAL } else { code }, message));
            }
        }
        Ok(None)
    }

    /// Whether the reply is complete, with the payload of its last chunk.
    pub fn is_complete(&self) -> bool {
        self.last
    }

    /// What came of it: extents, if those were asked for.
    ///
    /// # Errors
    /// The server's error with its words, in the inner result; in the outer that a reply without an error left something out.
    pub fn outcome(self) -> Result<Result<Vec<Extent>, (u32, String)>, Broken> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        match (self.asked, self.extents) {
            (Asked::Done, _) => Ok(Ok(Vec::new())),
            (Asked::Read { length, .. }, _) if self.runs == [(0, length)] => Ok(Ok(Vec::new())),
            (Asked::Read { offset, length }, _) => {
                Err(Broken::new(format!("not all of the {length} bytes at {offset} have come")))
            }
            (Asked::Status { .. }, Some(extents)) => Ok(Ok(extents)),
            (Asked::Status { .. }, None) => Err(Broken::new("a question for extents got none")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read() -> Pending {
        Pending::new(Asked::Read { offset: 4096, length: 4096 }, true)
    }

    #[test]
    fn chunks_in_any_order_make_a_read() {
        let mut p = read();
        assert_eq!(p.chunk(0, chunk::OFFSET_DATA, 8 + 512), Ok(Payload::Data(512)));
        assert_eq!(p.data_at((4096u64 + 3584).to_be_bytes(), 512), Ok(3584));
        assert_eq!(p.chunk(0, chunk::OFFSET_DATA, 8 + 1024), Ok(Payload::Data(1024)));
        assert_eq!(p.data_at(4096u64.to_be_bytes(), 1024), Ok(0));
        assert!(!p.is_complete());
        assert_eq!(p.chunk(chunk::DONE, chunk::OFFSET_HOLE, 12), Ok(Payload::Small(12)));
        let mut hole = (4096u64 + 1024).to_be_bytes().to_vec();
        hole.extend(2560u32.to_be_bytes());
        assert_eq!(p.small(&hole), Ok(Some((1024, 2560))));
        assert!(p.is_complete());
        assert_eq!(p.outcome(), Ok(Ok(Vec::new())));
    }

    #[test]
    fn a_read_with_a_gap_an_overlap_or_bytes_from_elsewhere_is_broken() {
        let mut p = read();
        p.chunk(chunk::DONE, chunk::OFFSET_DATA, 8 + 512).unwrap();
        p.data_at(4096u64.to_be_bytes(), 512).unwrap();
        assert!(p.clone().outcome().is_err());
        for (at, len) in [(4096u64, 512), (4600, 512), (4095, 1), (8191, 2), (u64::MAX, 8), (0, 1), (5000, 0)]
        {
            assert!(p.clone().data_at(at.to_be_bytes(), len).is_err(), "{len} at {at}");
        }
        assert!(p.data_at(4608u64.to_be_bytes(), 3584).is_ok());
        assert!(p.outcome().is_ok());
    }

    #[test]
    fn what_was_not_agreed_on_or_not_asked_for_is_broken() {
        assert!(read().simple(0).is_err());
        assert_eq!(read().simple(5), Ok(Payload::None));
        let mut plain = Pending::new(Asked::Read { offset: 0, length: 10 }, false);
        assert!(plain.chunk(0, chunk::OFFSET_DATA, 18).is_err());
        assert_eq!(plain.simple(0), Ok(Payload::AllData(10)));
        let mut done = Pending::new(Asked::Done, true);
        for (kind, len) in [
            (chunk::OFFSET_DATA, 20),
            (chunk::OFFSET_HOLE, 12),
            (chunk::BLOCK_STATUS, 12),
            (chunk::NONE, 1),
            (chunk::ERROR, 5),
            (chunk::ERROR, 60_000),
            (77, 0),
        ] {
            assert!(done.clone().chunk(chunk::DONE, kind, len).is_err(), "{kind} {len}");
        }
        // An empty chunk that is not the last brings nothing.
        assert!(done.clone().chunk(0, chunk::NONE, 0).is_err());
        assert_eq!(done.chunk(chunk::DONE, chunk::NONE, 0), Ok(Payload::None));
    }

    #[test]
    fn chunks_without_end_are_broken() {
        let mut p = read();
        let error = [0, 0, 0, 5, 0, 0];
        let ended = (0..1000).find(|_| {
            let taken = p.chunk(0, chunk::ERROR, 6).is_ok();
            assert!(!taken || p.small(&error).is_ok());
            !taken
        });
        assert_eq!(ended, Some(4096 / 512 + 16));
    }

    #[test]
    fn errors_come_with_their_words_and_those_that_are_unknown_are_errors_too() {
        for (kind, code, told) in
            [(chunk::ERROR, 28, 28), (chunk::ERROR_OFFSET, 5, 5), (chunk::ERROR_BIT | 99, 0, 22)]
        {
            let mut p = read();
            let mut payload = u32::to_be_bytes(code).to_vec();
            payload.extend([0, 2, b'n', b'\n', 0, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(p.chunk(chunk::DONE, kind, payload.len() as u32), Ok(Payload::Small(payload.len())));
            assert_eq!(p.small(&payload), Ok(None));
            assert_eq!(p.outcome(), Ok(Err((told, "n ".into()))));
        }
        let mut p = read();
        p.chunk(chunk::DONE, chunk::ERROR, 6).unwrap();
        assert!(p.small(&[0, 0, 0, 5, 0, 9]).is_err(), "a message longer than its chunk");
    }

    #[test]
    fn extents_are_those_of_the_range_and_context_and_never_empty() {
        let status = || Pending::new(Asked::Status { context: 3, length: 4096 }, true);
        let told = |context: u32, extents: &[(u32, u32)]| {
            let mut payload = context.to_be_bytes().to_vec();
            extents.iter().for_each(|(l, f)| payload.extend([l.to_be_bytes(), f.to_be_bytes()].concat()));
            let mut p = status();
            p.chunk(chunk::DONE, chunk::BLOCK_STATUS, payload.len() as u32)?;
            p.small(&payload)?;
            p.outcome()
        };
        let extents = told(3, &[(512, 0), (1 << 20, 3)]).unwrap().unwrap();
        assert_eq!(extents, [Extent { length: 512, flags: 0 }, Extent { length: 1 << 20, flags: 3 }]);
        assert!(told(4, &[(512, 0)]).is_err());
        assert!(told(3, &[(0, 0)]).is_err());
        assert!(told(3, &[(4096, 0), (512, 3)]).is_err());
        assert!(told(3, &[]).is_err());
        assert!(status().simple(0).is_err());
        let mut nothing = status();
        nothing.chunk(chunk::DONE, chunk::NONE, 0).unwrap();
        assert!(nothing.outcome().is_err());
    }
}
