//! Whether initiators have reserved a backstore: LIO keeps SCSI reservations itself, and shows them in configfs (`target_core_configfs.c`).

use std::{io, path::Path};

use super::{
    backstore::{ConfigfsError, Context},
    tree::Tree,
};

/// The reservation or the registrations of a backstore, as the kernel says it, if there are any. A kernel without these attributes has none.
///
/// # Errors
/// The kernel's.
pub fn of(tree: &dyn Tree, backstore: &Path) -> Result<Option<String>, ConfigfsError> {
    // "SPC-3 PR Registrations:" and a line for each, or "None"; of a device that leaves reservations to others, no such heading.
    let registered = read(tree, &backstore.join("pr/res_pr_registered_i_pts"))?;
    let mut lines = registered.lines().map(str::trim).filter(|line| !line.is_empty());
    if lines.next().is_some_and(|heading| heading.starts_with("SPC-3 PR Registrations"))
        && let Some(first) = lines.next().filter(|line| *line != "None")
    {
        return Ok(Some(first.to_owned()));
    }
    // "No SPC-3 Reservation holder", or "SPC-2 Reservation: iSCSI Initiator: …".
    let holder = read(tree, &backstore.join("pr/res_holder"))?;
    let holder = holder.trim();
    Ok((holder.contains("Reservation:")).then(|| holder.to_owned()))
}

fn read(tree: &dyn Tree, attr: &Path) -> Result<String, ConfigfsError> {
    match tree.read(attr) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.context("read", attr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::{Fake, Node};

    #[test]
    fn registrations_and_reservations_are_told_and_their_absence_in_all_its_words() {
        let store = Path::new("target/core/user_0/vm1");
        let told = |registered: &str, holder: &str| {
            let fake = Fake::new();
            for (attr, value) in [("pr/res_pr_registered_i_pts", registered), ("pr/res_holder", holder)] {
                fake.nodes.borrow_mut().insert(store.join(attr), Node::Attr(value.to_owned()));
            }
            of(&fake, store).unwrap()
        };
        assert_eq!(of(&Fake::new(), store).unwrap(), None);
        assert_eq!(told("SPC-3 PR Registrations:\nNone\n", "No SPC-3 Reservation holder\n"), None);
        assert_eq!(told("SPC_RESERVATIONS_DISABLED\n", "Passthrough\n"), None);
        let node = "iSCSI Node: iqn.1996-04.de.example:1 Key: 0x0000000000000001 PRgen: 0x00000001";
        assert_eq!(
            told(&format!("SPC-3 PR Registrations:\n{node}\n"), "No SPC-3 Reservation holder\n").as_deref(),
            Some(node)
        );
        let spc2 = "SPC-2 Reservation: iSCSI Initiator: iqn.1996-04.de.example:1";
        assert_eq!(told("SPC-3 PR Registrations:\nNone\n", spc2).as_deref(), Some(spc2));
    }
}
