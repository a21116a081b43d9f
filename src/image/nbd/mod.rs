//! An NBD export as a volume: what `nbd://` and `nbd+unix://` name, and with TLS `nbds://` and `nbds+unix://`. See `docs/nbd.md`.
//!
//! A command becomes one request, or as many as the server's limits ask for; data go straight between the socket and the caller's
//! memory. [`session`] keeps the promises of a volume across a server that goes and comes back. What a server with blocks larger than a
//! LUN's cannot do at once (a part of its block) is read, changed and written under a range lock. There are no locks against others: NBD has none. Called by
//! `image/open`.

mod channel;
mod driver;
mod link;
mod retained;
mod session;

use std::{
    io,
    path::{Path, PathBuf},
};

use self::{
    link::{LinkError, Terms},
    session::{Answer, Call, CallError, Session},
};
use super::error::{OpenError, OpenErrorKind};
use crate::{
    nbd::{
        DEFAULT_MAX_PAYLOAD, allocation, command, error, export,
        uri::{self, Uri},
    },
    sync::RangeLock,
    sys::{
        exec::join_all,
        io::Io,
        mem::{Buffer, Sg},
    },
    units::ByteOffset,
    volume::{Extent, ExtentKind, IoError, IoErrorKind, IoOp, Limits, Result, Volume, WriteFlags},
};

/// The smallest unit of I/O on an export whose size is a multiple of it.
const SECTOR: u32 = 512;
/// Bytes that are zeroed, or asked the map of, with one request.
const LONGEST: u64 = 256 << 20;
/// Bytes of zeros that are written with one request, where the server cannot make them.
const ZERO_CHUNK: u64 = 1 << 20;

/// Whether that names an NBD export and not a file.
pub fn is_uri(path: &Path) -> bool {
    uri::is_uri(path)
}

/// A volume at the other end of a socket.
pub struct Nbd {
    session: Session,
    path: PathBuf,
    read_only: bool,
    alignment: u32,
    /// The server's: offsets and lengths are multiples of it.
    block: u64,
    /// Payload of one request.
    payload: u64,
    terms: Terms,
    /// Taken where a part of a server's block is written.
    parts: RangeLock,
}

impl Nbd {
    /// Connects to the export that a URI names.
    ///
    /// # Errors
    /// An URI that makes no sense, a server that is not there (nobody waits for it here), refuses, or cannot keep a volume's promises.
    pub(super) async fn open(io: &Io, path: &Path, read_only: bool) -> std::result::Result<Nbd, OpenError> {
        let refuse = |why: String| OpenError::new(path, OpenErrorKind::Uri(why));
        let text = path.to_str().ok_or_else(|| refuse("it is no text".to_owned()))?;
        let uri = Uri::parse(text).map_err(|e| refuse(e.to_string()))?;
        let session = Session::open(io, uri, path.to_owned()).await.map_err(|e| match e {
            LinkError::Refused(why) => OpenError::new(path, OpenErrorKind::ServerRefuses(why)),
            LinkError::Tls(e) => OpenError::new(path, OpenErrorKind::Tls(e)),
            e => OpenError::new(path, OpenErrorKind::Unreachable).source(e),
        })?;
        let terms = session.inner.terms;
        if !read_only && terms.has(export::READ_ONLY) {
            return Err(OpenError::new(path, OpenErrorKind::ReadOnly));
        }
        let unsupported = |why: String| OpenError::new(path, OpenErrorKind::ServerRefuses(why));
        if !read_only && !terms.has(export::SEND_FLUSH) {
            let why = "the server cannot flush, so nothing that is written would be known to be safe";
            return Err(unsupported(why.to_owned()));
        }
        let (size, block) = (terms.export.size, u64::from(terms.sizes.minimum));
        if !size.is_multiple_of(block) {
            return Err(unsupported(format!("the server says {size} bytes in blocks of {block}")));
        }
        let most = u64::from(terms.sizes.maximum.min(DEFAULT_MAX_PAYLOAD));
        Ok(Nbd {
            session,
            path: path.to_owned(),
            read_only,
            alignment: if size.is_multiple_of(u64::from(SECTOR)) { SECTOR } else { 1 },
            block,
            payload: most - most % block,
            terms,
            parts: RangeLock::new(),
        })
    }

