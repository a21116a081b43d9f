//! `tcmu-dif release`: what the service does before the host goes down.
//!
//! The kernel flushes every disk when it goes down, after the last process: a disk on this host whose daemon has ended by then holds
//! the kernel up until its commands time out.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use super::{
    CliError, Done,
    args::{Cli, Release},
};
use crate::{
    admin::{luns::refused, require_root},
    kernel::{backstore, names::Name},
    lun::config::SUBTYPE,
};

/// Takes every LUN down that nobody uses. What stays is said, and is no failure: the host goes down all the same.
/// The service has no terminal; a person who has one, and wants this, says so.
pub fn run(cli: &Cli, args: &Release) -> Done {
    if io::stdin().is_terminal() && !args.yes {
        return Err(CliError::usage("release", "", "it takes down every LUN of this host that nobody uses")
            .then("if that is meant: tcmu-dif release --yes; for one LUN: tcmu-dif delete NAME"));
    }
    require_root("release")?;
    let admin = cli.admin();
    let stores = backstore::all(&admin.places.tree);
    for store in stores.map_err(|e| refused("release", cli.configfs.display(), &e))? {
        if !store.is_of(SUBTYPE) {
            continue;
        }
        let name = Name::new(&store.name).map_err(|e| CliError::new("release", &store.name, e.to_string()));
        if let Err(e) = name.and_then(|name| admin.delete(&name, false)) {
            tracing::warn!(lun = store.name, "stays: {}", e.reason);
        }
    }
    Ok(ExitCode::SUCCESS)
}
