//! Reservations of the fake kernel: registrations that were prepared come to life with the export for whose nexus they are, as seen of Linux 6.12.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use super::{
    fake::{Fake, Node, errno},
    tree::Tree,
};

const HEADING: &str = "SPC-3 PR Registrations:\n";
const NONE: &str = "SPC-3 PR Registrations:\nNone\n";
const NOBODY: &str = "No SPC-3 Reservation holder\n";

type Metadata = BTreeMap<String, String>;

/// Registrations by their backstore that have not come to life.
#[derive(Default)]
pub struct Prepared(Vec<(PathBuf, Metadata)>);

/// Fabric, target, portal group and LUN of a link in a LUN's directory.
fn port(link: &Path) -> Option<[String; 4]> {
    let part = |n: usize| Some(link.iter().nth(n)?.to_str()?.to_owned());
    Some([part(1)?, part(2)?, part(3)?, part(5)?])
}

impl Fake {
    /// What the kernel makes together with a backstore.
    pub fn furnish_reservations(&self, backstore: &Path) {
        let attr =
            |name: &str, text: &str| self.put(backstore.join("pr").join(name), Node::Attr(text.to_owned()));
        self.put(backstore.join("pr"), Node::Default);
        attr("res_pr_registered_i_pts", NONE);
        for name in ["res_holder", "res_pr_type", "res_pr_all_tgt_pts"] {
            attr(name, NOBODY);
        }
        attr("res_aptpl_metadata", "Ready to process PR APTPL metadata..\n");
    }

    /// `target_pr_res_aptpl_metadata_store`
    pub fn prepare_registration(&self, attr: &Path, text: &str) -> io::Result<()> {
        let backstore = attr.parent().and_then(Path::parent).unwrap();
        let exported = |node: &Node| matches!(node, Node::Link(to) if to == backstore);
        if self.nodes.borrow().values().any(exported) {
            return Err(errno(libc::EINVAL));
        }
        let words = text.split([',', '\n']).filter_map(|word| word.split_once('='));
        let metadata: Metadata = words.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let number = |key: &str| metadata.get(key).map_or(Some(0), |text| text.parse::<u64>().ok());
        let has = |key: &str| metadata.get(key).is_some_and(|text| !text.is_empty());
        let key = number("sa_res_key").is_some_and(|key| key != 0);
        let holds = number("res_holder") == Some(0) || number("res_type").is_some_and(|kind| kind != 0);
        if !has("initiator_node") || !has("target_node") || !key || !holds {
            return Err(errno(libc::EINVAL));
        }
        self.prepared.borrow_mut().0.push((backstore.to_owned(), metadata));
        Ok(())
    }

    /// A backstore that goes takes with it what was prepared for it.
    pub fn forget_prepared(&self, backstore: &Path) {
        self.prepared.borrow_mut().0.retain(|(of, _)| of != backstore);
    }

    /// `__core_scsi3_check_aptpl_registration`
    pub fn begin_registrations(&self, backstore: &Path, link: &Path) {
        let Some([_, target, tpg, lun]) = port(link) else { return };
        let nexus = link.ancestors().nth(3).unwrap().join("nexus");
        let nexus = self.read(&nexus).unwrap_or_default();
        let mut prepared = self.prepared.borrow_mut();
        let (mine, others): (Vec<_>, Vec<_>) = prepared.0.drain(..).partition(|(of, metadata)| {
            let is = |key: &str, value: &str| metadata.get(key).map(String::as_str) == Some(value);
            of == backstore
                && is("initiator_node", nexus.trim())
                && is("target_node", &target)
                && is("tpgt", tpg.trim_start_matches("tpgt_"))
                && is("target_lun", lun.trim_start_matches("lun_"))
                && is("mapped_lun", lun.trim_start_matches("lun_"))
        });
        prepared.0 = others;
        for (_, metadata) in mine {
            let number = |key: &str| metadata.get(key).map_or(0, |text| text.parse().unwrap());
            self.register(backstore, link, nexus.trim(), number("sa_res_key"));
            if number("res_holder") != 0 {
                self.reserve(backstore, link, nexus.trim(), number("res_type"), number("res_all_tg_pt") != 0);
            }
        }
    }

    /// Somebody registers through an export.
    pub fn register(&self, backstore: &Path, link: &Path, initiator: &str, key: u64) {
        let fabric = &port(link).unwrap()[0];
        let attr = backstore.join("pr/res_pr_registered_i_pts");
        let before = self.read(&attr).unwrap_or_default();
        let before = if before == NONE { HEADING.to_owned() } else { before };
        self.put(
            attr,
            Node::Attr(format!("{before}{fabric} Node: {initiator} Key: 0x{key:016x} PRgen: 0x00000000\n")),
        );
    }

    /// Somebody who is registered reserves.
    pub fn reserve(&self, backstore: &Path, link: &Path, initiator: &str, kind: u64, all: bool) {
        let fabric = &port(link).unwrap()[0];
        let words = match kind {
            1 => "Write Exclusive Access",
            3 => "Exclusive Access",
            5 => "Write Exclusive Access, Registrants Only",
            6 => "Exclusive Access, Registrants Only",
            7 => "Write Exclusive Access, All Registrants",
            _ => "Exclusive Access, All Registrants",
        };
        let all = if all { "All Target Ports" } else { "Single Target Port" };
        for (name, text) in [
            ("res_holder", format!("SPC-3 Reservation: {fabric} Initiator: {initiator}\n")),
            ("res_pr_type", format!("SPC-3 Reservation Type: {words}\n")),
            ("res_pr_all_tgt_pts", format!("SPC-3 Reservation: {all} registration\n")),
        ] {
            self.put(backstore.join("pr").join(name), Node::Attr(text));
        }
    }
}
