//! What goes with a LUN, section by section. Names and contents are in `docs/handover.md`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    format::{FormatError, Sections},
    port::{Alua, Reservations},
};

/// The sections that this version knows, and the newest version of each.
const KNOWN: &[(&str, u16)] = &[
    (IDENTITY, 1),
    (MODES, 1),
    (SAVED, 1),
    (RESERVATIONS, 1),
    (ALUA, 1),
    (LIMITS, 1),
    (SCRUB, 1),
    (COUNTERS, 1),
    (BITMAPS, 1),
];

const IDENTITY: &str = "identity";
const MODES: &str = "modes";
const SAVED: &str = "saved-mode-pages";
const RESERVATIONS: &str = "reservations";
const ALUA: &str = "alua";
const LIMITS: &str = "limits";
const SCRUB: &str = "scrub";
const COUNTERS: &str = "counters";
const BITMAPS: &str = "bitmaps";

/// The most that all bitmaps may take of a state (bytes, as it is sent): it goes as a whole, and is bounded.
const MOST_OF_BITMAPS: usize = 12 << 20;

/// What the LUN is, for initiators and for the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// The serial number, from which its NAA name follows.
    pub serial: String,
    /// The configuration, as in the kernel's `dev_config` after the subtype.
    pub config: String,
    /// The image's format, which the first bytes are not asked for there.
    pub format: String,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes.
    pub capacity: u64,
    /// The kernel's `emulate_write_cache`.
    pub write_cache: bool,
    /// Fabric and world wide name of each target that exports it.
    pub exports: Vec<(String, String)>,
    /// The generation of the image's owner's file: in an offer that which is there (none, if there is no such file yet), in a state that in which the image
    /// was given back, and may be taken.
    pub generation: Option<u64>,
}

/// What only a power cycle may reset, as initiators have it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modes {
    /// The current mode pages, as the target writes them down.
    pub pages: Vec<u8>,
    /// The write cache, as it was last set from outside.
    pub write_cache: bool,
    /// Pending unit attentions, ASC and ASCQ, the oldest first.
    pub unit_attentions: Vec<(u8, u8)>,
    /// `format`, `sanitize` or `sanitize-with-ause`: the medium cannot be used until that is repeated.
    pub unfinished: Option<String>,
}

/// A dirty bitmap of a LUN whose storage goes along, and the image that kept it does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyBitmap {
    /// Its name.
    pub name: String,
    /// Bytes of a granule, a power of two.
    pub granularity: u64,
    /// Changes are marked in it.
    pub recording: bool,
    /// An image is to keep it.
    pub persistent: bool,
    /// A bit for each granule, 64 in a word, least significant first; none of one of which nobody knows what it lacks.
    pub words: Option<Vec<u64>>,
}

/// The bitmaps, as far as there is room: the largest come last, and without their bits if they are too many.
pub fn bounded(bitmaps: &[DirtyBitmap]) -> Vec<DirtyBitmap> {
    let mut out = bitmaps.to_vec();
    out.sort_by_key(|bitmap| bitmap.words.as_ref().map_or(0, Vec::len));
    let mut room = MOST_OF_BITMAPS;
    for bitmap in &mut out {
        let digits = |word: &u64| word.checked_ilog10().map_or(1, |n| n as usize + 1);
        let len = bitmap.words.iter().flatten().map(|word| digits(word) + 1).sum();
        match room.checked_sub(len) {
            Some(left) => room = left,
            None => {
                tracing::warn!(
                    bitmap = bitmap.name,
                    "the dirty bitmap is too large to be taken along: it arrives inconsistent, and can only be removed"
                );
                bitmap.words = None;
            }
        }
    }
    out
}

/// All of it.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// What it is.
    pub identity: Identity,
    /// Mode pages, unit attentions. None of a LUN of which nothing is kept: initiators are told of a power on.
    pub modes: Option<Modes>,
    /// What MODE SELECT has saved.
    pub saved_pages: Option<Value>,
    /// Persistent reservations, if there are any.
    pub reservations: Option<Reservations>,
    /// Target port groups, if something of them is not as the kernel makes it.
    pub alua: Option<Alua>,
    /// The limits that were set while it was in use.
    pub limits: Option<Value>,
    /// The account of its scrub.
    pub scrub: Option<Value>,
    /// What protection has counted.
    pub counters: Option<Value>,
    /// Its dirty bitmaps: those that are not persistent, and all if its storage goes along.
    pub bitmaps: Vec<DirtyBitmap>,
}

impl State {
    /// A LUN of which no more is known.
    pub fn new(identity: Identity) -> State {
        State {
            identity,
            modes: None,
            saved_pages: None,
            reservations: None,
            alua: None,
            limits: None,
            scrub: None,
            counters: None,
            bitmaps: Vec::new(),
        }
    }

    /// The bytes.
    ///
    /// # Errors
    /// [`FormatError::Content`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = Sections::default();
        out.add(IDENTITY, 1, true, &self.identity)?;
        // These may hold a write protection, or that writes reach the medium before they are answered.
        if let Some(modes) = &self.modes {
            out.add(MODES, 1, true, modes)?;
        }
        if let Some(saved) = &self.saved_pages {
            out.add(SAVED, 1, true, saved)?;
        }
        // Without these, initiators would write that were shut out, or be answered by ports that are to refuse them.
        if let Some(reservations) = &self.reservations {
            out.add(RESERVATIONS, 1, true, reservations)?;
        }
        if let Some(alua) = &self.alua {
            out.add(ALUA, 1, true, alua)?;
        }
        for (name, value) in [(LIMITS, &self.limits), (SCRUB, &self.scrub), (COUNTERS, &self.counters)] {
            if let Some(value) = value {
                out.add(name, 1, false, value)?;
            }
        }
        if !self.bitmaps.is_empty() {
            out.add(BITMAPS, 1, false, &bounded(&self.bitmaps))?;
        }
        Ok(out.to_bytes())
    }

    /// From the bytes.
    ///
    /// # Errors
    /// What of them is damaged, missing, or not known and not to be skipped.
    pub fn from_bytes(bytes: &[u8]) -> Result<State, FormatError> {
        let sections = Sections::parse(bytes)?;
        sections.check_known(KNOWN)?;
        Ok(State {
            identity: sections.need(IDENTITY, 1)?,
            modes: sections.get(MODES, 1)?,
            saved_pages: sections.get(SAVED, 1)?,
            reservations: sections.get(RESERVATIONS, 1)?,
            alua: sections.get(ALUA, 1)?,
            limits: sections.get(LIMITS, 1)?,
            scrub: sections.get(SCRUB, 1)?,
            counters: sections.get(COUNTERS, 1)?,
            bitmaps: sections.get(BITMAPS, 1)?.unwrap_or_default(),
        })
    }
}
