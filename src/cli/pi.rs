//! tmp
use super::{CliError, Done, args::Pi};
use crate::{pi::PiType, units::BlockSize};
use std::path::Path;
pub fn run(_a: &Pi) -> Done {
    Err(CliError::new("pi", "", "not yet"))
}
pub fn protect(_i: &Path, _s: &Path, _p: PiType, _b: BlockSize, _r: bool) -> Result<(), CliError> {
    Ok(())
}
