//! The words of `tcmu-dif handover` and `receive`.

use std::path::PathBuf;

use clap::Args;

use super::args::Json;
use crate::{admin::way::Address, image::Format, kernel::names::Name};

/// `handover`.
#[derive(Debug, Args)]
pub struct Handover {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// Where the other host's tcmu-dif receive listens: tls://HOST:PORT; or unix:/PATH, which a tunnel leads there (ssh -L)
    #[arg(long, value_name = "ADDRESS", required_unless_present = "go_on")]
    pub to: Option<Address>,
    /// With tls://: the directory of ca-cert.pem, client-cert.pem and client-key.pem
    #[arg(long, value_name = "DIR")]
    pub tls_certificates: Option<PathBuf>,
    /// With tls://: the name in the other host's certificate, if it is not HOST
    #[arg(long, value_name = "NAME")]
    pub tls_hostname: Option<String>,
    /// Copy its image there first, while it is in use: for hosts without storage in common. The other host says where (receive --image)
    #[arg(long)]
    pub copy_storage_all: bool,
    /// When all is copied, serve on until another `handover NAME --continue`, each write going to both sides: for a guest that goes along and is to be stopped there
    #[arg(long, requires = "copy_storage_all")]
    pub pause_before_switchover: bool,
    /// Have a handover that pauses before the switchover go on; the other `handover` says what came of it
    #[arg(long = "continue", conflicts_with_all = ["to", "tls_certificates", "tls_hostname", "copy_storage_all", "pause_before_switchover"])]
    pub go_on: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `receive`.
#[derive(Debug, Args)]
pub struct Receive {
    /// Where to listen: tls://ADDRESS:PORT; or unix:/PATH, to which a tunnel leads from the other host (ssh -L there)
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Address,
    /// With tls://: the directory of ca-cert.pem, server-cert.pem and server-key.pem. Whoever has a certificate of that CA may have LUNs made here
    #[arg(long, value_name = "DIR")]
    pub tls_certificates: Option<PathBuf>,
    /// Receive one LUN under this name, which it does not have elsewhere; its exports get names of their own
    #[arg(long, value_name = "NAME", value_parser = Name::new, requires = "once")]
    pub name: Option<Name>,
    /// Where the image of a LUN is made that comes with --copy-storage-all: a path, or a directory in which it is called as it is there. Without it such LUNs are refused; nothing is overwritten
    #[arg(long, value_name = "PATH")]
    pub image: Option<PathBuf>,
    /// The new image's format: raw or qcow2, if not the one that it has there
    #[arg(long, requires = "image")]
    pub format: Option<Format>,
    /// End after the first one, or its failure
    #[arg(long)]
    pub once: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}
