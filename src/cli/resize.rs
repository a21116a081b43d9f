//! `tcmu-dif resize`: another capacity while the LUN is in use.

use std::{path::Path, time::Duration};

use serde::Serialize;

use super::{
    CliError, Done,
    args::{Cli, Resize},
    luns::{Places, SYSFS, refused},
    output, require_root, size,
};
use crate::{
    daemon::rundir::LastChange,
    kernel::{
        backstore::Backstore,
        fabric::{self, Fabric},
    },
    lun::state_file::now_ms,
};

/// How long the daemon may take: an image that shrinks frees what it had.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Resized<'a> {
    name: &'a str,
    capacity_bytes: u64,
}

/// Has this host's own disks ask for their capacity: Linux hears of it with the next command's unit attention, and then
/// only logs it.
fn look_again(places: &Places, store: &Backstore) {
    let exports = fabric::of(&places.tree, store).unwrap_or_default();
    for export in exports.iter().filter(|e| e.kind() == Some(Fabric::Loopback)) {
        let rescanned = fabric::scsi_address(&places.tree, export)
            .map_err(|e| e.source)
            .and_then(|address| fabric::rescan_disk(Path::new(SYSFS), &address));
        if let Err(e) = rescanned {
            tracing::warn!("the disk of {} still has its old size: {e}", export.target);
        }
    }
}

/// Resizes.
pub fn run(cli: &Cli, args: &Resize) -> Done {
    let places = Places::of(cli);
    let name = &args.name;
    let store = places.lun("resize", name)?;
    if !args.size.is_multiple_of(store.block_size.max(1)) {
        let up = args.size.next_multiple_of(store.block_size.max(1));
        return Err(CliError::new(
            "resize",
            args.size,
            format!("not a multiple of the block size of {} bytes", store.block_size),
        )
        .then(format!("choose {up}: tcmu-dif resize {name} {up}")));
    }
    require_root("resize")?;
    places.daemon()?;
    if store.capacity != args.size {
        let before = now_ms();
        store.set_capacity(&places.tree, args.size).map_err(|e| refused("resize", name, &e))?;
        let mine = |c: &LastChange| c.what == "capacity" && c.value == args.size;
        let state = places
            .run
            .wait(name.as_str(), PATIENCE, |s| {
                s.written_ms >= before && s.last_change.as_ref().is_some_and(mine)
            })
            .map_err(|e| CliError::from("resize", name, &e))?;
        let change = state.filter(|s| s.written_ms >= before).and_then(|s| s.last_change).filter(mine);
        let reason = match change {
            Some(LastChange { error: None, .. }) => None,
            Some(LastChange { error, .. }) => error,
            None => Some("the daemon hasn't done it".to_owned()),
        };
        if let Some(reason) = reason {
            // The kernel's number goes back to what the LUN still has.
            if let Err(e) = store.set_capacity(&places.tree, store.capacity) {
                tracing::warn!("the old size could not be put back: {e}");
            }
            return Err(CliError::new("resize", name, reason).then("look at the daemon's log"));
        }
        look_again(&places, &store);
    }
    if args.json.json {
        return output::json(&Resized { name: name.as_str(), capacity_bytes: args.size });
    }
    output::print(&format!("{name} has {} ({} bytes)", size::human(args.size), args.size))
}
