//! What an NBD server answers to one request, mostly valid: the reply as it was asked for, or an error. Never a byte outside the request's
//! range, and never more memory than was asked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcmu_dif::nbd::reply::{Asked, Head, Payload, Pending};

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*head)
}

fn skip(bytes: &mut &[u8], len: usize) -> Option<()> {
    *bytes = bytes.get(len..)?;
    Some(())
}

/// Takes replies until they end, are broken, or are complete.
fn receive(mut bytes: &[u8], mut pending: Pending, length: usize) -> Option<()> {
    let mut written = vec![false; length];
    let mut write = |at: usize, len: usize| {
        for byte in &mut written[at..at + len] {
            assert!(!std::mem::replace(byte, true), "written twice");
        }
    };
    while !pending.is_complete() {
        let payload = match Head::parse(&take(&mut bytes)?).ok()? {
            Head::Simple { error, .. } => pending.simple(error).ok()?,
            Head::Chunk { flags, kind, .. } => {
                pending.chunk(flags, kind, u32::from_be_bytes(take(&mut bytes)?)).ok()?
            }
        };
        match payload {
            Payload::None => {}
            Payload::AllData(len) => {
                write(0, len);
                skip(&mut bytes, len)?;
            }
            Payload::Data(len) => {
                write(pending.data_at(take(&mut bytes)?, len).ok()?, len);
                skip(&mut bytes, len)?;
            }
            Payload::Small(len) => {
                let small = bytes.get(..len)?;
                if let Some((at, len)) = pending.small(small).ok()? {
                    write(at, len);
                }
                skip(&mut bytes, len)?;
            }
        }
    }
    if let Ok(Ok(extents)) = pending.outcome() {
        assert!(extents.iter().all(|e| e.length > 0));
        assert!(!extents.is_empty() || length == 0 || written.iter().all(|w| *w), "not all of it has come");
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, bytes)) = data.split_first() else { return };
    let structured = how & 4 != 0;
    let (asked, length) = match how & 3 {
        0 => (Asked::Read { offset: 4096, length: 1024 }, 1024),
        1 => (Asked::Status { context: 1, length: 4096 }, 0),
        2 => (Asked::Read { offset: u64::MAX - 4095, length: 512 }, 512),
        _ => (Asked::Done, 0),
    };
    let _ = receive(bytes, Pending::new(asked, structured), length);
});
