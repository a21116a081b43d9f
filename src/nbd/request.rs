//! Requests: 28 bytes, and the data of a write after them.

use super::{Broken, Cursor, REQUEST_MAGIC};

/// Bytes of a request without its data.
pub const LEN: usize = 28;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Of [`super::command`].
    pub flags: u16,
    /// Of [`super::command`].
    pub kind: u16,
    /// What the reply is known by.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// As it is sent.
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// One that was received.
    ///
    /// # Errors
    /// That it is none: where the next begins cannot be told then.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Request, Broken> {
        let mut c = Cursor::new(bytes);
        let magic = c.u32()?;
        if magic != REQUEST_MAGIC {
            return Err(Broken::new(format!("a request begins with {magic:#010x}")));
        }
        Ok(Request { flags: c.u16()?, kind: c.u16()?, cookie: c.u64()?, offset: c.u64()?, length: c.u32()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written_and_nothing_else_is_one() {
        let request = Request { flags: 1, kind: 6, cookie: 1 << 63, offset: u64::MAX - 5, length: 7 };
        let mut bytes = request.to_bytes();
        assert_eq!(Request::parse(&bytes), Ok(request));
        bytes[3] ^= 1;
        assert!(Request::parse(&bytes).is_err());
    }
}
