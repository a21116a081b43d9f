//! Mode pages 01, 08, 0A and 1C, with protection information the application tag subpage 0A/02, and with thresholds the logical block
//! provisioning subpage 1C/02 (SPC-4 7.5, SBC-4 6.5):
//! how they read, which bits an initiator may change, how they are saved.
//!
//! All that can change is in [`Settings`]; a page is a function of them, so a MODE SELECT is accepted exactly if some settings
//! give the bytes it sent.

use super::{log::AVAILABLE, sense::Sense};
use crate::{units::Lba, volume::AppRange};

/// What initiators can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settings {
    /// WCE: writes are acknowledged before they are on stable storage.
    pub write_cache: bool,
    /// D_SENSE: sense data in descriptor format.
    pub descriptor_sense: bool,
    /// SWP: the logical unit is write protected.
    pub write_protect: bool,
    /// What there is only where initiators see protection information.
    pub pi: Option<PiSettings>,
    /// What there is only where the space beneath the volume can be counted.
    pub threshold: Option<Threshold>,
}

/// The soft threshold of the available LBA mapping resources (SBC-4 4.7.3.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Threshold {
    /// ENABLED: initiators are told when it is reached.
    pub enabled: bool,
    /// THRESHOLD COUNT: it is reached when so many threshold sets are left, or fewer.
    pub count: u32,
}

/// How protection information is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PiSettings {
    /// DPICZ: blocks that no tuples travel with are not checked.
    pub dpicz: bool,
    /// ATO: application tags are the initiators' own, and not modified.
    pub ato: bool,
    /// ATMPE: the application tag mode page says what they are.
    pub atmpe: bool,
    /// RWWP: writes without protection information are refused.
    pub rwwp: bool,
    /// The application tag mode page; what follows the last range is empty.
    pub tags: [AppRange; TAG_RANGES],
    /// Blocks of the medium, which the ranges have to make up.
    pub capacity: u64,
}

impl Default for PiSettings {
    fn default() -> PiSettings {
        let tags = [NO_RANGE; TAG_RANGES];
        PiSettings { dpicz: false, ato: true, atmpe: false, rwwp: false, tags, capacity: 0 }
    }
}

impl PiSettings {
    /// The ranges that are set.
    pub fn ranges(&self) -> impl Iterator<Item = AppRange> + '_ {
        self.tags.iter().copied().take_while(|r| *r != NO_RANGE)
    }
}

/// Descriptors of the application tag mode page.
const TAG_RANGES: usize = 4;
const NO_RANGE: AppRange = AppRange { first: Lba(0), blocks: 0, tag: 0 };

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
/// SUBPAGE CODE of the application tag page, under CONTROL.
const APPLICATION_TAG: u8 = 0x02;
/// SUBPAGE CODE of the logical block provisioning page, under INFORMATIONAL EXCEPTIONS.
const PROVISIONING: u8 = 0x02;
/// The pages and subpages, in the order in which MODE SENSE returns them all.
const CODES: &[(u8, u8)] = &[
    (ERROR_RECOVERY, 0),
    (CACHING, 0),
    (CONTROL, 0),
    (CONTROL, APPLICATION_TAG),
    (INFORMATIONAL_EXCEPTIONS, 0),
    (INFORMATIONAL_EXCEPTIONS, PROVISIONING),
];
/// PAGE CODE of "all pages".
const ALL: u8 = 0x3f;
/// SUBPAGE CODE of "all subpages".
const ALL_SUBPAGES: u8 = 0xff;

