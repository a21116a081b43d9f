//! The words of the command line, parsed and checked as far as they can be without touching anything.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::{
    daemon_args::Daemon,
    handover_args,
    image_args::{ImageCheck, ImageMap, ImageMeasure, ImageOwner, ImageRepair, ImageResize, ImageSnapshot},
    job_args, standby,
};
use crate::{
    admin::{
        Admin,
        luns::Places,
        order::{self, ExportOrder},
    },
    daemon::rundir::RUN_DIR,
    image::{Format, direct::CacheMode},
    kernel::{
        CONFIGFS,
        names::{Name, Wwn},
    },
    lun::{cpus::Cpus, state_file::STATE_DIR, throttle::limits::Limits},
    pi::{Exposure, PiMode, PiType, Transfer},
    units::BlockSize,
};

/// Exports raw and qcow2 images as SCSI disks through Linux's target_core_user, with T10 protection information for every block.
#[derive(Debug, Parser)]
#[command(name = "tcmu-dif", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What to log, as in RUST_LOG: error, warn, info, debug, or tcmu_dif::ring=debug
    #[arg(long, global = true, value_name = "FILTER", env = "TCMU_DIF_LOG", hide_env_values = true, value_parser = super::logging::words)]
    pub log: Option<String>,
    /// The directory of the daemon's lock and state files
    #[arg(long, global = true, hide = true, default_value = RUN_DIR)]
    pub run_dir: PathBuf,
    /// The directory of what has to be there after a reboot
    #[arg(long, global = true, hide = true, default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Where configfs is mounted
    #[arg(long, global = true, hide = true, default_value = CONFIGFS)]
    pub configfs: PathBuf,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the kernel's LUNs, in the foreground, until SIGTERM
    Daemon(Daemon),
    /// Make a LUN from an image, and export it
    Create(Box<Create>),
    /// Take a LUN and its exports down; the image stays
    Delete(Delete),
    /// List the LUNs
    List(Json),
    /// Show one LUN: image, exports, counters
    Show(Show),
    /// Change a LUN's size while it is in use
    Resize(Resize),
    /// Show a LUN's limits and what they have cost, or change them while it is in use
    ///
    /// Given limits replace all that there were. They hold at once, also for commands that wait, and outlive a restart of the daemon,
    /// until the LUN is deleted.
    Throttle(Throttle),
    /// Let programs of this host, or with TLS of others, read a LUN over NBD while it is in use, or end that
    Export(super::export_args::Export),
    /// Make images and look at them
    #[command(subcommand)]
    Image(Image),
    /// Check, make anew or look at an image's protection information
    #[command(subcommand)]
    Pi(Pi),
    /// Read every protected block of a LUN that is in use and check it; goes on in the daemon if this command is interrupted
    Scrub(job_args::Scrub),
    /// Copy a LUN to another image while it is in use, and have it go over to that
    Mirror(job_args::Mirror),
    /// Copy a LUN as it is at this moment to another image while it is in use
    Backup(job_args::Backup),
    /// Mark what is written to a LUN in dirty bitmaps, for incremental backups
    #[command(subcommand)]
    Bitmap(job_args::Bitmap),
    /// Put a new image over a LUN's while it is in use: what is written from then on goes there
    Snapshot(job_args::Snapshot),
    /// Bring the images beneath a LUN's into it while it is in use
    Stream(job_args::Stream),
    /// Bring what was written to a LUN's image to one beneath it while it is in use, and have the LUN go over to that
    Commit(job_args::Commit),
    /// List the jobs of the daemon, and lead them
    #[command(subcommand)]
    Job(job_args::Job),
    /// Hand a LUN over to another host that has the same storage, while it is in use; it serves here until it serves there
    Handover(handover_args::Handover),
    /// Wait for LUNs that other hosts hand over, and serve them here
    Receive(handover_args::Receive),
    /// Wait until the host that has LUNs on the same storage is gone, and serve them here then
    Standby(standby::Standby),
    /// Watch the LUNs on the terminal: operations and bytes a second, commands in flight, protection errors, jobs
    Top(Top),
    /// Show a LUN's commands as they pass, until interrupted
    Trace(Trace),
    /// Say what this host can do, and how to get what is missing
    CheckHost(CheckHost),
    /// Collect what a report of a fault needs into a file, without any of the disks' data
    ///
    /// In it are: this program's version; the kernel's release, its modules and their parameters; the kernel's objects of our
    /// LUNs in configfs with their attributes; the daemon's state files under /run/tcmu-dif, and of other files there the names and
    /// sizes alone; tcmu-dif list and check-host; the daemon's answers to query-version, query-luns, query-block,
    /// query-blockstats, query-pi and query-jobs; the last 2000 lines of the service's log; its unit; and /etc/tcmu-dif.
    ///
    /// No block of a disk is in it, but the paths of images, names of hosts, serial numbers and WWNs are, and of blocks
    /// that fail protection the address and the tuple's values. Values of settings whose names speak of a password, secret,
    /// token, credential or key are left out; look through it before you give it away. What cannot be had is noted in contents.txt.
    SupportBundle(SupportBundle),
    /// Judge a SCSI disk with protection information by SBC-4, clause by clause; overwrites it
    Conformance(Conformance),
    /// Show everything on an embedded fake kernel: no root, no kernel module
    Demo(Json),
    /// Read and write through a vhost target, as a guest would, and compare
    #[command(hide = true)]
    PeerVhost(PeerVhost),
    /// Take down every LUN that nobody uses, before the host goes down
    #[command(hide = true)]
    Release(Release),
    /// Write man pages and shell completions
    #[command(hide = true)]
    PackagingFiles(PackagingFiles),
}