    /// The LUN ends: a server that is away is not waited for much longer.
    pub(super) fn ending(&self) {
        self.session.ending();
    }

    fn error(&self, kind: IoErrorKind, op: IoOp) -> IoError {
        IoError::new(kind, op).path(&self.path)
    }

    fn begin(&self, op: IoOp, at: ByteOffset, len: u64) -> Result<bool> {
        let inside = at.checked_add(len).is_some_and(|end| end.0 <= self.terms.export.size);
        if !inside || (at.0 | len) & u64::from(self.alignment - 1) != 0 {
            return Err(self.error(IoErrorKind::OutOfRange, op).at(at));
        }
        if self.read_only && matches!(op, IoOp::Write | IoOp::Discard) {
            return Err(self.error(IoErrorKind::ReadOnly, op).at(at));
        }
        Ok(len > 0)
    }

    /// The same failure, in the words of a volume.
    fn told(&self, op: IoOp, at: Option<ByteOffset>, e: CallError) -> IoError {
        let (kind, detail, source) = match e {
            CallError::Failed(why) => (IoErrorKind::Failed, why, None),
            CallError::Away(why) => (IoErrorKind::Unreachable, why, None),
            CallError::Server(code, words) => {
                let kind = match code {
                    error::ENOSPC => IoErrorKind::NoSpace,
                    error::EPERM if op != IoOp::Read => IoErrorKind::ReadOnly,
                    error::ENOTSUP => IoErrorKind::Unsupported,
                    error::EPERM | error::EIO | error::ENOMEM | error::EINVAL | error::EOVERFLOW => {
                        IoErrorKind::Medium
                    }
                    // Whatever else a server says is as good as EINVAL (proto.md, "Error values").
                    _ => IoErrorKind::Medium,
                };
                (kind, words, Some(io::Error::from_raw_os_error(code as i32)))
            }
        };
        let mut error = self.error(kind, op);
        error.at = at;
        error.source = source;
        if detail.is_empty() { error } else { error.detail(detail) }
    }

    async fn call(&self, call: Call) -> Answer {
        self.session.call(call).await
    }

    /// Where requests begin that make up a range, and how long they are.
    fn pieces(at: u64, len: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
        (0..len.div_ceil(most)).map(move |i| (at + i * most, most.min(len - i * most)))
    }

    /// The same call for each piece, side by side; the first that fails is told.
    async fn each(
        &self,
        op: IoOp,
        at: u64,
        len: u64,
        most: u64,
        call: impl Fn(u64, u64) -> Call,
    ) -> Result<()> {
        if len <= most {
            let answer = self.call(call(at, len)).await;
            return answer.map(drop).map_err(|e| self.told(op, Some(ByteOffset(at)), e));
        }
        let answers = join_all(Self::pieces(at, len, most).map(|(at, len)| self.call(call(at, len)))).await;
        for ((at, _), answer) in Self::pieces(at, len, most).zip(answers) {
            answer.map_err(|e| self.told(op, Some(ByteOffset(at)), e))?;
        }
        Ok(())
    }

    /// Whether that is in whole blocks of the server's.
    fn is_whole(&self, at: u64, len: u64) -> bool {
        (at | len) & (self.block - 1) == 0
    }

    /// The whole blocks around a range: where they begin, and how long they are.
    fn around(&self, at: u64, len: u64) -> (u64, u64) {
        let start = at - at % self.block;
        (start, (at + len).next_multiple_of(self.block) - start)
    }

    async fn read_whole(&self, at: u64, to: &Sg) -> Result<()> {
        let call = |from: u64, len: u64| Call {
            kind: command::READ,
            flags: 0,
            offset: from,
            length: len as u32,
            sg: to.slice((from - at) as usize, len as usize),
        };
        self.each(IoOp::Read, at, to.len() as u64, self.payload, call).await
    }

