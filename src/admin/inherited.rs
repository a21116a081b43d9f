//! What the kernel keeps of a LUN that goes to another host, or comes from one: persistent reservations and target port groups. Read on one side in terms of exports, and
//! made again on the other for the exports there.

use std::path::Path;

use crate::{
    handover::{
        Failure,
        port::{self, Alua, ExportName, Reservations},
    },
    kernel::{
        alua::{self, Group, Membership},
        backstore::{Backstore, ConfigfsError},
        fabric::{self, Export, Fabric},
        names::Wwn,
        reservations::{self, Held, Registration},
        tree::Tree,
        undo::Undo,
    },
};

/// Why what the kernel keeps cannot be taken along.
#[derive(Debug)]
pub(super) enum Stays {
    /// The kernel's.
    Kernel(ConfigfsError),
    /// In words.
    Because(Failure),
}

impl From<ConfigfsError> for Stays {
    fn from(e: ConfigfsError) -> Stays {
        Stays::Kernel(e)
    }
}

fn named(export: &Export) -> ExportName {
    (export.fabric.clone(), export.target.clone())
}

/// Reservations in terms of the exports through which they were made; nothing, if there are none.
///
/// # Errors
/// Which cannot go along, and what to do about it.
pub(super) fn reservations_of(
    tree: &dyn Tree,
    store: &Backstore,
    exports: &[Export],
    held: &Held,
) -> Result<Option<Reservations>, Stays> {
    let because = |failure| Err(Stays::Because(failure));
    let (registrants, holder) = match held {
        Held::Legacy(words) => {
            return because(
                Failure::new(format!(
                    "it is reserved by RESERVE(6), which the kernel lets nobody make again elsewhere: {words}"
                ))
                .then("have the initiator release it first (RELEASE(6), or a LUN reset)"),
            );
        }
        Held::Persistent { registrants, .. } if registrants.is_empty() => return Ok(None),
        Held::Persistent { registrants, holder } => (registrants, holder.as_ref()),
    };
    if !alua::is_on(tree, &store.path)? {
        return because(
            Failure::new(format!(
                "initiators are registered, and with {}/attrib/alua_support off they cannot be kept from changing that while it is handed over",
                store.path.display()
            ))
            .then("have them give their registrations up first (sg_persist --out --clear)"),
        );
    }
    let mut ports = Vec::new();
    for export in exports {
        if let Some(nexus) = reservations::nexus(tree, export)? {
            ports.push((export, nexus));
        }
    }
    let mut registrations = Vec::new();
    for one in registrants {
        let who = &one.initiator;
        let port = ports.iter().find(|(export, nexus)| {
            export.fabric == who.fabric && *nexus == who.name && who.session.is_none()
        });
        let Some((export, nexus)) = port else {
            return because(
                Failure::new(format!(
                    "the initiator {who} is registered with the key {:#x}, and is none of the LUN's own exports', so it could not be registered there",
                    one.key
                ))
                .then(format!(
                    "have it give that up, or another preempt it: sg_persist --out --preempt --param-sark={:#x} …",
                    one.key
                )),
            );
        };
        let holds = holder.filter(|holder| holder.initiator == *who);
        registrations.push(port::Registration {
            export: named(export),
            initiator: nexus.clone(),
            key: format!("{:#018x}", one.key),
            all_target_ports: holds.is_some_and(|holder| holder.all_target_ports),
            holds: holds.map(|holder| holder.kind),
        });
    }
    Ok(Some(Reservations { registrations }))
}

/// Target port groups and who is in them; nothing, if all is as the kernel makes it.
///
/// # Errors
/// The kernel's.
pub(super) fn alua_of(
    tree: &dyn Tree,
    store: &Backstore,
    exports: &[Export],
) -> Result<Option<Alua>, ConfigfsError> {
    let groups = alua::groups(tree, &store.path)?;
    let mut ports = Vec::new();
    for export in exports {
        let Membership { group, offline } = alua::membership(tree, export)?;
        if group.is_some() || offline {
            ports.push(port::Port { export: named(export), group, offline });
        }
    }
    let groups: Vec<_> = groups
        .into_iter()
        .map(|Group { name, id, attributes }| port::Group { name, id, attributes })
        .collect();
    Ok((!groups.is_empty() || !ports.is_empty()).then_some(Alua { groups, ports }))
}

/// An export as it is called there, and what it is here.
pub(super) type Renamed = (ExportName, (Fabric, Wwn));

