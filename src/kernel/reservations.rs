//! What initiators have reserved of a backstore: LIO keeps SCSI reservations itself, and shows them in configfs, under `pr` (`target_core_configfs.c`).
//!
//! Persistent ones can be made again elsewhere: `res_aptpl_metadata` takes registrations before the backstore is exported, and each comes to life when the nexus of its
//! initiator's port and target port gets the LUN (`core_scsi3_check_aptpl_registration`). That file is meant for registrations which survive a power loss (APTPL), so the
//! kernel holds all of them as such from then on. PRGENERATION begins anew there, and cannot be set.

use std::{io, path::Path};

use super::{
    backstore::{ConfigfsError, Context},
    fabric::Export,
    tree::Tree,
};

/// What the kernel shows of registrations in one page; a list that fills it may be cut off.
const PAGE: usize = 4096;
/// The longest line of that list (`target_pr_res_pr_registered_i_pts_show`).
const LONGEST: usize = 384;
/// How often it is read, if it changes meanwhile.
const LOOKS: usize = 16;

/// An initiator's port on a fabric, as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initiator {
    /// The fabric's word, which is its directory's too.
    pub fabric: String,
    /// The port's name, of iSCSI without the identifier of the session.
    pub name: String,
    /// What follows it, if something does: `,i,0x` and the identifier of the session, of iSCSI.
    pub session: Option<String>,
}

impl std::fmt::Display for Initiator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}{}", self.fabric, self.name, self.session.as_deref().unwrap_or_default())
    }
}

/// One that is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registrant {
    /// Who.
    pub initiator: Initiator,
    /// The reservation key.
    pub key: u64,
}

/// The reservation's holder: of the types for all registrants, the one that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub initiator: Initiator,
    /// The type, as in SPC-5 table 76: 1, 3, 5, 6, 7 or 8.
    pub kind: u8,
    /// It registered for all target ports (ALL_TG_PT). Of others the kernel does not show that.
    pub all_target_ports: bool,
}

/// What initiators have reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// By RESERVE(6) or (10), in the kernel's words.
    Legacy(String),
    /// By PERSISTENT RESERVE OUT. Nobody is registered, and so there is no holder, of a backstore that nobody has reserved.
    Persistent {
        /// In the order in which they came.
        registrants: Vec<Registrant>,
        /// Who of them holds a reservation.
        holder: Option<Holder>,
    },
}

impl Held {
    /// Nobody has reserved anything.
    pub const NOTHING: Held = Held::Persistent { registrants: Vec::new(), holder: None };
}

/// A registration that is to be made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The fabric's directory.
    pub fabric: String,
    /// The target's.
    pub target: String,
    /// The initiator's port, as the nexus there is called.
    pub initiator: String,
    /// The reservation key.
    pub key: u64,
    /// It is for all target ports.
    pub all_target_ports: bool,
    /// It holds a reservation of that type.
    pub holds: Option<u8>,
}

/// The types of reservations in the kernel's words (`core_scsi3_pr_dump_type`).
const TYPES: [(u8, &str); 6] = [
    (1, "Write Exclusive Access"),
    (3, "Exclusive Access"),
    (5, "Write Exclusive Access, Registrants Only"),
    (6, "Exclusive Access, Registrants Only"),
    (7, "Write Exclusive Access, All Registrants"),
    (8, "Exclusive Access, All Registrants"),
];

/// Whether reservations have that type.
pub fn is_type(kind: u8) -> bool {
    TYPES.iter().any(|(known, _)| *known == kind)
}

/// The reservations of a backstore. A kernel without these attributes has none.
///
/// # Errors
/// The kernel's; InvalidData if it says something that is not understood.
pub fn of(tree: &dyn Tree, backstore: &Path) -> Result<Held, ConfigfsError> {
    let mut before = read(tree, backstore)?;
    // Several attributes make one answer, between which initiators may go on.
    for _ in 0..LOOKS {
        let now = read(tree, backstore)?;
        if now == before {
            return parse(&now).map_err(|why| unclear(backstore, why));
        }
        before = now;
    }
    Err(unclear(backstore, "they change all the time".to_owned()))
}

/// The attributes that tell: registrations, holder, type, and whether the holder's registration is for all target ports.
type Attributes = [String; 4];

fn read(tree: &dyn Tree, backstore: &Path) -> Result<Attributes, ConfigfsError> {
    let get = |name: &str| {
        let attr = backstore.join("pr").join(name);
        match tree.read(&attr) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.context("read", &attr),
        }
    };
    Ok([get("res_pr_registered_i_pts")?, get("res_holder")?, get("res_pr_type")?, get("res_pr_all_tgt_pts")?])
}

fn unclear(backstore: &Path, why: String) -> ConfigfsError {
    let source = io::Error::new(io::ErrorKind::InvalidData, why);
    ConfigfsError { what: "understand the reservations in", path: backstore.join("pr"), source }
}

