//! The two ways in which a sidecar stays true across a crash. Chosen when it is made; kept in its header.

use serde::{Deserialize, Serialize};

/// How a sidecar stays true across a crash: in the terms of dm-integrity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PiMode {
    /// Regions that are being written are marked; after a crash the tuples there that do not match are made anew.
    #[default]
    Bitmap,
    /// New tuples are durable before the data are written; after a crash no tuple is made anew, and a torn block is an error.
    Journal,
}

impl std::fmt::Display for PiMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PiMode::Bitmap => "bitmap",
            PiMode::Journal => "journal",
        })
    }
}

/// A word that names no mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a mode of protection information (bitmap, journal)")]
pub struct UnknownPiMode(pub String);

impl std::str::FromStr for PiMode {
    type Err = UnknownPiMode;

    fn from_str(s: &str) -> Result<PiMode, UnknownPiMode> {
        match s {
            "bitmap" => Ok(PiMode::Bitmap),
            "journal" => Ok(PiMode::Journal),
            _ => Err(UnknownPiMode(s.to_owned())),
        }
    }
}