/// One page; PS (byte 0, bit 7) is left 0. `None` if it is not supported.
fn page(code: u8, subpage: u8, s: &Settings) -> Option<Vec<u8>> {
    let bit = |on: bool, bit: u8| if on { 1 << bit } else { 0 };
    let pi = |on: fn(PiSettings) -> bool, at: u8| bit(s.pi.is_some_and(on), at);
    let (len, fields): (usize, &[(usize, u8)]) = match (code, subpage) {
        // AWRE and ARRE: what the storage beneath does by itself.
        (ERROR_RECOVERY, 0) => (12, &[(2, 0xc0)]),
        (CACHING, 0) => (20, &[(2, bit(s.write_cache, 2))]),
        // Unrestricted reordering; TAS: what the kernel does with other initiators' commands.
        (CONTROL, 0) => (
            12,
            &[
                (2, bit(s.descriptor_sense, 2) | pi(|p| p.dpicz, 3)),
                (3, 0x10),
                (4, bit(s.write_protect, 3)),
                (5, 0x40 | pi(|p| p.ato, 7) | pi(|p| p.atmpe, 5) | pi(|p| p.rwwp, 4)),
            ],
        ),
        (CONTROL, APPLICATION_TAG) => return s.pi.map(|p| application_tags(&p)),
        (INFORMATIONAL_EXCEPTIONS, 0) => (12, &[(2, 0x08)]), // DEXCPT
        (INFORMATIONAL_EXCEPTIONS, PROVISIONING) => return s.threshold.map(provisioning),
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

/// Where the one threshold descriptor of the logical block provisioning page begins.
const THRESHOLD_AT: usize = 16;

/// The logical block provisioning mode page (SBC-4 6.5.9): one soft threshold (THRESHOLD TYPE = 000b) that is reached from above (THRESHOLD
/// ARMING = 000b), of the available resources (THRESHOLD RESOURCE = 01h). SITUA = 0: nobody here can tell initiators apart.
fn provisioning(threshold: Threshold) -> Vec<u8> {
    let mut out = vec![0; THRESHOLD_AT + 8];
    out[0] = 0x40 | INFORMATIONAL_EXCEPTIONS; // SPF
    out[1] = PROVISIONING;
    out[3] = (out.len() - 4) as u8;
    out[THRESHOLD_AT] = if threshold.enabled { 0x80 } else { 0 };
    out[THRESHOLD_AT + 1] = AVAILABLE;
    out[THRESHOLD_AT + 4..].copy_from_slice(&threshold.count.to_be_bytes());
    out
}

/// Bytes before the first descriptor of the application tag page, and of a descriptor.
const TAGS_AT: usize = 16;
const TAG_LEN: usize = 24;

/// The application tag mode page (SBC-4 6.5.3).
fn application_tags(pi: &PiSettings) -> Vec<u8> {
    let mut out = vec![0; TAGS_AT + TAG_RANGES * TAG_LEN];
    out[0] = 0x40 | CONTROL; // SPF
    out[1] = APPLICATION_TAG;
    let len = (out.len() - 4) as u16;
    out[2..4].copy_from_slice(&len.to_be_bytes());
    let used = pi.ranges().count();
    for (i, range) in pi.ranges().enumerate() {
        let d = &mut out[TAGS_AT + i * TAG_LEN..][..TAG_LEN];
        d[0] = if i + 1 == used { 0x80 } else { 0 }; // LAST
        d[6..8].copy_from_slice(&range.tag.to_be_bytes());
        d[8..16].copy_from_slice(&range.first.0.to_be_bytes());
        d[16..24].copy_from_slice(&range.blocks.to_be_bytes());
    }
    out
}

/// The ranges that a page sets: one after another without gaps from LBA 0 to the end of the medium, up to the one that
/// is marked as the last. `Err` with the byte that is wrong.
fn tag_ranges(page: &[u8], capacity: u64) -> Result<[AppRange; TAG_RANGES], usize> {
    let mut out = [NO_RANGE; TAG_RANGES];
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let mut next = 0u64;
    for (i, slot) in out.iter_mut().enumerate() {
        let at = TAGS_AT + i * TAG_LEN;
        let d = &page[at..at + TAG_LEN];
        let (first, blocks) = (number(&d[8..16]), number(&d[16..24]));
        if first != next || blocks == 0 {
            return Err(at + if first != next { 8 } else { 16 });
        }
        next = first.checked_add(blocks).filter(|end| *end <= capacity).ok_or(at + 16)?;
        *slot = AppRange { first: Lba(first), blocks, tag: number(&d[6..8]) as u16 };
        if d[0] & 0x80 != 0 {
            // SBC-4 has the sum equal the last LBA, which as a count would leave that block out: both are taken.
            return if next + 1 >= capacity { Ok(out) } else { Err(at + 16) };
        }
    }
    Err(TAGS_AT + (TAG_RANGES - 1) * TAG_LEN)
}

/// The bits of a page that can be changed: those in which the pages of opposite settings differ. `like`: settings that have the same parts.
fn changeable(code: u8, subpage: u8, like: &Settings) -> Option<Vec<u8>> {
    let has_pi = like.pi.is_some();
    if (code, subpage) == (CONTROL, APPLICATION_TAG) {
        let mut out = page(code, subpage, &Settings { pi: has_pi.then(PiSettings::default), ..OFF })?;
        for d in out[TAGS_AT..].chunks_mut(TAG_LEN) {
            d[0] = 0x80;
            d[6..].fill(0xff);
        }
        return Some(out);
    }
    let [off, on] = [false, true].map(|b| {
        let pi = PiSettings { dpicz: b, ato: b, atmpe: b, rwwp: b, ..PiSettings::default() };
        let pi = has_pi.then_some(pi);
        let count = if b { u32::MAX } else { 0 };
        let threshold = like.threshold.map(|_| Threshold { enabled: b, count });
        let settings = Settings { write_cache: b, descriptor_sense: b, write_protect: b, pi, threshold };
        page(code, subpage, &settings)
    });
    let (off, on) = (off?, on?);
    let mut out: Vec<u8> = off.iter().zip(&on).map(|(a, b)| a ^ b).collect();
    // Page code and length are no bits that change.
    let head = if off[0] & 0x40 != 0 { 4 } else { 2 };
    out[..head].copy_from_slice(&off[..head]);
    Some(out)
}

const OFF: Settings =
    Settings { write_cache: false, descriptor_sense: false, write_protect: false, pi: None, threshold: None };

/// The pages that MODE SENSE asks for, joined. `values` are those of the page control that was asked for, and ignored for
/// [`Control::Changeable`]; `savable` sets PS. `None` if page or subpage is not supported.
pub(super) fn sense(
    code: u8,
    subpage: u8,
    control: Control,
    values: &Settings,
    savable: bool,
) -> Option<Vec<u8>> {
    let one = |code: u8, subpage: u8| {
        let mut page = match control {
            Control::Changeable => changeable(code, subpage, values)?,
            _ => page(code, subpage, values)?,
        };
        if savable && is_savable(code, subpage) {
            page[0] |= 0x80;
        }
        Some(page)
    };
    let wanted = |c: &&(u8, u8)| {
        (code == ALL || code == c.0)
            && (subpage == ALL_SUBPAGES || subpage == c.1 && (code != ALL || c.1 == 0))
    };
    if code == ALL && subpage != 0 && subpage != ALL_SUBPAGES {
        return None;
    }
    let pages: Vec<u8> = CODES.iter().filter(wanted).filter_map(|c| one(c.0, c.1)).flatten().collect();
    (!pages.is_empty()).then_some(pages)
}

fn is_savable(code: u8, subpage: u8) -> bool {
    matches!((code, subpage), (CACHING | CONTROL, 0) | (INFORMATIONAL_EXCEPTIONS, PROVISIONING))
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
        let &[head, second, ..] = rest else { return Err(Sense::parameter_list_length()) };
        let (code, is_subpage) = (head & 0x3f, head & 0x40 != 0);
        let subpage = if is_subpage { second } else { 0 };
        // SPF with subpage 0 is no page at all.
        let current =
            page(code, subpage, &settings).filter(|_| !is_subpage || subpage != 0).ok_or(wrong(0))?;
        let lengths = if is_subpage { 2..4 } else { 1..2 };
        let said = rest.get(lengths.clone()).ok_or(Sense::parameter_list_length())?;
        if said != &current[lengths.clone()] {
            return Err(wrong(lengths.start));
        }
        let given = rest.get(..current.len()).ok_or(Sense::parameter_list_length())?;
        match (code, subpage) {
            (CACHING, 0) => settings.write_cache = given[2] & 0x04 != 0,
            (CONTROL, 0) => {
                settings.descriptor_sense = given[2] & 0x04 != 0;
                settings.write_protect = given[4] & 0x08 != 0;
                if let Some(pi) = &mut settings.pi {
                    pi.dpicz = given[2] & 0x08 != 0;
                    pi.ato = given[5] & 0x80 != 0;
                    pi.atmpe = given[5] & 0x20 != 0;
                    pi.rwwp = given[5] & 0x10 != 0;
                }
            }
            (INFORMATIONAL_EXCEPTIONS, PROVISIONING) => {
                settings.threshold = Some(Threshold {
                    enabled: given[THRESHOLD_AT] & 0x80 != 0,
                    count: given[THRESHOLD_AT + 4..].iter().fold(0, |n, b| n << 8 | u32::from(*b)),
                });
            }
            (CONTROL, APPLICATION_TAG) if given[TAGS_AT..] != current[TAGS_AT..] => {
                if let Some(pi) = &mut settings.pi {
                    pi.tags = tag_ranges(given, pi.capacity).map_err(wrong)?;
                }
            }
            _ => {}
        }
        let accepted = page(code, subpage, &settings).ok_or(wrong(0))?;
        if let Some(i) = (lengths.end..given.len()).find(|i| given[*i] != accepted[*i]) {
            return Err(wrong(i));
        }
        rest = &rest[current.len()..];
    }
    Ok(settings)
}

/// The savable pages as bytes, for whoever keeps them. The application tag page is not among them, so ATMPE isn't saved
/// either.
pub(super) fn save(settings: &Settings) -> Vec<u8> {
    let pi = settings.pi.map(|pi| PiSettings { atmpe: false, ..pi });
    let settings = Settings { pi, ..*settings };
    let savable = CODES.iter().filter(|c| is_savable(c.0, c.1));
    savable.filter_map(|c| page(c.0, c.1, &settings)).flatten().collect()
}

/// What [`save`] gave, or `None` if these bytes did not come from it.
pub(super) fn restore(bytes: &[u8], defaults: &Settings) -> Option<Settings> {
    select(bytes, 0, defaults).ok()
}

/// All pages with their current values as bytes, those that cannot be saved among them.
pub(super) fn current(settings: &Settings) -> Vec<u8> {
    CODES.iter().filter_map(|c| page(c.0, c.1, settings)).flatten().collect()
}

/// What [`current`] gave of settings that have the same parts as `like`, or `None` if these bytes did not come from it. The capacity is that of `like`.
pub(super) fn take_up(bytes: &[u8], like: &Settings) -> Option<Settings> {
    select(bytes, 0, like).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Settings = Settings { write_cache: true, ..OFF };

    fn with_pi() -> Settings {
        Settings { pi: Some(PiSettings { capacity: 100, ..PiSettings::default() }), ..DEFAULTS }
    }

    #[test]
    fn all_pages_are_the_pages_one_after_another() {
        let all = sense(0x3f, 0, Control::Current, &DEFAULTS, false).unwrap();
        let each: Vec<u8> = [1, 8, 10, 28]
            .iter()
            .flat_map(|c| sense(*c, 0, Control::Current, &DEFAULTS, false).unwrap())
            .collect();
        assert_eq!(all, each);
        assert_eq!(sense(0x3f, 0xff, Control::Current, &DEFAULTS, false).unwrap(), all);
        assert_eq!(sense(0x02, 0, Control::Current, &DEFAULTS, false), None);
        assert_eq!(sense(0x0a, 1, Control::Current, &DEFAULTS, false), None);
        assert_eq!(sense(0x0a, 2, Control::Current, &DEFAULTS, false), None);
        assert_eq!(sense(0x3f, 2, Control::Current, &with_pi(), false), None);
        let lens = |sub| sense(0x3f, sub, Control::Current, &with_pi(), false).unwrap().len();
        assert_eq!((lens(0), lens(0xff)), (all.len(), all.len() + 112));
        let control = |sub| sense(0x0a, sub, Control::Current, &with_pi(), false).unwrap().len();
        assert_eq!((control(0), control(2), control(0xff)), (12, 112, 124));
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
        let cases = [DEFAULTS, with_pi()].into_iter().flat_map(|s| [1, 8, 10, 28].map(|code| (s, code)));
        for (settings, code) in cases {
            let page = sense(code, 0, Control::Current, &settings, true).unwrap();
            assert_eq!(select(&page, 4, &settings), Ok(settings));
            let mask = changeable(code, 0, &settings).unwrap();
            for i in 2..page.len() {
                for bit in 0..8 {
                    let mut changed = page.clone();
                    changed[i] ^= 1 << bit;
                    let accepted = select(&changed, 4, &settings);
                    if mask[i] & 1 << bit != 0 {
                        assert_ne!(accepted.unwrap(), settings);
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
        let changed = Settings { write_cache: false, descriptor_sense: true, write_protect: true, ..OFF };
        assert_eq!(restore(&save(&changed), &DEFAULTS), Some(changed));
        assert_eq!(restore(b"junk", &DEFAULTS), None);
    }

    #[test]
    fn all_that_can_be_changed_is_taken_up_again_saved_or_not() {
        let range = AppRange { first: Lba(0), blocks: 100, tag: 7 };
        let pi = PiSettings {
            dpicz: true,
            ato: false,
            atmpe: true,
            rwwp: true,
            tags: [range, NO_RANGE, NO_RANGE, NO_RANGE],
            capacity: 100,
        };
        let threshold = Some(Threshold { enabled: true, count: 9 });
        let changed =
            Settings { descriptor_sense: true, write_protect: true, pi: Some(pi), threshold, ..OFF };
        let like = Settings { threshold: Some(Threshold::default()), ..with_pi() };
        assert_eq!(take_up(&current(&changed), &like), Some(changed));
        assert_eq!(take_up(&current(&like), &like), Some(like));
        // Of another LUN: without protection, or smaller.
        assert_eq!(take_up(&current(&changed), &DEFAULTS), None);
        let smaller = Settings { pi: Some(PiSettings { capacity: 99, ..PiSettings::default() }), ..like };
        assert_eq!(take_up(&current(&changed), &smaller), None);
    }

    #[test]
    fn the_threshold_can_be_enabled_and_counted_and_is_saved() {
        let with = |enabled, count| Settings { threshold: Some(Threshold { enabled, count }), ..DEFAULTS };
        let off = with(false, 0);
        let mask = sense(0x1c, 2, Control::Changeable, &off, true).unwrap();
        assert_eq!(mask[..4], [0xdc, 2, 0, 20]);
        assert_eq!(mask[4..], [&[0; 12][..], &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]].concat());
        let mut page = sense(0x1c, 2, Control::Current, &off, false).unwrap();
        assert_eq!(page[16..], [0, 1, 0, 0, 0, 0, 0, 0]);
        (page[16], page[23]) = (0x80, 9);
        assert_eq!(select(&page, 4, &off), Ok(with(true, 9)));
        assert_eq!(restore(&save(&with(true, 9)), &off), Some(with(true, 9)));
        for (byte, bits) in [(4, 1), (16, 0x08), (16, 1), (17, 3)] {
            let mut wrong = page.clone();
            wrong[byte] ^= bits;
            assert_eq!(select(&wrong, 4, &off), Err(Sense::invalid_parameter(4 + byte as u16)));
        }
        assert_eq!(select(&page, 4, &DEFAULTS), Err(Sense::invalid_parameter(4)));
        assert_eq!(sense(0x1c, 2, Control::Current, &DEFAULTS, false), None);
        let lens = |sub| sense(0x1c, sub, Control::Current, &off, false).unwrap().len();
        assert_eq!((lens(0), lens(2), lens(0xff)), (12, 24, 36));
    }

    #[test]
    fn with_protection_ato_dpicz_rwwp_and_atmpe_can_be_changed_and_all_but_atmpe_saved() {
        let mask = sense(0x0a, 0, Control::Changeable, &with_pi(), true).unwrap();
        assert_eq!(mask[2..6], [0x0c, 0, 0x08, 0xb0]);
        let page = sense(0x0a, 0, Control::Current, &with_pi(), true).unwrap();
        assert_eq!(page[5], 0xc0, "ATO is on at first");
        let mut changed = page.clone();
        (changed[2], changed[5]) = (0x08, 0x70);
        let settings = select(&changed, 4, &with_pi()).unwrap();
        let pi = settings.pi.unwrap();
        assert_eq!((pi.dpicz, pi.ato, pi.atmpe, pi.rwwp), (true, false, true, true));
        let saved = restore(&save(&settings), &with_pi()).unwrap().pi.unwrap();
        assert_eq!((saved.dpicz, saved.ato, saved.atmpe, saved.rwwp), (true, false, false, true));
    }

    fn tags(ranges: &[(u64, u64, u16)]) -> Vec<u8> {
        let mut page = application_tags(&PiSettings::default());
        for (i, (first, blocks, tag)) in ranges.iter().enumerate() {
            let d = &mut page[TAGS_AT + i * TAG_LEN..][..TAG_LEN];
            d[0] = if i + 1 == ranges.len() { 0x80 } else { 0 };
            d[6..8].copy_from_slice(&tag.to_be_bytes());
            d[8..16].copy_from_slice(&first.to_be_bytes());
            d[16..24].copy_from_slice(&blocks.to_be_bytes());
        }
        page
    }

    #[test]
    fn application_tags_cover_the_medium_without_gaps_or_are_refused_where_they_are_wrong() {
        for good in [
            &[(0, 100, 7)][..],
            &[(0, 99, 7)],
            &[(0, 40, 1), (40, 60, 2)],
            &[(0, 1, 1), (1, 1, 2), (2, 1, 3), (3, 97, 4)],
        ] {
            let page = tags(good);
            let settings = select(&page, 4, &with_pi()).unwrap();
            let ranges =
                settings.pi.unwrap().ranges().map(|r| (r.first.0, r.blocks, r.tag)).collect::<Vec<_>>();
            assert_eq!(ranges, good);
            assert_eq!(sense(0x0a, 2, Control::Current, &settings, false), Some(page));
        }
        let at = |descriptor: usize, byte: usize| {
            Err(Sense::invalid_parameter((4 + TAGS_AT + descriptor * TAG_LEN + byte) as u16))
        };
        for (bad, wrong) in [
            (&[(1, 99, 7)][..], at(0, 8)),
            (&[(0, 0, 7)], at(0, 16)),
            (&[(0, 98, 7)], at(0, 16)),
            (&[(0, 101, 7)], at(0, 16)),
            (&[(0, u64::MAX, 7)], at(0, 16)),
            (&[(0, 40, 1), (41, 59, 2)], at(1, 8)),
        ] {
            assert_eq!(select(&tags(bad), 4, &with_pi()), wrong, "{bad:?}");
        }
        let mut no_last = tags(&[(0, 1, 1), (1, 1, 2), (2, 1, 3), (3, 97, 4)]);
        no_last[TAGS_AT + 3 * TAG_LEN] = 0;
        assert_eq!(select(&no_last, 4, &with_pi()), at(3, 0));
        let mut reserved = tags(&[(0, 100, 7)]);
        reserved[5] = 1;
        assert_eq!(select(&reserved, 4, &with_pi()), Err(Sense::invalid_parameter(9)));
        assert_eq!(select(&tags(&[(0, 100, 7)]), 4, &DEFAULTS), Err(Sense::invalid_parameter(4)));
    }
}
