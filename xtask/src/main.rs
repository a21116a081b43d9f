//! Project chores: `cargo xtask test`, `cargo xtask vm`, `cargo xtask ci`, `cargo xtask bench`, `cargo xtask deb`, `cargo xtask sbom`.

mod bench;
mod deb;
mod debian;
mod emulate;
mod licences;
mod metadata;
mod passed;
mod plot;
mod sbom;
mod sh;
mod steps;
mod vm;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
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
        /// Seconds for all of it: VM tests that are not done by then are named as NOT RUN, and fail nothing
        #[arg(long, value_name = "SECONDS")]
        within: Option<u64>,
        /// Leave out what has passed in earlier runs with --go-on, at the same scale and on the very same tree
        #[arg(long, conflicts_with = "filters")]
        go_on: bool,
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
    /// The guard kernels' tests in Bochs, which has AVX-512 and GFNI where this machine may not
    EmulateGuard {
        /// Bochs' model of processor (`bochs --help cpu`)
        #[arg(long, default_value = "corei7_icelake_u")]
        model: String,
        /// Build the tests with this cargo profile
        #[arg(long, default_value = "release")]
        profile: String,
        /// Seconds to wait for the result
        #[arg(long, default_value_t = 3600)]
        patience: u64,
    },
    /// The Debian package: binary, unit, man pages, completions; judged by lintian
    Deb {
        /// Build with this cargo profile
        #[arg(long, default_value = "release")]
        profile: String,
    },
    /// What the program is made of: an SBOM (CycloneDX) and the licences of everything in it
    Sbom {
        /// Where to
        #[arg(default_value = "target/packaging")]
        directory: PathBuf,
    },
    /// Run the benches, or those named; what follows -- goes to each of them
    Bench {
        /// guard, ring, image, scale, vm
        names: Vec<String>,
        /// Put the pictures where the documentation has them
        #[arg(long)]
        keep: bool,
        /// Measure nothing: draw what the last run found
        #[arg(long)]
        draw: bool,
        /// Options of the bench, `--seconds 10` for instance
        #[arg(last = true)]
        more: Vec<String>,
    },
    /// What runs in the guest
    #[command(hide = true)]
    GuestAgent,
}

fn main() -> ExitCode {
    let test = |scale, vm, filters, within: Option<u64>, go_on| {
        steps::run(&steps::Plan { scale, vm, filters, within: within.map(Duration::from_secs), go_on })
    };
    let done = match Arguments::parse().chore {
        Chore::Test { quick, full, no_vm, filters, within, go_on } => {
            let scale = match (quick, full) {
                (true, _) => Scale::Quick,
                (_, true) => Scale::Full,
                _ => Scale::Default,
            };
            test(scale, !quick && !no_vm, filters, within, go_on)
        }
        Chore::Ci => test(Scale::Default, true, Vec::new(), None, false),
        Chore::Vm { action } => vm::main(action),
        Chore::EmulateGuard { model, profile, patience } => {
            emulate::main(&model, &profile, Duration::from_secs(patience))
        }
        Chore::Deb { profile } => deb::main(&profile).map(|()| ExitCode::SUCCESS),
        Chore::Sbom { directory } => sbom::main(&directory).map(|()| ExitCode::SUCCESS),
        Chore::Bench { names, keep, draw, more } => {
            bench::main(&names, keep, draw, &more).map(|()| ExitCode::SUCCESS)
        }
        Chore::GuestAgent => vm::serve().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
