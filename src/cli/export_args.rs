//! The words of `tcmu-dif export`.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use super::args::Json;
use crate::kernel::names::Name;

/// `export`.
#[derive(Debug, Args)]
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
    /// End the export
    #[arg(long)]
    pub end: bool,
    /// Even while clients use it
    #[arg(long, requires = "end")]
    pub force: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}