    async fn write_whole(&self, at: u64, from: &Sg, fua: bool) -> Result<()> {
        let flags = if fua { command::FUA } else { 0 };
        let call = |to: u64, len: u64| Call {
            kind: command::WRITE,
            flags,
            offset: to,
            length: len as u32,
            sg: from.slice((to - at) as usize, len as usize),
        };
        self.each(IoOp::Write, at, from.len() as u64, self.payload, call).await
    }

    async fn write_any(&self, at: u64, from: &Sg, fua: bool) -> Result<()> {
        let len = from.len() as u64;
        let (start, around) = self.around(at, len);
        let _guard = match (self.block > u64::from(self.alignment), self.is_whole(at, len)) {
            // Nobody writes parts of blocks.
            (false, _) => None,
            (true, true) => Some(self.parts.shared(start, around).await),
            (true, false) => Some(self.parts.exclusive(start, around).await),
        };
        if self.is_whole(at, len) {
            return self.write_whole(at, from, fua).await;
        }
        let whole = Buffer::zeroed(around as usize).sg();
        self.read_whole(start, &whole).await?;
        whole.copy_from((at - start) as usize, from);
        self.write_whole(start, &whole, fua).await
    }

    /// A write that was to be durable has failed. It may be the sync after it, and then what else the server had to sync is lost too; lack of
    /// space and of permission are known to be the write's own.
    fn after_durable_write(&self, e: IoError) -> IoError {
        if e.kind == IoErrorKind::Medium {
            self.session.inner.fail(format!("a write that was to be durable failed: {e}"));
        }
        e
    }

    async fn room(&self, op: IoOp, at: ByteOffset) -> Result<()> {
        self.session.make_room().await.map_err(|e| self.told(op, Some(at), e))
    }

    async fn zero(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        let op = IoOp::Discard;
        self.room(op, at).await?;
        if !self.terms.has(export::SEND_WRITE_ZEROES) {
            return self.write_zeros(at.0, len).await;
        }
        // Whole blocks in the middle; parts of one at the ends.
        let first = at.0.next_multiple_of(self.block).min(at.0 + len);
        let end = at.0 + len;
        let last = (end - end % self.block).max(first);
        if first > at.0 {
            self.write_zeros(at.0, first - at.0).await?;
        }
        if end > last {
            self.write_zeros(last, end - last).await?;
        }
        if last == first {
            return Ok(());
        }
        let _guard = match self.block > u64::from(self.alignment) {
            true => Some(self.parts.shared(first, last - first).await),
            false => None,
        };
        let flags = if may_unmap { 0 } else { command::NO_HOLE };
        for (at, len) in Self::pieces(first, last - first, LONGEST) {
            let call =
                Call { kind: command::WRITE_ZEROES, flags, offset: at, length: len as u32, sg: Sg::new() };
            self.call(call).await.map_err(|e| self.told(op, Some(ByteOffset(at)), e))?;
        }
        Ok(())
    }

    async fn write_zeros(&self, at: u64, len: u64) -> Result<()> {
        let page = Buffer::zeroed(64 << 10);
        let mut zeros = Sg::new();
        while (zeros.len() as u64) < ZERO_CHUNK.min(len) {
            zeros.append(&page.sg());
        }
        for (at, len) in Self::pieces(at, len, ZERO_CHUNK) {
            self.room(IoOp::Discard, ByteOffset(at)).await?;
            self.write_any(at, &zeros.slice(0, len as usize), false).await?;
        }
        Ok(())
    }
}

