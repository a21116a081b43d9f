//! Mode pages 01, 08, 0A and 1C (SPC-4 7.5, SBC-4 6.5): how they read, which bits an initiator may change, how they are saved.
//!
//! All that can change is in [`Settings`]; a page is a function of them, so a MODE SELECT is accepted exactly if some settings
//! give the bytes it sent.

use super::sense::Sense;

/// What initiators can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settings {
    /// WCE: writes are acknowledged before they are on stable storage.
    pub write_cache: bool,
    /// D_SENSE: sense data in descriptor format.
    pub descriptor_sense: bool,
    /// SWP: the logical unit is write protected.
    pub write_protect: bool,
}

/// PAGE CONTROL of MODE SENSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Control {
    Current,
    Changeable,
    Default,
    Saved,
}

impl Control {
    pub fn from_bits(bits: u8) -> Control {
        match bits & 3 {
            0 => Control::Current,
            1 => Control::Changeable,
            2 => Control::Default,
            _ => Control::Saved,
        }
    }
}

const ERROR_RECOVERY: u8 = 0x01;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const INFORMATIONAL_EXCEPTIONS: u8 = 0x1c;
/// The pages, in the order in which MODE SENSE returns them all.
const CODES: &[u8] = &[ERROR_RECOVERY, CACHING, CONTROL, INFORMATIONAL_EXCEPTIONS];
/// PAGE CODE of "all pages".
const ALL: u8 = 0x3f;

/// One page; PS (byte 0, bit 7) is left 0. `None` if it is not supported.
fn page(code: u8, s: &Settings) -> Option<Vec<u8>> {
    let bit = |on: bool, bit: u8| if on { 1 << bit } else { 0 };
    let (len, fields): (usize, &[(usize, u8)]) = match code {
        // AWRE and ARRE: what the storage beneath does by itself.
        ERROR_RECOVERY => (12, &[(2, 0xc0)]),
        CACHING => (20, &[(2, bit(s.write_cache, 2))]),
        // Unrestricted reordering; TAS: what the kernel does with other initiators' commands.
        CONTROL => {
            (12, &[(2, bit(s.descriptor_sense, 2)), (3, 0x10), (4, bit(s.write_protect, 3)), (5, 0x40)])
        }
        INFORMATIONAL_EXCEPTIONS => (12, &[(2, 0x08)]), // DEXCPT
        _ => return None,
    };
    let mut out = vec![0; len];
    out[0] = code;
    out[1] = (len - 2) as u8;
    for (at, value) in fields {
        out[*at] = *value;
    }
    Some(out)
}

/// The bits of a page that can be changed: those in which the pages of opposite settings differ.
fn changeable(code: u8) -> Option<Vec<u8>> {
    let [off, on] = [false, true]
        .map(|b| page(code, &Settings { write_cache: b, descriptor_sense: b, write_protect: b }));
    let (off, on) = (off?, on?);
    let mut out: Vec<u8> = off.iter().zip(&on).map(|(a, b)| a ^ b).collect();
    out[..2].copy_from_slice(&off[..2]);
    Some(out)
}

/// The pages that MODE SENSE asks for, joined. `values` are those of the page control that was asked for, and ignored for
/// [`Control::Changeable`]; `savable` sets PS. `None` if page or subpage is not supported.
pub(super) fn sense(
    code: u8,
    subpage: u8,
    control: Control,
    values: &Settings,
    savable: bool,
) -> Option<Vec<u8>> {
    if subpage != 0x00 && subpage != 0xff {
        return None;
    }
    let one = |code: u8| {
        let mut page = match control {
            Control::Changeable => changeable(code)?,
            _ => page(code, values)?,
        };
        if savable && is_savable(code) {
            page[0] |= 0x80;
        }
        Some(page)
    };
    match code {
        ALL => Some(CODES.iter().filter_map(|c| one(*c)).flatten().collect()),
        _ => one(code),
    }
}

fn is_savable(code: u8) -> bool {
    matches!(code, CACHING | CONTROL)
}

