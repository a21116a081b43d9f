//! `tcmu-dif standby`: a host that waits until another is gone, and takes its LUNs over.

use std::{path::PathBuf, process::ExitCode, sync::atomic::AtomicBool, thread};

use clap::Args;
use serde_json::json;

use super::{
    CliError, Done,
    args::{Cli, Json},
    output,
};
use crate::admin::standby::{self, TakenOver};

/// Its words.
#[derive(Debug, Args)]
pub struct Standby {
    /// Files that declare LUNs which another host has: NAME.toml, in the words of luns.d, with the serial number; not in luns.d
    #[arg(value_name = "FILE", required = true)]
    pub declarations: Vec<PathBuf>,
    /// A program that makes sure that the other host is gone: called with its name, and believed if it ends with 0; nothing is taken over without its word
    #[arg(long, value_name = "PROGRAM")]
    pub fence_agent: Option<PathBuf>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// Runs it: until all of them are here.
pub fn run(cli: &Cli, args: &Standby) -> Done {
    let admin = cli.admin();
    let agent = args.fence_agent.as_deref().map(standby::agent).transpose()?;
    let orders: Vec<_> =
        args.declarations.iter().map(|path| admin.may_stand_by(path)).collect::<Result<_, _>>()?;
    let never = AtomicBool::new(false);
    let mut failed = None;
    thread::scope(|scope| {
        let (admin, agent, never) = (&admin, agent.as_deref(), &never);
        let all: Vec<_> = orders
            .iter()
            .map(|order| {
                scope.spawn(move || {
                    let over = admin.stand_by(order, agent, never)?;
                    over.map_or(Ok(ExitCode::SUCCESS), |over| tell(args, &over))
                })
            })
            .collect();
        for one in all {
            let ended =
                one.join().unwrap_or_else(|_| Err(CliError::new("standby", "", "a thread has panicked")));
            if let Err(e) = ended {
                // The last one is told by whoever called.
                if let Some(before) = failed.replace(e) {
                    eprintln!("{before}");
                }
            }
        }
    });
    failed.map_or(Ok(ExitCode::SUCCESS), Err)
}

fn tell(args: &Standby, over: &TakenOver) -> Done {
    if args.json.json {
        let value = serde_json::to_value(over).unwrap_or_else(|e| json!({ "error": e.to_string() }));
        return output::json(&value);
    }
    let seconds = |ms: u64| format!("{}.{} s", ms / 1000, ms % 1000 / 100);
    let TakenOver { from, silent_ms, fenced, image_ms, lun_ms, lun } = over;
    let gone = if *fenced { "is gone, says the fencing agent" } else { "is taken for gone" };
    output::print(&format!(
        "{} serves here: {}, serial number {}\n  host {from} was silent for {} and {gone}; its image took {}, the LUN {}",
        lun.name,
        lun.image,
        lun.serial,
        seconds(*silent_ms),
        seconds(*image_ms),
        seconds(*lun_ms),
    ))
}