/// What a LUN gets in this kernel that it had in another.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Inherited {
    registrations: Vec<Registration>,
    groups: Vec<Group>,
    /// Of each export here that is not as the kernel makes it, by its target.
    memberships: Vec<(Fabric, Wwn, Membership)>,
}

impl Inherited {
    /// Of what came, for those exports: each as it was called there, and as it is called here.
    ///
    /// # Errors
    /// What of it makes no sense here.
    pub(super) fn of(
        reservations: Option<&Reservations>,
        alua: Option<&Alua>,
        exports: &[Renamed],
    ) -> Result<Inherited, Failure> {
        let here = |there: &ExportName| {
            let found = exports.iter().find(|(name, _)| name == there).map(|(_, here)| here.clone());
            found.ok_or_else(|| {
                Failure::new(format!("it has no export {}:{}, of which more is told", there.0, there.1))
            })
        };
        let mut out = Inherited::default();
        for one in reservations.iter().flat_map(|r| &r.registrations) {
            let (fabric, wwn) = here(&one.export)?;
            let key = one.key.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
            let key = key.filter(|key| *key != 0).ok_or_else(|| {
                Failure::new(format!(
                    "the initiator {} is registered with no key: {:?}",
                    one.initiator, one.key
                ))
            })?;
            if let Some(kind) = one.holds.filter(|kind| !reservations::is_type(*kind)) {
                return Err(Failure::new(format!("a reservation of the unknown type {kind} is told")));
            }
            out.registrations.push(Registration {
                fabric: fabric.word().to_owned(),
                initiator: fabric::initiator(&wwn).to_string(),
                target: wwn.to_string(),
                key,
                all_target_ports: one.all_target_ports,
                holds: one.holds,
            });
        }
        if out.registrations.iter().filter(|one| one.holds.is_some()).count() > 1 {
            return Err(Failure::new("two holders of its reservation are told"));
        }
        for port::Group { name, id, attributes } in alua.iter().flat_map(|a| &a.groups) {
            let sound = !name.is_empty() && name.len() < 64 && !name.contains('/') && !name.starts_with('.');
            if !sound {
                return Err(Failure::new(format!("{name:?} is no name of a target port group")));
            }
            if let Some(unknown) = attributes.keys().find(|attr| !alua::is_attribute(attr)) {
                return Err(Failure::new(format!(
                    "the target port group {name} has {unknown}, which is not known here"
                ))
                .then("use the same version on both hosts"));
            }
            out.groups.push(Group { name: name.clone(), id: *id, attributes: attributes.clone() });
        }
        for port in alua.iter().flat_map(|a| &a.ports) {
            let (fabric, wwn) = here(&port.export)?;
            if let Some(group) =
                port.group.as_ref().filter(|g| !out.groups.iter().any(|have| have.name == **g))
            {
                return Err(Failure::new(format!(
                    "an export is in the target port group {group}, of which nothing is told"
                )));
            }
            let membership = Membership { group: port.group.clone(), offline: port.offline };
            out.memberships.push((fabric, wwn, membership));
        }
        Ok(out)
    }

    /// Before anything is exported.
    ///
    /// # Errors
    /// The step that the kernel refused.
    pub(super) fn before_exports(
        &self,
        tree: &dyn Tree,
        store: &Path,
        undo: &mut Undo<'_>,
    ) -> Result<(), ConfigfsError> {
        alua::make(tree, store, &self.groups, undo)?;
        reservations::prepare(tree, store, &self.registrations)
    }

    /// As soon as an export is there.
    ///
    /// # Errors
    /// The kernel's; InvalidData if it has not done what it was told.
    pub(super) fn exported(
        &self,
        tree: &dyn Tree,
        store: &Path,
        export: &Export,
    ) -> Result<(), ConfigfsError> {
        let is_it = |fabric: &str, target: &str| export.fabric == fabric && export.target == target;
        let mine: Vec<Registration> =
            self.registrations.iter().filter(|r| is_it(&r.fabric, &r.target)).cloned().collect();
        if !mine.is_empty() {
            reservations::check(tree, store, &mine)?;
        }
        let membership = self.memberships.iter().find(|(fabric, wwn, _)| is_it(fabric.word(), wwn.as_str()));
        membership.map_or(Ok(()), |(_, _, membership)| alua::join(tree, export, membership))
    }
}

#[cfg(test)]
#[path = "inherited_tests.rs"]
mod tests;
