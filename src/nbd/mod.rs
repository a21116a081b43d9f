//! NBD on the wire: numbers, messages and their checks, as the NBD project's `doc/proto.md` and `doc/uri.md` have them.
//!
//! Pure functions over bytes: nothing here does I/O, so client (`image/nbd`) and server (`export`) speak by the same words, and the
//! fuzzer reaches all that parses what a stranger sends.

pub mod handshake;
pub mod reply;
pub mod request;
pub mod uri;

/// The first word of a server: `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// The second word of a newstyle server, and the first of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The first word of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The first word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The first word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The first word of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// The port that IANA has for it.
pub const PORT: u16 = 10809;
/// The longest string of the protocol: names of exports and contexts, messages.
pub const MAX_STRING: usize = 4096;
/// Payload that a server takes which announces no limit (proto.md, "Block size constraints").
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;
/// The context that tells holes from data.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Before the name of a dirty bitmap: QEMU's context that tells what it has marked (docs/interop/nbd.txt).
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// QEMU's context that tells which image of a chain has the data.
pub const QEMU_ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// Handshake flags, of server and client alike.
pub mod flag {
    /// NBD_FLAG_FIXED_NEWSTYLE.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// NBD_FLAG_NO_ZEROES.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// NBD_OPT_*.
pub mod option {
    /// The export, and no way to say what is wrong with it.
    pub const EXPORT_NAME: u32 = 1;
    /// The client goes.
    pub const ABORT: u32 = 2;
    /// Which exports are there?
    pub const LIST: u32 = 3;
    /// Encrypt from here on.
    pub const STARTTLS: u32 = 5;
    /// What is that export like?
    pub const INFO: u32 = 6;
    /// The same, and begin.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// These contexts, please.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// NBD_REP_*.
pub mod answer {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in all errors.
    pub const ERROR: u32 = 1 << 31;
    /// The server does not know the option.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// It knows it, and will not.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR | 4;
    /// Not without TLS.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server goes.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// Not without asking for the block size.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    /// Too much at once.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// NBD_INFO_*.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Block size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// NBD_FLAG_*: what an export is and can do.
pub mod export {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// READ with DF is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection is one for all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// NBD_CMD_*.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// The client goes; no reply.
    pub const DISCONNECT: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// These bytes are not needed any more.
    pub const TRIM: u16 = 4;
    /// Zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// The map of a range.
    pub const BLOCK_STATUS: u16 = 7;
    /// Flag: on stable storage before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Flag of WRITE_ZEROES: keep the space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Flag of READ: one chunk.
    pub const DONT_FRAGMENT: u16 = 1 << 2;
    /// Flag of BLOCK_STATUS: one extent.
    pub const REQUEST_ONE: u16 = 1 << 3;
    /// Flag of WRITE_ZEROES: only if that is faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types and flags of chunks.
pub mod chunk {
    /// Flag: the last of the reply.
    pub const DONE: u16 = 1 << 0;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Bytes at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Bit of all errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error, and where.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Bits of an extent of `base:allocation`.
pub mod allocation {
    /// NBD_STATE_HOLE: no space is kept.
    pub const HOLE: u32 = 1 << 0;
    /// NBD_STATE_ZERO: reads as zeros.
    pub const ZERO: u32 = 1 << 1;
}

/// Bits of an extent of a dirty bitmap.
pub mod dirty {
    /// NBD_STATE_DIRTY.
    pub const DIRTY: u32 = 1 << 0;
}

/// Error numbers: Linux' own, but only these.
pub mod error {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// Makes no sense.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// Does not fit.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server goes.
    pub const ESHUTDOWN: u32 = 108;
}

/// What the other end sent that it may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

impl Broken {
    pub(crate) fn new(what: impl Into<String>) -> Broken {
        Broken(what.into())
    }
}

/// What a stranger says, fit for a log: no control characters, and not without end.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_STRING)]);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// Big-endian numbers out of a message, and no further than its end.
pub(crate) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor(bytes)
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Broken> {
        let Some((head, rest)) = self.0.split_at_checked(len) else {
            return Err(Broken::new(format!("a message ends {} bytes early", len - self.0.len())));
        };
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Broken> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Broken> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Broken> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Broken> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length before it.
    pub(crate) fn string(&mut self) -> Result<String, Broken> {
        let len = self.u32()? as usize;
        if len > MAX_STRING {
            return Err(Broken::new(format!("a string of {len} bytes, where {MAX_STRING} are the most")));
        }
        let bytes = self.take(len)?;
        let text = std::str::from_utf8(bytes).map_err(|_| Broken::new("a string that is no UTF-8"))?;
        Ok(text.to_owned())
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }
}
