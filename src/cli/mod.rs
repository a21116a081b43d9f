//! The command line: arguments, tables, JSON, progress bars.
//!
//! [`main`] parses, runs one command and prints how it failed. Each command has a file; what they share about LUNs is in
//! [`luns`].

mod args;
mod check_host;
mod conformance;
mod create;
mod delete;
mod error;
mod image;
mod image_args;
mod image_check;
mod image_map;
mod image_measure;
mod image_resize;
mod image_snapshot;
mod logging;
mod luns;
mod output;
mod packaging;
mod pi;
mod resize;
mod scrub;
mod show;
mod size;

use std::{ffi::OsString, process::ExitCode, sync::Arc, time::Duration};

use args::{Cli, Command, IoWay};
pub use error::CliError;

use crate::{
    daemon::{
        real::RealHost,
        rundir::RunDir,
        serve::{self, DaemonError},
    },
    kernel::{netlink::NetlinkError, usage},
    peer::vhost,
    sys::io::Backend,
};

/// How a command ends that hasn't failed.
type Done = Result<ExitCode, CliError>;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let cli = match args::parse(words.clone()) {
        Ok(cli) => cli,
        // Help and version go to stdout and are no failure.
        Err(e) if !e.use_stderr() => {
            e.print().ok();
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            let e = error::from_clap(&e, &words);
            eprintln!("{e}");
            return e.exit_code();
        }
    };
    let done = logging(&cli).and_then(|()| run(&cli));
    done.unwrap_or_else(|e| {
        eprintln!("{e}");
        e.exit_code()
    })
}

fn logging(cli: &Cli) -> Result<(), CliError> {
    logging::begin(cli, if matches!(cli.command, Command::Daemon(_)) { "info" } else { "warn" })
}

fn run(cli: &Cli) -> Done {
    match &cli.command {
        Command::Daemon(args) => daemon(cli, args),
        Command::Create(args) => create::run(cli, args),
        Command::Delete(args) => delete::run(cli, args),
        Command::List(args) => show::list(cli, args.json),
        Command::Show(args) => show::show(cli, args),
        Command::Resize(args) => resize::run(cli, args),
        Command::Image(args) => image::run(args),
        Command::Pi(args) => pi::run(args),
        Command::Scrub(args) => scrub::run(cli, args),
        Command::CheckHost(args) => check_host::run(cli, args),
        Command::Demo => demo(),
        Command::Conformance(args) => conformance::run(args),
        Command::PeerVhost(args) => peer_vhost(args),
        Command::PackagingFiles(args) => packaging::run(args),
    }
}

fn daemon(cli: &Cli, args: &args::Daemon) -> Done {
    require_root("daemon")?;
    let backend = match args.io {
        IoWay::Auto => None,
        IoWay::Uring => Some(Backend::Uring),
        IoWay::Threads => Some(Backend::Threads),
    };
    let run = RunDir::at(&cli.run_dir);
    let host = RealHost {
        configfs: cli.configfs.clone(),
        run: run.clone(),
        state_dir: cli.state_dir.clone(),
        backend,
    };
    serve::run(Arc::new(host), run, &cli.configfs).map_err(|e| {
        let next = match &e {
            DaemonError::Running(pid) => format!("stop it first: kill {pid}"),
            DaemonError::Module(_) | DaemonError::Netlink(NetlinkError::NoFamily) => {
                "see what this host lacks: tcmu-dif check-host".to_owned()
            }
            _ => "look at the kernel's messages: dmesg".to_owned(),
        };
        CliError::from("daemon", "", &e).then(next)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn demo() -> Done {
    crate::demo::run(&mut std::io::stdout()).map_err(|e| CliError::from("demo", "", &e))?;
    Ok(ExitCode::SUCCESS)
}

fn peer_vhost(args: &args::PeerVhost) -> Done {
    let options = vhost::Options {
        writes: args.writes,
        depth: args.depth,
        region: args.region,
        seed: args.seed,
        measure: Duration::from_millis(args.measure_ms),
        ..vhost::Options::default()
    };
    let report = vhost::selftest(args.wwn.as_str(), &options)
        .map_err(|e| CliError::from("peer-vhost", &args.wwn, &e))?;
    output::json(&report)?;
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Refuses anybody but root.
fn require_root(command: &str) -> Result<(), CliError> {
    usage::require_root().map_err(|e| {
        CliError::new(command, "", e.to_string()).then(format!("run it as root: sudo tcmu-dif {command} …"))
    })
}
