//! Project chores: `cargo xtask test`, `cargo xtask vm`, `cargo xtask ci`.

mod debian;
mod sh;
mod steps;
mod vm;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use vm::Scale;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Project chores of tcmu-dif")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Run every check; --quick leaves the VM out
    Test {
        /// Short loops, and no VM
        #[arg(long, conflicts_with = "full")]
        quick: bool,
        /// Long loops
        #[arg(long)]
        full: bool,
        /// Everything but the VM suite
        #[arg(long)]
        no_vm: bool,
        /// Only tests whose names contain one of these words, and none of the other checks
        filters: Vec<String>,
    },
    /// What CI runs: `test`
    Ci,
    /// The VM with the real target_core_user
    Vm {
        #[command(subcommand)]
        action: vm::Action,
    },
    /// What runs in the guest
    #[command(hide = true)]
    GuestAgent,
}

fn main() -> ExitCode {
    let test = |scale, vm, filters| steps::run(&steps::Plan { scale, vm, filters });
    let done = match Arguments::parse().chore {
        Chore::Test { quick: true, filters, .. } => test(Scale::Quick, false, filters),
        Chore::Test { full: true, no_vm, filters, .. } => test(Scale::Full, !no_vm, filters),
        Chore::Test { no_vm, filters, .. } => test(Scale::Default, !no_vm, filters),
        Chore::Ci => test(Scale::Default, true, Vec::new()),
        Chore::Vm { action } => vm::main(action),
        Chore::GuestAgent => vm::serve().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