fn parse([registered, holder, kind, all]: &Attributes) -> Result<Held, String> {
    let holder = holder.trim();
    // "SPC-2 Reservation: iSCSI Initiator: …"
    if holder.starts_with("SPC-2 Reservation:") {
        return Ok(Held::Legacy(holder.to_owned()));
    }
    // Of a device that leaves reservations to others there is no such heading.
    let mut lines = registered.lines().map(str::trim).filter(|line| !line.is_empty());
    if !lines.next().is_some_and(|heading| heading.starts_with("SPC-3 PR Registrations")) {
        return Ok(Held::NOTHING);
    }
    if registered.len() + LONGEST >= PAGE {
        return Err("there are more registrations than the kernel shows".to_owned());
    }
    let registrants: Vec<Registrant> =
        lines.filter(|line| *line != "None").map(registrant).collect::<Result<_, _>>()?;
    let holder = match holder.strip_prefix("SPC-3 Reservation: ") {
        None => None,
        Some(text) => {
            let (fabric, name) = text.split_once(" Initiator: ").ok_or_else(|| holder.to_owned())?;
            let initiator = initiator(fabric, name);
            if !registrants.iter().any(|r| r.initiator == initiator) {
                return Err(format!("{initiator} holds a reservation and is not registered"));
            }
            let words = kind.trim().strip_prefix("SPC-3 Reservation Type: ").unwrap_or(kind.trim());
            let kind = TYPES.iter().find(|(_, known)| *known == words).map(|(kind, _)| *kind);
            let kind = kind.ok_or_else(|| format!("no type of reservation is {words:?}"))?;
            Some(Holder { initiator, kind, all_target_ports: all.contains("All Target Ports") })
        }
    };
    Ok(Held::Persistent { registrants, holder })
}

/// `loopback Node: naa.60014… Key: 0x0000000000000001 PRgen: 0x00000000`
fn registrant(line: &str) -> Result<Registrant, String> {
    (|| {
        let (fabric, rest) = line.split_once(" Node: ")?;
        let (name, rest) = rest.split_once(" Key: 0x")?;
        let key = rest.split_whitespace().next()?;
        Some(Registrant { initiator: initiator(fabric, name), key: u64::from_str_radix(key, 16).ok()? })
    })()
    .ok_or_else(|| format!("{line:?} is no registration"))
}

fn initiator(fabric: &str, name: &str) -> Initiator {
    let (name, session) = match name.split_once(",i,0x") {
        // Kernels before 4.0 write the comma and what follows of those without a session too.
        Some((name, "")) => (name, None),
        Some((name, id)) => (name, Some(format!(",i,0x{id}"))),
        None => (name, None),
    };
    Initiator { fabric: fabric.to_owned(), name: name.to_owned(), session }
}

/// The initiator's port of an export's nexus; none if it has none.
///
/// # Errors
/// The kernel's.
pub fn nexus(tree: &dyn Tree, export: &Export) -> Result<Option<String>, ConfigfsError> {
    let attr = export.tpg_path().join("nexus");
    match tree.read(&attr) {
        // ENODEV is what tcm_loop and vhost_scsi say of one without.
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) || e.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.context("read", &attr).map(|name| Some(name.trim().to_owned())),
    }
}

/// Tells the kernel of registrations that are to come to life with the exports of a backstore, each LUN 0 of portal group 1. It has none yet.
///
/// # Errors
/// The kernel's.
pub fn prepare(tree: &dyn Tree, backstore: &Path, all: &[Registration]) -> Result<(), ConfigfsError> {
    let attr = backstore.join("pr/res_aptpl_metadata");
    for one in all {
        let flag = u8::from;
        let metadata = format!(
            "initiator_fabric={fabric},initiator_node={initiator},sa_res_key={key},res_holder={holder},res_type={kind},res_scope=0,\
             res_all_tg_pt={all},mapped_lun=0,target_fabric={fabric},target_node={target},tpgt=1,target_lun=0",
            fabric = one.fabric,
            initiator = one.initiator,
            key = one.key,
            holder = flag(one.holds.is_some()),
            kind = one.holds.unwrap_or(0),
            all = flag(one.all_target_ports),
            target = one.target,
        );
        tree.write(&attr, &metadata).context("write", &attr)?;
    }
    Ok(())
}

