//! `tcmu-dif resize`: another capacity while the LUN is in use.

use std::path::Path;

use serde::Serialize;

use super::{
    CliError, Done,
    args::{Cli, Resize},
    luns::refused,
    output, require_root, size,
};
use crate::{
    daemon::resize::{ResizeError, check, resize},
    kernel::SYSFS,
};

#[derive(Serialize)]
struct Resized<'a> {
    name: &'a str,
    capacity_bytes: u64,
}

/// Resizes.
pub fn run(cli: &Cli, args: &Resize) -> Done {
    let places = cli.places();
    let name = &args.name;
    let store = places.lun("resize", name)?;
    let said = |e: ResizeError| match e {
        ResizeError::NotMultiple { up, .. } => CliError::new("resize", args.size, e.to_string())
            .then(format!("choose {up}: tcmu-dif resize {name} {up}")),
        ResizeError::Kernel(e) => refused("resize", name, &e),
        ResizeError::State(e) => CliError::from("resize", name, &e),
        ResizeError::Refused(_) | ResizeError::Silent => {
            CliError::new("resize", name, e.to_string()).then("look at the daemon's log")
        }
    };
    check(&store, args.size).map_err(said)?;
    require_root("resize")?;
    places.daemon()?;
    resize(&places.tree, Path::new(SYSFS), &places.run, &store, args.size).map_err(said)?;
    if args.json.json {
        return output::json(&Resized { name: name.as_str(), capacity_bytes: args.size });
    }
    output::print(&format!("{name} has {} ({} bytes)", size::human(args.size), args.size))
}
