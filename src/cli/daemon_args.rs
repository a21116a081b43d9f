//! The words of `tcmu-dif daemon`; [`super::settings`] has them in a file.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};

/// `daemon`.
#[derive(Debug, Args)]
pub struct Daemon {
    /// The file with what is set and not given here, in the words of these options: io = "threads"; unless it is named it need not be there [default: /etc/tcmu-dif/tcmu-dif.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Only check what is set, say what counts, and end
    #[arg(long)]
    pub check: bool,
    /// With --check: print JSON
    #[arg(long, requires = "check")]
    pub json: bool,
    /// The way of I/O [default: auto]
    #[arg(long, value_enum)]
    pub io: Option<IoWay>,
    /// Let LUNs look at their rings for a moment before they sleep, whatever the file says; without a word in either they do
    #[arg(long, overrides_with = "no_polling")]
    pub polling: bool,
    /// Let LUNs sleep as soon as their rings are empty: less CPU, and a wake-up more for most commands
    #[arg(long)]
    pub no_polling: bool,
    /// The directory of the LUNs to make at the start: NAME.toml, in the words of create [default: /etc/tcmu-dif/luns.d]
    #[arg(long, value_name = "DIR")]
    pub luns_d: Option<PathBuf>,
    /// Serve metrics over HTTP at this address of the loopback interface too, besides the socket in the run directory
    #[arg(long, value_name = "ADDR:PORT", value_parser = super::listen::loopback)]
    pub metrics_listen: Option<SocketAddr>,
    /// Memory for a qcow2 image's tables, those of its backing files included, for LUNs without a --cache-size of their own [default: 36M]
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    pub cache_size: Option<u64>,
}

/// The ways of I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IoWay {
    /// The best that the kernel permits
    Auto,
    /// io_uring
    Uring,
    /// A pool of threads
    Threads,
}
