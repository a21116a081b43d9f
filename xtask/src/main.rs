//! Project chores: `cargo xtask test`, `cargo xtask vm`, `cargo xtask ci`.

mod debian;
mod sh;
mod vm;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Project chores of tcmu-dif")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
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
    let done = match Arguments::parse().chore {
        Chore::Vm { action } => vm::main(action),
        Chore::GuestAgent => vm::serve().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
