//! `tcmu-dif resize`: another capacity while the LUN is in use.

use std::path::Path;

use serde::Serialize;

use super::{
    CliError, Done,
    args::{Cli, Resize},
    luns::{Places, SYSFS, refused},
    output, require_root, size,
};
use crate::daemon::resize::{ResizeError, resize};

#[derive(Serialize)]
struct Resized<'a> {
    name: &'a str,
    capacity_bytes: u64,
}

/// Resizes.
pub fn run(cli: &Cli, args: &Resize) -> Done {
    let places = Places::of(cli);
    let name = &args.name;
    let store = places.lun("resize", name)?;
    if !args.size.is_multiple_of(store.block_size.max(1)) {
        let up = args.size.next_multiple_of(store.block_size.max(1));
        return Err(not_multiple(name.as_str(), args.size, store.block_size, up));
    }
    require_root("resize")?;
    places.daemon()?;
    resize(&places.tree, Path::new(SYSFS), &places.run, &store, args.size).map_err(|e| match e {
        ResizeError::NotMultiple { block_size, up } => not_multiple(name.as_str(), args.size, block_size, up),
        ResizeError::Kernel(e) => refused("resize", name, &e),
        ResizeError::State(e) => CliError::from("resize", name, &e),
        ResizeError::Refused(_) | ResizeError::Silent => {
            CliError::new("resize", name, e.to_string()).then("look at the daemon's log")
        }
    })?;
    if args.json.json {
        return output::json(&Resized { name: name.as_str(), capacity_bytes: args.size });
    }
    output::print(&format!("{name} has {} ({} bytes)", size::human(args.size), args.size))
}

fn not_multiple(name: &str, bytes: u64, block_size: u64, up: u64) -> CliError {
    CliError::new("resize", bytes, format!("not a multiple of the block size of {block_size} bytes"))
        .then(format!("choose {up}: tcmu-dif resize {name} {up}"))
}