/// `--json`.
#[derive(Debug, Clone, Copy, Args)]
pub struct Json {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `top`.
#[derive(Debug, Args)]
pub struct Top {
    /// Print one sample, taken over a second, and end; needs no terminal
    #[arg(long)]
    pub once: bool,
    /// Print that sample as JSON
    #[arg(long)]
    pub json: bool,
}

/// `support-bundle`.
#[derive(Debug, Args)]
pub struct SupportBundle {
    /// The new file; tcmu-dif-support-SECONDS.tar.gz in the current directory if not given
    #[arg(long, value_name = "FILE.tar.gz")]
    pub output: Option<PathBuf>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `throttle`.
#[derive(Debug, Args)]
pub struct Throttle {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// The limits from now on, in the words of create --throttle: iops=500,bps=100M; off for none
    #[arg(value_parser = order::limits)]
    pub limits: Option<Limits>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `trace`.
#[derive(Debug, Args)]
pub struct Trace {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// End after that many commands
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `create`.
#[derive(Debug, Args)]
pub struct Create {
    /// The LUN's name: letters, digits, and . _ : + -
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// The image: a raw or qcow2 file, a block device, or an NBD export by its URI
    #[arg(long, value_name = "PATH")]
    pub image: PathBuf,
    /// Make the image first, with that size (bytes, or with K, M, G, T)
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    pub size: Option<u64>,
    /// The image's format, rather than what its first bytes say; for --size, raw or qcow2
    #[arg(long, value_name = "FORMAT", value_parser = order::format)]
    pub format: Option<Format>,
    /// Bytes of a block: 512 or 4096
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = order::block_size)]
    pub block_size: BlockSize,
    /// Protection information for every block: off, type1, type2 or type3
    #[arg(long, value_name = "TYPE", default_value = "off", value_parser = pi)]
    pub pi: PiSetting,
    /// How it stays true across a crash: bitmap (what was being written is read again and trusted) or journal (nothing is, and a torn block is an error; slower); as the sidecar has it, if there is one
    #[arg(long, value_name = "MODE", value_parser = order::pi_mode)]
    pub pi_mode: Option<PiMode>,
    /// Who reads and writes it: target (guests see a plain disk) or initiator (guests send and get their own)
    #[arg(long, value_name = "WHO", default_value = "target")]
    pub exposure: Exposure,
    /// How guests' protection information travels: separate (needs a kernel that passes it on), or interleaved with the data (for programs that build SCSI commands themselves)
    #[arg(long, value_name = "HOW", default_value = "separate")]
    pub pi_transfer: Transfer,
    /// Where the protection information is kept, instead of IMAGE.pi
    #[arg(long, value_name = "PATH")]
    pub sidecar: Option<PathBuf>,
    /// What lies between the image and its storage: writeback (the host's page cache) or none (O_DIRECT, for transfers that are aligned)
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    pub cache: CacheMode,
    /// The processors that the LUN's thread runs on, as 2-3 or 0,4; any, if none are given
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<Cpus>,
    /// Memory for a qcow2 image's tables, those of its backing files included; 36M is enough for 256 GiB in use
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    pub cache_size: Option<u64>,
    /// Whoever uses one LUN of a group may have the daemon copy blocks between all of them (EXTENDED COPY); without a group within this LUN alone
    #[arg(long, value_name = "GROUP", value_parser = order::copy_group)]
    pub copy_group: Option<String>,
    /// Limit the LUN's commands, in QEMU's words: iops=500,bps=100M, or iops_rd, iops_wr, bps_rd, bps_wr; each with _max (during a burst) and _max_length (its seconds); iops_size
    #[arg(long, value_name = "LIMITS", default_value = "off", value_parser = order::limits)]
    pub throttle: Limits,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// The disk's serial number; a random one if not given
    #[arg(long, value_name = "SERIAL", value_parser = order::serial)]
    pub serial: Option<String>,
    /// Where to export it: loopback, vhost, or with a world wide name, as in vhost:naa.5001405aa1b2c3d4; may be given several times
    #[arg(long, value_name = "FABRIC[:WWN]", value_parser = ExportOrder::from_str)]
    pub export: Vec<ExportOrder>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `--pi`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PiSetting(pub Option<PiType>);

/// `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// Even while it is in use
    #[arg(long)]
    pub force: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `show`.
#[derive(Debug, Args)]
pub struct Show {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// Print libvirt's XML for its vhost exports
    #[arg(long, conflicts_with_all = ["qemu", "json"])]
    pub libvirt: bool,
    /// Print QEMU's arguments for its vhost exports
    #[arg(long, conflicts_with = "json")]
    pub qemu: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `resize`.
#[derive(Debug, Args)]
pub struct Resize {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// The new size (bytes, or with K, M, G, T)
    #[arg(value_parser = super::size::parse)]
    pub size: u64,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `image`.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Make an image, in qemu-img's words
    Create(ImageCreate),
    /// Describe an image, in qemu-img's words
    Info(ImageInfo),
    /// Check a qcow2 image that is not in use; exit status 0: clean, 2: errors, 3: leaks, 63: not a format that can be checked
    Check(ImageCheck),
    /// Mend all of a qcow2 image that can be mended: the same as check -r all
    Repair(ImageRepair),
    /// Show where each range of the disk lies in which file
    Map(ImageMap),
    /// Say how large the file of a new image will be
    Measure(ImageMeasure),
    /// Make, go back to, delete or list the snapshots in a qcow2 image, in qemu-img's words
    Snapshot(ImageSnapshot),
    /// Change the size of an image that nobody uses, in qemu-img's words
    Resize(ImageResize),
    /// Say whose an image on shared storage is, begin to keep that, or take it from a host that is gone
    Owner(ImageOwner),
}

/// `image create`.
#[derive(Debug, Args)]
pub struct ImageCreate {
    /// The format: raw or qcow2
    #[arg(short, long, value_name = "FORMAT", default_value = "raw", value_parser = order::format)]
    pub format: Format,
    /// Options: cluster_size=65536, refcount_bits=16, compat=1.1, preallocation=off|metadata; separated by commas
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// The backing file, as the new image will name it
    #[arg(short, long, value_name = "FILE", requires = "backing_format")]
    pub backing: Option<String>,
    /// The backing file's format
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = order::format)]
    pub backing_format: Option<Format>,
    /// The new image
    pub path: PathBuf,
    /// Its size (bytes, or with K, M, G, T); the backing file's if there is one
    #[arg(value_parser = super::size::parse, required_unless_present = "backing")]
    pub size: Option<u64>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `image info`.
#[derive(Debug, Args)]
pub struct ImageInfo {
    /// How to print it
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
    /// The same as --output json
    #[arg(long)]
    pub json: bool,
    /// The image
    pub path: PathBuf,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Human,
    /// For programs
    Json,
}

/// `pi`.
#[derive(Debug, Subcommand)]
pub enum Pi {
    /// Compare every block with its protection information; changes nothing
    Verify(PiImage),
    /// Make the protection information anew from the blocks as they are
    Rebuild(PiRebuild),
    /// After a change by something else, take the blocks as they are, and name those that differ
    Adopt(PiImage),
    /// Say what the sidecar says
    Status(PiImage),
}

/// `pi verify`, `pi adopt` and `pi status`.
#[derive(Debug, Args)]
pub struct PiImage {
    /// The image
    pub image: PathBuf,
    /// Where the protection information is kept, instead of IMAGE.pi
    #[arg(long, value_name = "PATH")]
    pub sidecar: Option<PathBuf>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `pi rebuild`.
#[derive(Debug, Args)]
pub struct PiRebuild {
    /// The image
    pub image: PathBuf,
    /// The type of protection: type1, type2 or type3; as the sidecar has it, if there is one
    #[arg(long, value_name = "TYPE", value_parser = order::pi_type)]
    pub pi: Option<PiType>,
    /// How it stays true across a crash: bitmap or journal; as the sidecar has it, if there is one
    #[arg(long, value_name = "MODE", value_parser = order::pi_mode)]
    pub mode: Option<PiMode>,
    /// Bytes of a block: 512 or 4096; as the sidecar has it, if there is one
    #[arg(long, value_name = "BYTES", value_parser = order::block_size)]
    pub block_size: Option<BlockSize>,
    /// Where the protection information is kept, instead of IMAGE.pi
    #[arg(long, value_name = "PATH")]
    pub sidecar: Option<PathBuf>,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `check-host`.
#[derive(Debug, Args)]
pub struct CheckHost {
    /// The directory of images, for the file system's locks
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub images: PathBuf,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `conformance`.
#[derive(Debug, Args)]
pub struct Conformance {
    /// The disk: /dev/sgN, or vhost:WWN for a vhost-scsi target
    #[arg(value_name = "DISK")]
    pub device: String,
    /// Agree that what the disk holds is overwritten
    #[arg(long)]
    pub destroy_data: bool,
    /// Send the same random commands to this disk too, and compare (both are overwritten)
    #[arg(long, value_name = "DISK")]
    pub against: Option<String>,
    /// How many random commands
    #[arg(long, default_value_t = 20_000, requires = "against")]
    pub commands: u32,
    /// What the random numbers begin with
    #[arg(long, default_value_t = 1, requires = "against")]
    pub seed: u64,
    #[command(flatten)]
    pub json: Json,
}

/// `release`.
#[derive(Debug, Args)]
pub struct Release {
    /// On a terminal: really
    #[arg(long)]
    pub yes: bool,
}

/// `packaging-files`.
#[derive(Debug, Args)]
pub struct PackagingFiles {
    /// Where to
    pub directory: PathBuf,
}

/// `peer-vhost`.
#[derive(Debug, Args)]
pub struct PeerVhost {
    /// The target
    #[arg(value_parser = Wwn::new)]
    pub wwn: Wwn,
    /// Random writes
    #[arg(long, default_value_t = 2000)]
    pub writes: u32,
    /// Commands in flight
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// How much of the LUN is written to, from its start
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = super::size::parse)]
    pub region: u64,
    /// What the random numbers begin with
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Milliseconds for which reads are counted
    #[arg(long, default_value_t = 1000)]
    pub measure_ms: u64,
}

fn pi(text: &str) -> Result<PiSetting, String> {
    order::pi(text).map(PiSetting)
}

impl Cli {
    /// Where the commands look.
    pub fn places(&self) -> Places {
        Places::at(&self.configfs, &self.run_dir, &self.state_dir)
    }

