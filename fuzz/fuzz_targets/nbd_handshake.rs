//! Options and answers of NBD's handshake, and its URIs: facts or an error, and never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcmu_dif::nbd::{handshake, request::Request, uri::Uri};

fuzz_target!(|data: &[u8]| {
    let (mut export, mut sizes) = (None, handshake::BlockSizes::default());
    let _ = handshake::parse_info(data, &mut export, &mut sizes);
    assert!(sizes.minimum.is_power_of_two() && sizes.maximum >= 512);
    let _ = handshake::parse_context(data);
    if let Ok((name, wanted)) = handshake::parse_go(data) {
        assert_eq!(handshake::go(&name, &wanted), data);
    }
    if let Ok((name, queries)) = handshake::parse_contexts(data) {
        let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
        assert_eq!(handshake::contexts(&name, &queries), data);
    }
    if let Some(head) = data.first_chunk() {
        let _ = Request::parse(head);
    }
    if let Ok(uri) = std::str::from_utf8(data).map(Uri::parse)
        && let Ok(uri) = uri
    {
        let plain = Uri::parse(&uri.to_string());
        assert!(plain.is_ok_and(|p| p.place == uri.place && p.export == uri.export));
    }
});