/// Looks whether registrations that were prepared have come to life, and the reservation with the one that holds it.
///
/// # Errors
/// The kernel's; InvalidData with what has not.
pub fn check(tree: &dyn Tree, backstore: &Path, wanted: &[Registration]) -> Result<(), ConfigfsError> {
    let found = of(tree, backstore)?;
    let (registrants, holder) = match &found {
        Held::Persistent { registrants, holder } => (registrants.as_slice(), holder.as_ref()),
        Held::Legacy(_) => (&[][..], None),
    };
    for one in wanted {
        let is = |initiator: &Initiator| initiator.fabric == one.fabric && initiator.name == one.initiator;
        let registered = registrants.iter().any(|r| is(&r.initiator) && r.key == one.key);
        let holds = holder.filter(|holder| is(&holder.initiator)).map(|holder| holder.kind);
        if !registered || holds != one.holds {
            let missing = if registered { "reservation" } else { "registration" };
            let why = format!(
                "the kernel has not taken up the {missing} of {}:{} at {}",
                one.fabric, one.initiator, one.target
            );
            return Err(unclear(backstore, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::{Fake, Node};

    const STORE: &str = "target/core/user_0/vm1";

    fn told(attributes: [&str; 4]) -> Result<Held, String> {
        let fake = Fake::new();
        let names = ["res_pr_registered_i_pts", "res_holder", "res_pr_type", "res_pr_all_tgt_pts"];
        for (name, value) in names.iter().zip(attributes) {
            let attr = Path::new(STORE).join("pr").join(name);
            fake.nodes.borrow_mut().insert(attr, Node::Attr(value.to_owned()));
        }
        of(&fake, Path::new(STORE)).map_err(|e| e.source.to_string())
    }

    fn port(fabric: &str, name: &str) -> Initiator {
        Initiator { fabric: fabric.into(), name: name.into(), session: None }
    }

    const NONE: &str = "SPC-3 PR Registrations:\nNone\n";
    const NOBODY: &str = "No SPC-3 Reservation holder\n";

    #[test]
    fn the_absence_of_reservations_is_told_in_all_its_words() {
        assert_eq!(of(&Fake::new(), Path::new(STORE)).unwrap(), Held::NOTHING);
        assert_eq!(told([NONE, NOBODY, NOBODY, NOBODY]), Ok(Held::NOTHING));
        assert_eq!(told(["SPC_RESERVATIONS_DISABLED\n", "Passthrough\n", "", ""]), Ok(Held::NOTHING));
    }

    #[test]
    fn registrations_and_their_holder_are_read_from_the_kernels_words() {
        let list = "SPC-3 PR Registrations:\n\
            iSCSI Node: iqn.1996-04.de.example:1,i,0x00023d000001 Key: 0x0000000000000001 PRgen: 0x00000001\n\
            loopback Node: naa.5001405000000001 Key: 0xffffffffffffffff PRgen: 0x00000002\n";
        let Held::Persistent { registrants, holder } = told([list, NOBODY, NOBODY, NOBODY]).unwrap() else {
            panic!()
        };
        let iscsi = Initiator {
            session: Some(",i,0x00023d000001".into()),
            ..port("iSCSI", "iqn.1996-04.de.example:1")
        };
        assert_eq!(iscsi.to_string(), "iSCSI:iqn.1996-04.de.example:1,i,0x00023d000001");
        let loopback = port("loopback", "naa.5001405000000001");
        let found: Vec<_> = registrants.into_iter().map(|r| (r.initiator, r.key)).collect();
        assert_eq!(found, [(iscsi, 1), (loopback.clone(), u64::MAX)]);
        assert_eq!(holder, None);

        for (kind, words) in TYPES {
            let text = format!("SPC-3 Reservation Type: {words}\n");
            let by = "SPC-3 Reservation: loopback Initiator: naa.5001405000000001\n";
            for (all, all_target_ports) in [
                ("SPC-3 Reservation: All Target Ports registration\n", true),
                ("SPC-3 Reservation: Single Target Port registration\n", false),
            ] {
                let Held::Persistent { holder, .. } = told([list, by, &text, all]).unwrap() else { panic!() };
                assert_eq!(holder, Some(Holder { initiator: loopback.clone(), kind, all_target_ports }));
            }
        }
    }

    #[test]
    fn what_is_not_understood_is_no_absence() {
        let spc2 = "SPC-2 Reservation: iSCSI Initiator: iqn.1996-04.de.example:1";
        assert_eq!(told([NONE, spc2, "", ""]), Ok(Held::Legacy(spc2.to_owned())));
        let line = "loopback Node: naa.5001405000000001 Key: 0x0000000000000001 PRgen: 0x00000000\n";
        let list = format!("SPC-3 PR Registrations:\n{line}");
        for (attributes, words) in [
            (["SPC-3 PR Registrations:\nsomething else\n", NOBODY, "", ""], "is no registration"),
            (
                ["SPC-3 PR Registrations:\nx Node: y Key: 0xz PRgen: 0\n", NOBODY, "", ""],
                "is no registration",
            ),
            ([NONE, "SPC-3 Reservation: loopback Initiator: naa.1", "", ""], "is not registered"),
            (
                [&list, "SPC-3 Reservation: loopback Initiator: naa.5001405000000001", "Shared", ""],
                "no type of reservation",
            ),
            (
                [&format!("SPC-3 PR Registrations:\n{}", line.repeat(50)), NOBODY, "", ""],
                "more registrations",
            ),
        ] {
            let why = told(attributes).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }
}
