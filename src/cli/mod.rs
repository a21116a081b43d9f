//! The command line: arguments, tables, JSON, progress bars.
//!
//! [`main`] parses, runs one command and prints how it failed. Each command has a file; what they share about LUNs is in
//! [`crate::admin::luns`].

mod args;
mod backup;
mod chain;
mod check_host;
mod conformance;
mod create;
mod daemon_args;
mod delete;
mod error;
mod export;
mod export_args;
mod export_past;
mod handover;
mod handover_args;
mod image;
mod image_args;
mod image_check;
mod image_map;
mod image_measure;
mod image_owner;
mod image_resize;
mod image_snapshot;
mod job;
mod job_args;
mod listen;
mod logging;
mod output;
mod packaging;
mod pi;
mod release;
mod resize;
mod scrub;
mod settings;
mod show;
mod size;
mod standby;
mod support_bundle;
mod throttle;
mod top;
mod trace;

use std::{ffi::OsString, io::Write, path::Path, process::ExitCode, sync::Arc, time::Duration};

use args::{Cli, Command};
pub use error::CliError;

use crate::{
    admin::{config_check, declared::Declared, luns, require_root},
    daemon::{
        real::RealHost,
        rundir::RunDir,
        serve::{self, DaemonError},
        settings::{Settings, Shared},
    },
    dbus,
    kernel::{SYSFS, netlink::NetlinkError},
    lun::config::SUBTYPE,
    peer::vhost,
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
            let printed = e.print().and_then(|()| std::io::stdout().flush());
            return output::printed(printed).unwrap_or_else(|e| {
                eprintln!("{e}");
                e.exit_code()
            });
        }
        Err(e) => {
            let e = error::from_clap(&e, &words);
            eprintln!("{e}");
            return e.exit_code();
        }
    };
    let done = run(&cli);
    done.unwrap_or_else(|e| {
        eprintln!("{e}");
        e.exit_code()
    })
}

fn run(cli: &Cli) -> Done {
    // What a daemon logs may stand in its file.
    if !matches!(cli.command, Command::Daemon(_)) {
        logging::begin(cli.log.as_deref().unwrap_or("warn"))?;
    }
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
        Command::Export(args) => export::run(cli, args),
        Command::Throttle(args) => throttle::run(cli, args),
        Command::Mirror(args) => job::mirror(cli, args),
        Command::Backup(args) => backup::backup(cli, args),
        Command::Bitmap(bitmap) => backup::bitmap(cli, bitmap),
        Command::Snapshot(args) => chain::snapshot(cli, args),
        Command::Stream(args) => chain::stream(cli, args),
        Command::Commit(args) => chain::commit(cli, args),
        Command::Job(args) => job::job(cli, args),
        Command::Handover(args) => handover::give(cli, args),
        Command::Receive(args) => handover::take(cli, args),
        Command::Standby(args) => standby::run(cli, args),
        Command::Top(args) => top::run(cli, args),
        Command::SupportBundle(args) => support_bundle::run(cli, args),
        Command::Trace(args) => trace::run(cli, args),
        Command::CheckHost(args) => check_host::run(cli, args),
        Command::Demo(args) => demo(args.json),
        Command::Conformance(args) => conformance::run(args),
        Command::PeerVhost(args) => peer_vhost(args),
        Command::Release(args) => release::run(cli, args),
        Command::PackagingFiles(args) => packaging::run(args),
    }
}

fn daemon(cli: &Cli, args: &daemon_args::Daemon) -> Done {
    let source = settings::Source::of(cli, args);
    if args.check {
        source.try_out(&RunDir::at(&cli.run_dir))?;
        return source.tell(args.json);
    }
    let settings = source.read()?;
    let log = logging::begin(&settings.log)?;
    require_root("daemon")?;
    let settings = Shared::new(settings);
    let run = RunDir::at(&cli.run_dir);
    let host = RealHost {
        configfs: cli.configfs.clone(),
        run: run.clone(),
        state_dir: cli.state_dir.clone(),
        neighbourhood: Default::default(),
        settings: settings.clone(),
    };
    let admin = cli.admin();
    let declared = Declared::new(admin.clone(), settings.clone());
    let reread = move || reread(&source, &log);
    serve::run(Arc::new(host), run, &cli.configfs, settings, reread, admin, declared, offer_to_targetcli)
        .map_err(|e| {
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

/// What is set by now, already logged by; nothing if that makes no sense.
fn reread(source: &settings::Source, log: &logging::Filter) -> Option<Settings> {
    let read = source.read().map_err(|e| e.in_one_line());
    let read = read.and_then(|new| log.set(&new.log).map(|()| new).map_err(|why| format!("log: {why}")));
    read.map_err(|why| tracing::error!("{why}; what is set stays as it is")).ok()
}

/// What targetcli finds on the system bus.
fn offer_to_targetcli() -> dbus::Service {
    dbus::Service::begin(dbus::Offer {
        subtype: SUBTYPE.to_owned(),
        description: config_check::DESCRIPTION.to_owned(),
        check: Arc::new(|text| match config_check::check(text, Path::new(SYSFS)) {
            Ok(_) => Ok(()),
            Err(refusal) => Err(refusal.in_one_line()),
        }),
        address: None,
    })
}

fn demo(json: bool) -> Done {
    let failed = |e| CliError::from("demo", "", &e);
    if json {
        return output::json(&crate::demo::run(&mut std::io::sink()).map_err(failed)?);
    }
    crate::demo::run(&mut std::io::stdout()).map_err(failed)?;
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
