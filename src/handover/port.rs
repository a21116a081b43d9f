//! What the kernel keeps of a LUN, and not its handler: reservations, and the target port groups of its exports. In terms of the exports, whose names and nexuses may be
//! others there.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An export, as in [`super::Identity::exports`]: fabric and world wide name.
pub type ExportName = (String, String);

/// Persistent reservations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservations {
    /// Those who are registered, in the order in which they came.
    pub registrations: Vec<Registration>,
}

/// One that is registered: whoever uses that export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The export.
    pub export: ExportName,
    /// The initiator's port, for people: it is the export's nexus, there as here.
    pub initiator: String,
    /// The reservation key, `0x` and 16 hexadecimal digits.
    pub key: String,
    /// It is for all target ports (ALL_TG_PT); known of the holder only.
    pub all_target_ports: bool,
    /// The type of the reservation that it holds, as in SPC-5 table 76.
    pub holds: Option<u8>,
}

/// Target port groups: what of them is not as the kernel makes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alua {
    /// Groups that were added, and the default one if something of it was changed.
    pub groups: Vec<Group>,
    /// Exports that are not in the default group, or offline.
    pub ports: Vec<Port>,
}

/// A target port group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name in configfs.
    pub name: String,
    /// Its identifier, if it has one of its own.
    pub id: Option<u16>,
    /// Attributes by their names in configfs: those that are not as the kernel makes them.
    pub attributes: BTreeMap<String, u32>,
}

/// Where an export is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The export.
    pub export: ExportName,
    /// Its group, if not the default one.
    pub group: Option<String>,
    /// It is offline.
    pub offline: bool,
}
