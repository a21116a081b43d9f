//! The words of `tcmu-dif export`.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use super::args::Json;
use crate::kernel::names::Name;

/// `export`.
#[derive(Debug, Args)]
#[command(
    after_help = "With --point-in-time clients read the LUN as it was when this command ran, while it goes on: what is about to be changed is \
                  copied to the scratch file before. If that fails, the LUN goes on and reads of the export fail. --end removes the scratch \
                  file. A dirty bitmap that was named is to clients what it was then; the LUN's own has afterwards what was written since, if \
                  --end says --copied, and otherwise that and what it had."
)]
pub struct Export {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// Where the daemon's NBD server listens, if it does not yet; nbd.sock in the daemon's directory if not given
    #[arg(long, value_name = "PATH", conflicts_with = "end")]
    pub socket: Option<PathBuf>,
    /// Where it listens instead: an address of this host and a port. Without certificates a loopback address
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["end", "socket"])]
    pub listen: Option<SocketAddr>,
    /// Serve clients with TLS alone, that show a certificate: the directory of ca-cert.pem, server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIR", conflicts_with = "end")]
    pub tls_certificates: Option<PathBuf>,
    /// The name that clients ask for; the LUN's if not given
    #[arg(long = "as", value_name = "NAME", conflicts_with = "end")]
    pub export_name: Option<String>,
    /// Clients may write, beside whoever else uses the LUN
    #[arg(long, conflicts_with = "end")]
    pub writable: bool,
    /// Export the LUN as it is at this moment, and not as it changes
    #[arg(long, conflicts_with_all = ["end", "writable"])]
    pub point_in_time: bool,
    /// Where what is overwritten meanwhile is kept: a new qcow2 file [default: beside the image]
    #[arg(long, value_name = "PATH", requires = "point_in_time")]
    pub scratch: Option<PathBuf>,
    /// A dirty bitmap that clients can ask for, as qemu:dirty-bitmap:NAME; may be given several times, with --point-in-time once. Without
    /// that, and without --writable, it has to be disabled
    #[arg(long, value_name = "NAME", conflicts_with = "end")]
    pub bitmap: Vec<String>,
    /// End the export
    #[arg(long)]
    pub end: bool,
    /// All that was wanted of the point in time has been copied
    #[arg(long, requires = "end")]
    pub copied: bool,
    /// Even while clients use it
    #[arg(long, requires = "end")]
    pub force: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}
