//! `tcmu-dif delete`.

use super::{
    Done,
    args::{Cli, Delete},
    output,
};

/// Takes the LUN down.
pub fn run(cli: &Cli, args: &Delete) -> Done {
    let gone = cli.admin().delete(&args.name, args.force)?;
    if args.json.json {
        return output::json(&gone);
    }
    for target in gone.left {
        eprintln!("tcmu-dif: the target {target} stays until its guest goes: rmdir it then");
    }
    for thing in gone.leftovers {
        eprintln!("left by a create or delete that was cut off, and gone now: {thing}");
    }
    output::print(&format!("{} is deleted; its image stays", gone.name))
}
