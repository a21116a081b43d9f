//! LOG SENSE pages (SPC-4 7.3, SBC-4 6.4): supported pages and subpages, logical block provisioning, informational exceptions.

/// Page codes that are supported, 00 aside.
const PAGES: &[u8] = &[LOGICAL_BLOCK_PROVISIONING, INFORMATIONAL_EXCEPTIONS];
const LOGICAL_BLOCK_PROVISIONING: u8 = 0x0c;
const INFORMATIONAL_EXCEPTIONS: u8 = 0x2f;

/// Parameter code, and THRESHOLD RESOURCE, of the available LBA mapping resources.
pub(super) const AVAILABLE: u8 = 0x01;

/// The page with its header, or `None` if it is not supported. Parameters before `pointer` are left out; `None` too if
/// there are none from there on, though the page has some. `available`: threshold sets that are free beneath the volume, if they can be
/// counted.
pub(super) fn page(code: u8, subpage: u8, pointer: u16, available: Option<u32>) -> Option<Vec<u8>> {
    let mut out = vec![code, subpage, 0, 0];
    match (code, subpage) {
        (0x00, 0x00) => {
            out.push(0x00);
            out.extend(PAGES);
        }
        (0x00, 0xff) => {
            for code in [0x00].iter().chain(PAGES) {
                out.extend([*code, 0x00, *code, 0xff]);
            }
        }
        (code, 0xff) if PAGES.contains(&code) => out.extend([code, 0x00, code, 0xff]),
        (LOGICAL_BLOCK_PROVISIONING, 0x00) => match available {
            // SCOPE = 10b: they are not this logical unit's alone.
            Some(count) if pointer <= u16::from(AVAILABLE) => {
                out.extend([0, AVAILABLE, 0x03, 8]);
                out.extend(count.to_be_bytes());
                out.extend([0x02, 0, 0, 0]);
            }
            Some(_) => return None,
            None => {}
        },
        // Parameter 0000h: no exception, temperature unknown.
        (INFORMATIONAL_EXCEPTIONS, 0x00) if pointer == 0 => out.extend([0, 0, 0x03, 0x04, 0, 0, 0xff, 0]),
        _ => return None,
    }
    if subpage == 0xff {
        out[0] |= 0x40; // SPF
    }
    let len = (out.len() - 4) as u16;
    out[2..4].copy_from_slice(&len.to_be_bytes());
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_that_is_listed_can_be_read() {
        for code in page(0, 0, 0, None).unwrap().split_off(4) {
            assert!(page(code, 0, 0, None).is_some(), "{code:#x}");
        }
        let all = page(0, 0xff, 0, None).unwrap();
        assert_eq!(all[..4], [0x40, 0xff, 0, 12]);
        for pair in all[4..].chunks(2) {
            let p = page(pair[0], pair[1], 0, None).unwrap();
            assert_eq!((p[0] & 0x3f, p[1], p[3] as usize), (pair[0], pair[1], p.len() - 4));
        }
        assert_eq!(page(0x0c, 0xff, 0, None).unwrap()[4..], [0x0c, 0, 0x0c, 0xff]);
        assert_eq!(page(0x0c, 0, 0, None).unwrap().len(), 4);
        let counted = [0x0c, 0, 0, 12, 0, 1, 3, 8, 0, 0, 0, 77, 2, 0, 0, 0];
        assert_eq!(page(0x0c, 0, 1, Some(77)).unwrap(), counted);
        assert_eq!(page(0x0c, 0, 2, Some(77)), None);
        for (code, subpage) in [(0x0d, 0), (0x0c, 1), (0x0d, 0xff), (0x3f, 0xff)] {
            assert_eq!(page(code, subpage, 0, None), None);
        }
    }
}
