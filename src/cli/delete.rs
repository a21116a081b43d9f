//! `tcmu-dif delete`: takes a LUN and its exports down, and refuses while somebody uses them.

use std::{path::Path, process::ExitCode, time::Duration};

use serde::Serialize;

use super::{
    CliError, Done,
    args::{Cli, Delete},
    luns::{Places, SYSFS, refused},
    output, require_root,
};
use crate::kernel::{
    backstore::{Backstore, ConfigfsError},
    fabric::{self, Export, Fabric, Removed},
    usage::{self, User},
};

/// How long the daemon may take to close the image.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Deleted<'a> {
    name: &'a str,
    deleted: bool,
    /// Targets that stay until their guest goes.
    left: Vec<String>,
}

/// Takes the LUN down.
pub fn run(cli: &Cli, args: &Delete) -> Done {
    let places = Places::of(cli);
    let name = &args.name;
    let store = places.lun("delete", name)?;
    let exports = fabric::of(&places.tree, &store).map_err(|e| refused("delete", name, &e))?;
    if let Some(foreign) = exports.iter().find_map(usage::of_foreign) {
        return Err(CliError::new("delete", name, foreign.to_string())
            .then("take that export down first, with the tool that made it: targetcli"));
    }
    require_root("delete")?;
    let users: Vec<User> = exports.iter().flat_map(|e| users_of(&places, e)).collect();
    if !args.force && !users.is_empty() {
        let users = users.iter().map(User::to_string).collect::<Vec<_>>().join("; ");
        return Err(CliError::new("delete", name, users).then(format!(
            "let go of it first, or take it away from its users: tcmu-dif delete --force {name}"
        )));
    }
    let alive = places.run.daemon().map_err(|e| CliError::from("delete", name, &e))?.is_some();
    if !alive && !exports.is_empty() {
        if !args.force {
            // The disk driver would wait for an answer to SYNCHRONIZE CACHE that nobody gives.
            return Err(CliError::new(
                "delete",
                name,
                "the daemon isn't running, and the disk's cache can't be flushed",
            )
            .then(format!(
                "start it: tcmu-dif daemon; or give up what isn't flushed: tcmu-dif delete --force {name}"
            )));
        }
        give_up(&places, &store, &exports).map_err(|e| refused("delete", name, &e))?;
    }
    let mut left = Vec::new();
    for export in &exports {
        match fabric::remove(&places.tree, export).map_err(|e| refused("delete", name, &e))? {
            Removed::Whole => {}
            Removed::TargetInUse => left.push(export.target.clone()),
        }
    }
    store.remove(&places.tree).map_err(|e| refused("delete", name, &e))?;
    // Until the daemon has let go of the image, nobody else can have it.
    if alive && !gone(&places, name.as_str(), store.hba) {
        tracing::warn!("the daemon still closes the image of {name}");
    }
    if args.json.json {
        return output::json(&Deleted { name: name.as_str(), deleted: true, left });
    }
    for target in left {
        eprintln!("tcmu-dif: the target {target} stays until its guest goes: rmdir it then");
    }
    output::print(&format!("{name} is deleted; its image stays"))?;
    Ok(ExitCode::SUCCESS)
}

/// Ends what waits for a daemon that isn't there.
fn give_up(places: &Places, store: &Backstore, exports: &[Export]) -> Result<(), ConfigfsError> {
    for export in exports.iter().filter(|e| e.kind() == Some(Fabric::Loopback)) {
        let address = fabric::scsi_address(&places.tree, export)?;
        if let Err(e) = fabric::set_disk_offline(Path::new(SYSFS), &address) {
            tracing::warn!("the disk at {address} could not be put offline: {e}");
        }
    }
    store.abandon(&places.tree)
}

fn users_of(places: &Places, export: &Export) -> Vec<User> {
    match export.kind() {
        Some(Fabric::Vhost) => usage::of_vhost(&places.tree, export).into_iter().collect(),
        Some(Fabric::Loopback) => {
            let address = fabric::scsi_address(&places.tree, export);
            let disk = address.map(|a| fabric::disk(Path::new(SYSFS), &a));
            disk.map(|d| usage::Places::default().users_of(&d)).unwrap_or_default()
        }
        None => Vec::new(),
    }
}

/// Waits until the daemon's file for that LUN is gone, or is another LUN's.
fn gone(places: &Places, name: &str, hba: u32) -> bool {
    let end = std::time::Instant::now() + CLOSE_PATIENCE;
    while std::time::Instant::now() < end {
        if places.run.read(name).is_ok_and(|state| state.is_none_or(|s| s.hba != hba)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}
