//! The words of `tcmu-dif handover` and `receive`.

use clap::Args;

use super::args::Json;
use crate::{admin::handover::Address, kernel::names::Name};

/// `handover`.
#[derive(Debug, Args)]
pub struct Handover {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// Where the other host's tcmu-dif receive listens: unix:/PATH, which a tunnel leads there (ssh -L)
    #[arg(long, value_name = "ADDRESS")]
    pub to: Address,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `receive`.
#[derive(Debug, Args)]
pub struct Receive {
    /// Where to listen: unix:/PATH, to which a tunnel leads from the other host (ssh -L there)
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Address,
    /// Receive one LUN under this name, which it does not have elsewhere; its exports get names of their own
    #[arg(long, value_name = "NAME", value_parser = Name::new, requires = "once")]
    pub name: Option<Name>,
    /// End after the first one, or its failure
    #[arg(long)]
    pub once: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}
