//! The handshake: options that a client sends, and what a server answers (proto.md, "Fixed newstyle negotiation").
//!
//! Encoders and parsers of both sides stand side by side.

use super::{
    BASE_ALLOCATION, Broken, Cursor, DEFAULT_MAX_PAYLOAD, MAX_STRING, NBD_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, info,
};

/// Bytes of a server's greeting.
pub const GREETING_LEN: usize = 18;
/// Bytes before an option's data.
pub const OPTION_HEAD_LEN: usize = 16;
/// Bytes before the data of an answer to an option.
pub const ANSWER_HEAD_LEN: usize = 20;
/// Data of an option or of its answer that is looked at; what is longer is an attack.
pub const MAX_DATA: u32 = 64 << 10;

/// What a server says first.
pub fn greeting(flags: u16) -> [u8; GREETING_LEN] {
    let mut out = [0; GREETING_LEN];
    out[..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&flags.to_be_bytes());
    out
}

/// The handshake flags of a server.
///
/// # Errors
/// That it is none, or one of the old style.
pub fn parse_greeting(bytes: &[u8; GREETING_LEN]) -> Result<u16, Broken> {
    let mut c = Cursor::new(bytes);
    if c.u64()? != NBD_MAGIC {
        return Err(Broken::new("this is no NBD server"));
    }
    match c.u64()? {
        OPTION_MAGIC => c.u16(),
        0x0000_4202_8186_1253 => {
            Err(Broken::new("the server speaks the old style of NBD, which knows no options"))
        }
        other => Err(Broken::new(format!("a server's second word is {other:#018x}"))),
    }
}

/// An option with its data.
pub fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_HEAD_LEN + data.len());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

/// Number and length of an option.
///
/// # Errors
/// That it is none.
pub fn parse_option_head(bytes: &[u8; OPTION_HEAD_LEN]) -> Result<(u32, u32), Broken> {
    let mut c = Cursor::new(bytes);
    match c.u64()? {
        OPTION_MAGIC => Ok((c.u32()?, c.u32()?)),
        other => Err(Broken::new(format!("an option begins with {other:#018x}"))),
    }
}

/// An answer to an option.
pub fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(ANSWER_HEAD_LEN + data.len());
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

/// Kind and length of an answer to that option.
///
/// # Errors
/// That it is none, answers another option, or is too long.
pub fn parse_answer_head(bytes: &[u8; ANSWER_HEAD_LEN], option: u32) -> Result<(u32, u32), Broken> {
    let mut c = Cursor::new(bytes);
    let magic = c.u64()?;
    if magic != OPTION_REPLY_MAGIC {
        return Err(Broken::new(format!("an answer begins with {magic:#018x}")));
    }
    let (of, kind, len) = (c.u32()?, c.u32()?, c.u32()?);
    if of != option {
        return Err(Broken::new(format!("option {option} is answered as {of}")));
    }
    if len > MAX_DATA {
        return Err(Broken::new(format!("an answer of {len} bytes to option {option}")));
    }
    Ok((kind, len))
}

/// Block size constraints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it.
    pub minimum: u32,
    /// I/O is cheapest in multiples of it.
    pub preferred: u32,
    /// Payload of a request at most.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// Of a server that says nothing of them (proto.md: 1, 4096, 32 MiB).
    fn default() -> BlockSizes {
        BlockSizes { minimum: 1, preferred: 4096, maximum: DEFAULT_MAX_PAYLOAD }
    }
}

impl BlockSizes {
    /// NBD_INFO_BLOCK_SIZE.
    pub fn to_info(self) -> Vec<u8> {
        let mut out = info::BLOCK_SIZE.to_be_bytes().to_vec();
        [self.minimum, self.preferred, self.maximum].iter().for_each(|n| out.extend(n.to_be_bytes()));
        out
    }
}

/// What a server says of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Of [`super::export`].
    pub flags: u16,
}

impl Export {
    /// NBD_INFO_EXPORT.
    pub fn to_info(self) -> Vec<u8> {
        let mut out = info::EXPORT.to_be_bytes().to_vec();
        out.extend(self.size.to_be_bytes());
        out.extend(self.flags.to_be_bytes());
        out
    }
}

/// Looks at one NBD_REP_INFO, and keeps what is known of it.
///
/// # Errors
/// Facts that cannot be.
pub fn parse_info(data: &[u8], export: &mut Option<Export>, sizes: &mut BlockSizes) -> Result<(), Broken> {
    let mut c = Cursor::new(data);
    match c.u16()? {
        info::EXPORT => {
            let told = Export { size: c.u64()?, flags: c.u16()? };
            if i64::try_from(told.size).is_err() {
                return Err(Broken::new(format!("an export of {} bytes", told.size)));
            }
            *export = Some(told);
        }
        info::BLOCK_SIZE => {
            let told = BlockSizes { minimum: c.u32()?, preferred: c.u32()?, maximum: c.u32()? };
            let BlockSizes { minimum, preferred, maximum } = told;
            let sound = minimum.is_power_of_two()
                && minimum <= 64 << 10
                && preferred.is_power_of_two()
                && preferred >= minimum.max(512)
                && maximum >= minimum.max(512)
                && (maximum == u32::MAX || maximum.is_multiple_of(minimum));
            if !sound {
                return Err(Broken::new(format!("block sizes {minimum}, {preferred} and {maximum}")));
            }
            *sizes = told;
        }
        // What else there is to know does not matter here.
        _ => {}
    }
    Ok(())
}

