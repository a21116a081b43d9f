//! Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor"): a raw deflate stream or a zstd frame that gives
//! one cluster. Read only; a write to one goes to a new cluster.

use std::io::Read;

use flate2::{Decompress, FlushDecompress, Status};
use ruzstd::decoding::StreamingDecoder;

/// How an image's compressed clusters are compressed: one way for all of them (header field `compression_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// 0: deflate, without zlib's header.
    Zlib,
    /// 1: zstd (RFC 8878).
    Zstd,
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        })
    }
}

/// The largest window that a zstd frame may ask memory for: what RFC 8878 (3.1.1.1.2) wants of every decoder, and four times the
/// largest cluster.
const MAX_WINDOW: u64 = 8 << 20;

/// Expands one cluster. `stream` may be longer than the compressed data; what comes out must fill `cluster` exactly.
///
/// # Errors
/// Why it does not.
pub fn expand(how: Compression, stream: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    match how {
        Compression::Zlib => inflate(stream, cluster),
        Compression::Zstd => unzstd(stream, cluster),
    }
}

fn inflate(stream: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    let mut state = Decompress::new(false);
    loop {
        let (read, written) = (state.total_in() as usize, state.total_out() as usize);
        let (input, output) = (&stream[read..], &mut cluster[written..]);
        match state.decompress(input, output, FlushDecompress::Finish) {
            Ok(Status::StreamEnd) if state.total_out() as usize == cluster.len() => return Ok(()),
            Ok(Status::StreamEnd) => return Err("the compressed data are shorter than a cluster"),
            // The stream may go on in what is not ours; what matters is that the cluster is full.
            Ok(_) if state.total_out() as usize == cluster.len() => return Ok(()),
            Ok(_) if state.total_in() as usize == read && state.total_out() as usize == written => {
                return Err("the compressed data are cut short");
            }
            Ok(_) => {}
            Err(_) => return Err("the compressed data are not a deflate stream"),
        }
    }
}

fn unzstd(mut stream: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    if window(stream).ok_or("the compressed data are not a zstd frame")? > MAX_WINDOW {
        return Err("the zstd frame asks for a window of more than 8 MiB");
    }
    let frame = StreamingDecoder::new(&mut stream);
    let mut frame = frame.map_err(|_| "the compressed data are not a zstd frame")?;
    // One frame is one cluster; what follows is padding.
    frame.read_exact(cluster).map_err(|_| "the zstd frame is damaged, or shorter than a cluster")
}

/// The window that a zstd frame asks for, in bytes (RFC 8878, 3.1.1.1). `None` if no frame begins here.
fn window(stream: &[u8]) -> Option<u64> {
    let [0x28, 0xb5, 0x2f, 0xfd, descriptor, rest @ ..] = stream else { return None };
    let field = |at: usize, len: usize| {
        let bytes = rest.get(at..at + len)?;
        Some(bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b)))
    };
    // Bit 5, single segment: no window descriptor, and the window is the size of the content.
    if descriptor & 0x20 == 0 {
        let byte = field(0, 1)?;
        let base = 1u64 << (10 + (byte >> 3));
        return Some(base + base / 8 * (byte & 7));
    }
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    match descriptor >> 6 {
        0 => field(dictionary, 1),
        1 => Some(field(dictionary, 2)? + 256),
        2 => field(dictionary, 4),
        _ => field(dictionary, 8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    type Compress = fn(&[u8]) -> Vec<u8>;

    const BOTH: [(Compression, Compress); 2] = [(Compression::Zlib, deflate), (Compression::Zstd, zstd)];

    #[test]
    fn a_stream_with_padding_gives_its_cluster() {
        for (how, compress) in BOTH {
            for len in [512, 65536, 2 << 20] {
                let data: Vec<u8> = (0..len).map(|i: u32| (i / 7) as u8).collect();
                let mut stream = compress(&data);
                stream.resize(stream.len() + 300, 0xee);
                let mut out = vec![0; data.len()];
                assert_eq!(expand(how, &stream, &mut out), Ok(()), "{how} {len}");
                assert!(out == data, "{how} {len}");
            }
        }
    }

    #[test]
    fn rubbish_and_short_streams_are_errors() {
        for (how, compress) in BOTH {
            let stream = compress(&(0..4096u32).map(|i| ((i * i) >> 3) as u8).collect::<Vec<_>>());
            let mut out = vec![0; 8192];
            assert!(expand(how, &stream, &mut out).is_err(), "{how}: half a cluster");
            for len in 0..stream.len() - 1 {
                assert!(expand(how, &stream[..len], &mut out[..4096]).is_err(), "{how}: {len} bytes");
            }
            assert!(expand(how, &[0xff; 64], &mut out).is_err());
        }
    }

    #[test]
    fn a_frame_that_asks_for_much_memory_is_refused_before_it_gets_any() {
        let frame = |descriptor: u8, rest: &[u8]| [&[0x28, 0xb5, 0x2f, 0xfd, descriptor], rest].concat();
        assert_eq!(window(&frame(0, &[0])), Some(1 << 10));
        assert_eq!(window(&frame(0, &[13 << 3])), Some(MAX_WINDOW));
        assert_eq!(window(&frame(0x20, &[200])), Some(200));
        assert_eq!(window(&frame(0x60, &[1, 1])), Some(257 + 256));
        assert_eq!(window(&frame(0xa1, &[9, 0, 0, 1, 0])), Some(1 << 16));
        assert_eq!(window(&frame(0xe0, &[0xff; 8])), Some(u64::MAX));
        for short in [&b""[..], b"\x28\xb5\x2f", &frame(0xe0, &[1; 7]), &frame(0, &[])] {
            assert_eq!(window(short), None);
        }
        for huge in [frame(0, &[0xff]), frame(0, &[13 << 3 | 1]), frame(0xe0, &[0xff; 8])] {
            let refused = expand(Compression::Zstd, &huge, &mut [0; 512]).unwrap_err();
            assert!(refused.contains("8 MiB"), "{refused}");
        }
    }
}