/// The settings after the pages of a MODE SELECT, which start at byte `base` of its parameter list.
///
/// # Errors
/// A page that is not supported, is cut short, or differs where nothing can be changed; then nothing is changed.
pub(super) fn select(pages: &[u8], base: usize, now: &Settings) -> Result<Settings, Sense> {
    let mut settings = *now;
    let mut rest = pages;
    while !rest.is_empty() {
        let at = base + (pages.len() - rest.len());
        let wrong = |offset: usize| Sense::invalid_parameter((at + offset) as u16);
        let &[head, len, ..] = rest else { return Err(Sense::parameter_list_length()) };
        let code = head & 0x3f;
        if head & 0x40 != 0 {
            return Err(wrong(0)); // SPF: no subpages
        }
        let current = page(code, &settings).ok_or(wrong(0))?;
        if usize::from(len) != current.len() - 2 {
            return Err(wrong(1));
        }
        let given = rest.get(..current.len()).ok_or(Sense::parameter_list_length())?;
        match code {
            CACHING => settings.write_cache = given[2] & 0x04 != 0,
            CONTROL => {
                settings.descriptor_sense = given[2] & 0x04 != 0;
                settings.write_protect = given[4] & 0x08 != 0;
            }
            _ => {}
        }
        let accepted = page(code, &settings).ok_or(wrong(0))?;
        if let Some(i) = (2..given.len()).find(|i| given[*i] != accepted[*i]) {
            return Err(wrong(i));
        }
        rest = &rest[current.len()..];
    }
    Ok(settings)
}

/// The savable pages as bytes, for whoever keeps them.
pub(super) fn save(settings: &Settings) -> Vec<u8> {
    CODES.iter().filter(|c| is_savable(**c)).filter_map(|c| page(*c, settings)).flatten().collect()
}

/// What [`save`] gave, or `None` if these bytes did not come from it.
pub(super) fn restore(bytes: &[u8], defaults: &Settings) -> Option<Settings> {
    select(bytes, 0, defaults).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Settings = Settings { write_cache: true, descriptor_sense: false, write_protect: false };

    #[test]
    fn all_pages_are_the_pages_one_after_another() {
        let all = sense(0x3f, 0, Control::Current, &DEFAULTS, false).unwrap();
        let each: Vec<u8> =
            CODES.iter().flat_map(|c| sense(*c, 0, Control::Current, &DEFAULTS, false).unwrap()).collect();
        assert_eq!(all, each);
        assert_eq!(sense(0x3f, 0xff, Control::Current, &DEFAULTS, false).unwrap(), all);
        assert_eq!(sense(0x02, 0, Control::Current, &DEFAULTS, false), None);
        assert_eq!(sense(0x0a, 1, Control::Current, &DEFAULTS, false), None);
    }

    #[test]
    fn wce_d_sense_and_swp_are_all_that_can_be_changed() {
        let bits = |code| sense(code, 0, Control::Changeable, &DEFAULTS, true).unwrap();
        assert_eq!(bits(0x08)[..3], [0x88, 0x12, 0x04]);
        assert_eq!(bits(0x0a)[..6], [0x8a, 0x0a, 0x04, 0, 0x08, 0]);
        assert!(bits(0x01)[2..].iter().chain(&bits(0x1c)[2..]).all(|b| *b == 0));
    }

    #[test]
    fn a_page_that_was_read_can_be_written_back_and_any_other_bit_is_refused() {
        for code in CODES {
            let page = sense(*code, 0, Control::Current, &DEFAULTS, true).unwrap();
            assert_eq!(select(&page, 4, &DEFAULTS), Ok(DEFAULTS));
            let mask = changeable(*code).unwrap();
            for i in 2..page.len() {
                for bit in 0..8 {
                    let mut changed = page.clone();
                    changed[i] ^= 1 << bit;
                    let accepted = select(&changed, 4, &DEFAULTS);
                    if mask[i] & 1 << bit != 0 {
                        assert_ne!(accepted.unwrap(), DEFAULTS);
                    } else {
                        assert_eq!(accepted, Err(Sense::invalid_parameter((4 + i) as u16)));
                    }
                }
            }
        }
    }

    #[test]
    fn a_page_that_is_cut_short_or_unknown_is_refused() {
        let page = sense(0x08, 0, Control::Current, &DEFAULTS, false).unwrap();
        for n in 1..page.len() {
            assert_eq!(select(&page[..n], 4, &DEFAULTS), Err(Sense::parameter_list_length()), "{n}");
        }
        assert_eq!(select(&[0x02, 0x0e], 4, &DEFAULTS), Err(Sense::invalid_parameter(4)));
        assert_eq!(select(&[0x48, 0x12, 0, 0], 4, &DEFAULTS), Err(Sense::invalid_parameter(4)));
        assert_eq!(select(&[0x08, 0x11, 0, 0], 4, &DEFAULTS), Err(Sense::invalid_parameter(5)));
    }

    #[test]
    fn saved_pages_come_back() {
        let changed = Settings { write_cache: false, descriptor_sense: true, write_protect: true };
        assert_eq!(restore(&save(&changed), &DEFAULTS), Some(changed));
        assert_eq!(restore(b"junk", &DEFAULTS), None);
    }
}
