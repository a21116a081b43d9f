//! Target port groups of a backstore, and which of them its exports are in: `alua/GROUP` beside the backstore's attributes, and `alua_tg_pt_gp` of each LUN
//! (`target_core_configfs.c`, `target_core_alua.c`).
//!
//! The kernel refuses commands by the state of the port's group, whatever the handler says. What is read and written here is what is not as the kernel
//! makes it.

use std::{collections::BTreeMap, io, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    backstore::{ConfigfsError, Context},
    fabric::Export,
    tree::Tree,
    undo::Undo,
};

/// The group that every backstore has, and that every export begins in.
pub const DEFAULT_GROUP: &str = "default_tg_pt_gp";

/// The state in which the kernel answers nearly every command that a group is in transition (NOT READY, 04h/0Ah), those that it carries out itself included
/// (`core_alua_state_transition`).
const TRANSITION: u32 = 15;
/// The bit of `alua_access_type` without which the kernel takes no state from configfs.
const IMPLICIT: u32 = 1;

/// A group's attributes, in the order in which they are written, and what the kernel makes them (`core_alua_allocate_tg_pt_gp`). A state is only taken while the kernel
/// may change states by itself, so the type comes after it; and to take a state changes the status.
const ATTRIBUTES: [(&str, u32); 14] = [
    ("alua_support_transitioning", 1),
    ("alua_support_offline", 1),
    ("alua_support_lba_dependent", 0),
    ("alua_support_unavailable", 1),
    ("alua_support_standby", 1),
    ("alua_support_active_nonoptimized", 1),
    ("alua_support_active_optimized", 1),
    ("nonop_delay_msecs", 100),
    ("trans_delay_msecs", 0),
    ("implicit_trans_secs", 0),
    ("preferred", 0),
    ("alua_access_state", 0),
    ("alua_access_type", 3),
    ("alua_access_status", 0),
];

/// The words that stand for numbers (`core_alua_show_access_type`, `core_alua_dump_status`).
const WORDS: [(&str, &[(&str, u32)]); 2] = [
    ("alua_access_type", &[("None", 0), ("Implicit", 1), ("Explicit", 2), ("Implicit and Explicit", 3)]),
    ("alua_access_status", &[("None", 0), ("Altered by Explicit STPG", 1), ("Altered by Implicit ALUA", 2)]),
];

/// A target port group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its directory.
    pub name: String,
    /// `tg_pt_gp_id`; none of the default group, which always has the same, and of one that is of no use yet.
    pub id: Option<u16>,
    /// The attributes that are not as the kernel makes them.
    pub attributes: BTreeMap<String, u32>,
}

/// Where an export's port is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// Its group; none if that is the default one.
    pub group: Option<String>,
    /// It is offline (the secondary state).
    pub offline: bool,
}

impl Membership {
    /// It is as the kernel makes it.
    pub fn is_default(&self) -> bool {
        *self == Membership::default()
    }
}

/// A group as it was before it was held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Was {
    group: String,
    state: u32,
    kind: u32,
    status: u32,
}

/// Whether a group has that attribute.
pub fn is_attribute(name: &str) -> bool {
    ATTRIBUTES.iter().any(|(known, _)| *known == name)
}

fn strange(path: &Path, text: &str) -> ConfigfsError {
    let source = io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is not understood"));
    ConfigfsError { what: "read", path: path.to_owned(), source }
}

/// An attribute's number; none if the kernel has no such attribute.
fn number(tree: &dyn Tree, path: &Path, name: &str) -> Result<Option<u32>, ConfigfsError> {
    let attr = path.join(name);
    let text = match tree.read(&attr) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.context("read", &attr)?,
    };
    let words = WORDS.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, words)| words);
    let word = words.iter().find(|(word, _)| *word == text.trim()).map(|(_, number)| *number);
    word.or_else(|| text.trim().parse().ok()).map(Some).ok_or_else(|| strange(&attr, &text))
}

/// The groups that are not as the kernel makes them: those that somebody has added, and the default group if something of it was changed.
///
/// # Errors
/// The kernel's.
pub fn groups(tree: &dyn Tree, backstore: &Path) -> Result<Vec<Group>, ConfigfsError> {
    let all = backstore.join("alua");
    let mut out = Vec::new();
    for name in tree.dirs(&all).context("list", &all)? {
        let path = all.join(&name);
        let mut attributes = BTreeMap::new();
        for (attr, usual) in ATTRIBUTES {
            if let Some(value) = number(tree, &path, attr)?.filter(|value| *value != usual) {
                attributes.insert(attr.to_owned(), value);
            }
        }
        if name == DEFAULT_GROUP {
            if !attributes.is_empty() {
                out.push(Group { name, id: None, attributes });
            }
            continue;
        }
        let attr = path.join("tg_pt_gp_id");
        let id = tree.read(&attr).context("read", &attr)?;
        let id = match id.trim() {
            "" => None,
            text => Some(text.parse().map_err(|_| strange(&attr, text))?),
        };
        out.push(Group { name, id, attributes });
    }
    Ok(out)
}

/// In which group an export's port is, and whether it is offline.
///
/// # Errors
/// The kernel's.
pub fn membership(tree: &dyn Tree, export: &Export) -> Result<Membership, ConfigfsError> {
    let lun = export.lun_path();
    let attr = lun.join("alua_tg_pt_gp");
    let text = match tree.read(&attr) {
        // ENODEV is what the kernel says where nothing is exported any more.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => {
            return Ok(Membership::default());
        }
        read => read.context("read", &attr)?,
    };
    // "TG Port Alias: default_tg_pt_gp" and more lines; nothing of a backstore that leaves ALUA to others.
    let alias = text.lines().find_map(|line| line.strip_prefix("TG Port Alias: ")).map(str::trim);
    let group = alias.filter(|alias| *alias != DEFAULT_GROUP && *alias != "None").map(str::to_owned);
    Ok(Membership { group, offline: number(tree, &lun, "alua_tg_pt_offline")? == Some(1) })
}