impl Volume for Nbd {
    fn limits(&self) -> Limits {
        let frees = self.terms.has(export::SEND_WRITE_ZEROES);
        Limits {
            capacity: self.terms.export.size,
            alignment: self.alignment,
            read_only: self.read_only,
            discard_granularity: if frees { self.terms.sizes.preferred } else { 0 },
            preferred_io: self.terms.sizes.preferred,
            // Nothing is known of what is under the server.
            atomic_write: 0,
            atomic_unit: 0,
            tells_free: false,
        }
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        let len = to.len() as u64;
        if !self.begin(IoOp::Read, at, len)? {
            return Ok(());
        }
        if self.is_whole(at.0, len) {
            return self.read_whole(at.0, to).await;
        }
        let (start, around) = self.around(at.0, len);
        let whole = Buffer::zeroed(around as usize).sg();
        self.read_whole(start, &whole).await?;
        to.copy_from(0, &whole.slice((at.0 - start) as usize, to.len()));
        Ok(())
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        if !self.begin(IoOp::Write, at, from.len() as u64)? {
            return Ok(());
        }
        self.room(IoOp::Write, at).await?;
        let fua = flags.fua && self.terms.has(export::SEND_FUA);
        let written = self.write_any(at.0, from, fua).await;
        if fua {
            return written.map_err(|e| self.after_durable_write(e));
        }
        written?;
        if flags.fua { self.flush().await } else { Ok(()) }
    }

    async fn flush(&self) -> Result<()> {
        if let Some(why) = self.session.inner.failed() {
            return Err(self.error(IoErrorKind::Failed, IoOp::Flush).detail(why));
        }
        // What others wrote is flushed too, if that can be: tuples made of it must not outlive it.
        if !self.terms.has(export::SEND_FLUSH) {
            return Ok(());
        }
        self.session.flush().await.map_err(|e| self.told(IoOp::Flush, None, e))?;
        // Another that ran beside it may have taken the error that was ours to see.
        match self.session.inner.failed() {
            None => Ok(()),
            Some(why) => Err(self.error(IoErrorKind::Failed, IoOp::Flush).detail(why)),
        }
    }

    /// Zeros that need no space. TRIM would free as much, and leaves open what is read afterwards (proto.md), so it is of no use here.
    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        if !self.begin(IoOp::Discard, at, len)? {
            return Ok(());
        }
        self.zero(at, len, true).await
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        if !self.begin(IoOp::Discard, at, len)? {
            return Ok(());
        }
        self.zero(at, len, may_unmap).await
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        if !self.begin(IoOp::Map, at, len)? {
            return Ok(Vec::new());
        }
        let run = |start: u64, len: u64, kind| Extent {
            start: ByteOffset(start),
            len,
            kind,
            host_offset: matches!(kind, ExtentKind::Data | ExtentKind::Zero).then_some(start),
            depth: 0,
        };
        if self.terms.allocation.is_none() {
            return Ok(vec![run(at.0, len, ExtentKind::Data)]);
        }
        let (start, around) = self.around(at.0, len.min(LONGEST));
        let call = Call {
            kind: command::BLOCK_STATUS,
            flags: 0,
            offset: start,
            length: around as u32,
            sg: Sg::new(),
        };
        let told = self.call(call).await.map_err(|e| self.told(IoOp::Map, Some(at), e))?;
        let (mut runs, mut begins, end) = (Vec::<Extent>::new(), start, at.0 + len);
        for extent in told {
            let (from, to) = (begins.max(at.0), (begins + u64::from(extent.length)).min(end));
            begins += u64::from(extent.length);
            if from >= to {
                continue;
            }
            let kind = match (extent.flags & allocation::HOLE != 0, extent.flags & allocation::ZERO != 0) {
                (true, true) => ExtentKind::Hole,
                (false, true) => ExtentKind::Zero,
                // A hole that need not read as zeros is data that nobody wrote.
                (_, false) => ExtentKind::Data,
            };
            match runs.last_mut().filter(|last| last.kind == kind) {
                Some(last) => last.len += to - from,
                None => runs.push(run(from, to - from, kind)),
            }
        }
        match runs.is_empty() {
            false => Ok(runs),
            true => Err(self
                .error(IoErrorKind::Medium, IoOp::Map)
                .at(at)
                .detail("the server's map leaves it out")),
        }
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        if capacity == self.terms.export.size {
            return Ok(());
        }
        let why = "the size of an NBD export is its server's";
        Err(self.error(IoErrorKind::Unsupported, IoOp::Resize).detail(why))
    }

    async fn close(&self) -> Result<()> {
        self.session.ending();
        // Of what others wrote nobody here has promised anything.
        if self.read_only { Ok(()) } else { self.flush().await }
    }
}