    /// Who does what changes LUNs.
    pub fn admin(&self) -> Admin {
        Admin { places: self.places(), protect: super::pi::protect }
    }
}

/// Parses the command line.
///
/// # Errors
/// clap's: help and version too.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_commands_of_the_documentation_of_handovers_are_commands() {
        let text = include_str!("../../docs/handover.md");
        let mut seen = 0;
        for line in text.lines().filter_map(|line| line.trim().strip_prefix("# tcmu-dif ")) {
            let words = line.split('#').next().unwrap_or_default();
            if words.contains('…') {
                continue;
            }
            let words = ["tcmu-dif"].into_iter().chain(words.split_whitespace()).map(OsString::from);
            parse(words).unwrap_or_else(|e| panic!("{line}: {e}"));
            seen += 1;
        }
        assert!(seen >= 8, "{seen}");
    }

    /// Leaf commands without `--json`, hidden ones too, and why.
    const WITHOUT_JSON: [(&str, &str); 3] = [
        ("packaging-files", "prints nothing: it writes files"),
        ("peer-vhost", "prints JSON always"),
        ("release", "prints nothing: what stays is logged"),
    ];

    #[test]
    fn every_command_that_prints_something_can_print_json() {
        fn without(command: &clap::Command, before: &str, found: &mut Vec<String>) {
            let json = |a: &clap::Arg| a.get_long() == Some("json");
            for inner in command.get_subcommands() {
                let name = format!("{before}{}", inner.get_name());
                if inner.has_subcommands() {
                    without(inner, &format!("{name} "), found);
                } else if !inner.get_arguments().any(json) {
                    found.push(name);
                }
            }
        }
        let mut found = Vec::new();
        without(&Cli::command(), "", &mut found);
        found.sort();
        assert_eq!(found, WITHOUT_JSON.map(|(name, _)| name));
    }
}