/// Makes groups, and gives the default one what it had; nothing is exported yet.
///
/// # Errors
/// The step that the kernel refused.
pub fn make(
    tree: &dyn Tree,
    backstore: &Path,
    groups: &[Group],
    undo: &mut Undo<'_>,
) -> Result<(), ConfigfsError> {
    for group in groups {
        let path = backstore.join("alua").join(&group.name);
        if group.name != DEFAULT_GROUP {
            undo.make_dir(&path).context("make", &path)?;
        }
        let write = |name: &str, value: u32| {
            let attr = path.join(name);
            tree.write(&attr, &value.to_string()).context("write", &attr)
        };
        if let Some(id) = group.id {
            write("tg_pt_gp_id", id.into())?;
        }
        for (name, usual) in ATTRIBUTES {
            let wanted = group.attributes.get(name).copied();
            // Where the state was written the status has changed with it.
            let now = if name == "alua_access_status" { number(tree, &path, name)? } else { Some(usual) };
            match wanted {
                Some(value) => write(name, value)?,
                None if now.is_some_and(|now| now != usual) => write(name, usual)?,
                None => {}
            }
        }
    }
    Ok(())
}

/// Puts an export's port into its group.
///
/// # Errors
/// The kernel's.
pub fn join(tree: &dyn Tree, export: &Export, membership: &Membership) -> Result<(), ConfigfsError> {
    let lun = export.lun_path();
    let write = |name: &str, value: &str| {
        let attr = lun.join(name);
        tree.write(&attr, value).context("write", &attr)
    };
    if let Some(group) = &membership.group {
        write("alua_tg_pt_gp", group)?;
    }
    if membership.offline {
        write("alua_tg_pt_offline", "1")?;
    }
    Ok(())
}

/// Takes down the groups that somebody has added: the kernel removes no backstore that has some.
///
/// # Errors
/// The kernel's.
pub fn remove_groups(tree: &dyn Tree, backstore: &Path) -> Result<(), ConfigfsError> {
    let all = backstore.join("alua");
    for name in tree.dirs(&all).context("list", &all)?.iter().filter(|name| *name != DEFAULT_GROUP) {
        let path = all.join(name);
        match tree.remove_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            done => done.context("remove", &path)?,
        }
    }
    Ok(())
}

/// Whether the kernel looks at the states of groups at all: `alua_support`, which kernels before 5.10 do not show of this kind of backstore, and have on.
///
/// # Errors
/// The kernel's.
pub fn is_on(tree: &dyn Tree, backstore: &Path) -> Result<bool, ConfigfsError> {
    Ok(number(tree, &backstore.join("attrib"), "alua_support")? != Some(0))
}

/// The groups that ports may be in, as they are, for [`hold`] and [`release`].
///
/// # Errors
/// The kernel's.
pub fn as_they_are(tree: &dyn Tree, backstore: &Path) -> Result<Vec<Was>, ConfigfsError> {
    let all = backstore.join("alua");
    let mut out = Vec::new();
    for group in tree.dirs(&all).context("list", &all)? {
        let path = all.join(&group);
        let id = path.join("tg_pt_gp_id");
        if tree.read(&id).context("read", &id)?.trim().is_empty() {
            // No port may be in it.
            continue;
        }
        let get = |name: &str| number(tree, &path, name).map(Option::unwrap_or_default);
        let (state, kind) = (get("alua_access_state")?, get("alua_access_type")?);
        out.push(Was { group, state, kind, status: get("alua_access_status")? });
    }
    Ok(out)
}

/// Has the kernel refuse commands of all initiators for a while, those that it carries out itself too, until [`release`].
///
/// # Errors
/// The kernel's; those before it are held.
pub fn hold(tree: &dyn Tree, backstore: &Path, groups: &[Was]) -> Result<(), ConfigfsError> {
    for was in groups {
        let path = backstore.join("alua").join(&was.group);
        let write = |name: &str, value: u32| {
            let attr = path.join(name);
            tree.write(&attr, &value.to_string()).context("write", &attr)
        };
        if was.kind & IMPLICIT == 0 {
            write("alua_access_type", was.kind | IMPLICIT)?;
        }
        write("alua_access_state", TRANSITION)?;
    }
    Ok(())
}

/// Gives groups that were held back what they had.
///
/// # Errors
/// The first of the kernel's, once it was tried with all.
pub fn release(tree: &dyn Tree, backstore: &Path, groups: &[Was]) -> Result<(), ConfigfsError> {
    let mut done = Ok(());
    for was in groups {
        let path = backstore.join("alua").join(&was.group);
        // A hold that failed may have come no further than this group.
        for (name, value) in [
            ("alua_access_type", was.kind | IMPLICIT),
            ("alua_access_state", was.state),
            ("alua_access_status", was.status),
            ("alua_access_type", was.kind),
        ] {
            let attr = path.join(name);
            match tree.write(&attr, &value.to_string()).context("write", &attr) {
                // It is gone.
                Err(e) if e.source.kind() == io::ErrorKind::NotFound => break,
                Err(e) => done = done.and(Err(e)),
                Ok(()) => {}
            }
        }
    }
    done
}