/// The data of INFO and GO: the export, and what is to be told of it.
pub fn go(export: &str, wanted: &[u16]) -> Vec<u8> {
    let mut out = string(export);
    out.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|w| out.extend(w.to_be_bytes()));
    out
}

/// The export that an INFO or GO names, and what is to be told of it.
///
/// # Errors
/// That it makes no sense.
pub fn parse_go(data: &[u8]) -> Result<(String, Vec<u16>), Broken> {
    let mut c = Cursor::new(data);
    let name = c.string()?;
    let wanted = (0..c.u16()?).map(|_| c.u16()).collect::<Result<_, _>>()?;
    match c.rest() {
        [] => Ok((name, wanted)),
        rest => Err(Broken::new(format!("{} bytes after the end", rest.len()))),
    }
}

/// The data of SET_META_CONTEXT and LIST_META_CONTEXT.
pub fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = string(export);
    out.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| out.extend(string(q)));
    out
}

/// The export and the queries of a SET_META_CONTEXT or LIST_META_CONTEXT.
///
/// # Errors
/// That it makes no sense.
pub fn parse_contexts(data: &[u8]) -> Result<(String, Vec<String>), Broken> {
    let mut c = Cursor::new(data);
    let name = c.string()?;
    // Each has four bytes at least, so their number is bounded by what was received.
    let queries = (0..c.u32()?).map(|_| c.string()).collect::<Result<_, _>>()?;
    match c.rest() {
        [] => Ok((name, queries)),
        rest => Err(Broken::new(format!("{} bytes after the end", rest.len()))),
    }
}

/// NBD_REP_META_CONTEXT.
pub fn context(id: u32, name: &str) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out
}

/// The number of `base:allocation`, if that is what an NBD_REP_META_CONTEXT names.
///
/// # Errors
/// That it is too short.
pub fn parse_context(data: &[u8]) -> Result<Option<u32>, Broken> {
    let mut c = Cursor::new(data);
    let id = c.u32()?;
    Ok((c.rest() == BASE_ALLOCATION.as_bytes()).then_some(id))
}

fn string(text: &str) -> Vec<u8> {
    debug_assert!(text.len() <= MAX_STRING);
    let mut out = (text.len() as u32).to_be_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::{answer as kind, option as number};

    #[test]
    fn what_one_side_writes_the_other_reads() {
        assert_eq!(parse_greeting(&greeting(3)), Ok(3));
        let sent = option(number::GO, &go("disk", &[info::BLOCK_SIZE]));
        let (head, data) = sent.split_first_chunk().unwrap();
        assert_eq!(parse_option_head(head), Ok((number::GO, data.len() as u32)));
        assert_eq!(parse_go(data), Ok(("disk".to_owned(), vec![info::BLOCK_SIZE])));
        let sent = answer(number::GO, kind::INFO, &Export { size: 5, flags: 1 }.to_info());
        let (head, data) = sent.split_first_chunk().unwrap();
        assert_eq!(parse_answer_head(head, number::GO), Ok((kind::INFO, data.len() as u32)));
        let (mut export, mut sizes) = (None, BlockSizes::default());
        parse_info(data, &mut export, &mut sizes).unwrap();
        assert_eq!(export, Some(Export { size: 5, flags: 1 }));
        let told = BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 };
        parse_info(&told.to_info(), &mut export, &mut sizes).unwrap();
        assert_eq!(sizes, told);
        let asked = contexts("disk", &[BASE_ALLOCATION, "x"]);
        assert_eq!(parse_contexts(&asked), Ok(("disk".into(), vec![BASE_ALLOCATION.into(), "x".into()])));
        assert_eq!(parse_context(&context(7, BASE_ALLOCATION)), Ok(Some(7)));
        assert_eq!(parse_context(&context(7, "qemu:dirty-bitmap:x")), Ok(None));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let (mut export, mut sizes) = (None, BlockSizes::default());
        for (minimum, preferred, maximum) in [
            (0, 4096, 4096),
            (3, 4096, 4096),
            (1 << 17, 1 << 17, 1 << 17),
            (512, 100, 4096),
            (512, 512, 700),
            (1, 512, 5),
        ] {
            let told = BlockSizes { minimum, preferred, maximum };
            assert!(parse_info(&told.to_info(), &mut export, &mut sizes).is_err(), "{told:?}");
        }
        assert!(parse_info(&Export { size: 1 << 63, flags: 1 }.to_info(), &mut export, &mut sizes).is_err());
        assert!(parse_info(&[0], &mut export, &mut sizes).is_err());
        assert!(parse_go(&[0, 0, 0, 9, b'x']).is_err());
        assert!(parse_go(&[0xff; 8]).is_err());
        assert!(parse_contexts(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).is_err());
        let mut longer = go("x", &[]);
        longer.push(0);
        assert!(parse_go(&longer).is_err());
        let head = answer(number::GO, kind::ACK, &[]);
        assert!(parse_answer_head(head.first_chunk().unwrap(), number::INFO).is_err());
    }
}
