//! Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor"): a raw deflate stream that gives one cluster.
//! Read only; a write to one goes to a new cluster.

use flate2::{Decompress, FlushDecompress, Status};

/// Inflates one cluster. `stream` may be longer than the deflate data; what comes out must fill `cluster` exactly.
///
/// # Errors
/// Why it does not.
pub fn inflate(stream: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn a_stream_with_padding_gives_its_cluster() {
        let data: Vec<u8> = (0..65536u32).map(|i| (i / 7) as u8).collect();
        let mut stream = deflate(&data);
        stream.resize(stream.len() + 300, 0xee);
        let mut out = vec![0; data.len()];
        assert_eq!(inflate(&stream, &mut out), Ok(()));
        assert_eq!(out, data);
    }

    #[test]
    fn rubbish_and_short_streams_are_errors() {
        let stream = deflate(&[7; 4096]);
        let mut out = vec![0; 8192];
        assert!(inflate(&stream, &mut out).is_err());
        assert!(inflate(&stream[..stream.len() / 2], &mut out[..4096]).is_err());
        assert!(inflate(&[0xff; 64], &mut out).is_err());
        assert!(inflate(&[], &mut out).is_err());
    }
}
