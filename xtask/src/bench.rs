//! `cargo xtask bench [NAME…]`: the benches, one after another, each a table in the terminal, a JSON file and a picture under `target/bench/`; with
//! `--keep` the picture goes to `docs/performance/`.
//!
//! Nothing is judged: a bench says what it measured, and docs/performance.md what was to be reached. Build first, so that no compiler runs beside.

use crate::{plot, sh, vm};
use anyhow::{Context, Result, bail};
use std::fs;

/// Those that there are, in the order in which they run.
const BENCHES: &[&str] = &["guard", "ring", "image", "scale", "jobs", VM];

/// The one that is no program of cargo's, but a boot of the VM.
const VM: &str = "vm";

/// Runs those benches, or all; `keep` puts their pictures where the documentation has them. With `draw` none is run, and their last figures are drawn.
///
/// # Errors
/// A name that is none, a build that fails, a bench that fails, one that has never run and is to be drawn.
pub(crate) fn main(wanted: &[String], keep: bool, draw: bool, more: &[String]) -> Result<()> {
    if let Some(name) = wanted.iter().find(|name| !BENCHES.contains(&name.as_str())) {
        bail!("there is no bench {name}: choose of {}", BENCHES.join(", "));
    }
    let chosen: Vec<_> =
        BENCHES.iter().filter(|name| wanted.is_empty() || wanted.iter().any(|w| w == *name)).collect();
    let directory = sh::target_dir().join("bench");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    if !draw && chosen.iter().any(|name| **name != VM) {
        let built = sh::cargo().args(["bench", "--package=tcmu-dif", "--benches", "--no-run"]).status()?;
        if !built.success() {
            bail!("the benches do not build");
        }
    }
    for name in chosen {
        let file = directory.join(format!("{name}.json"));
        let pictures = if keep { sh::workspace_root().join("docs/performance") } else { directory.clone() };
        println!("\n== {name} ({})", file.display());
        match *name {
            _ if draw => {}
            VM => {
                let found = vm::bench(more).context("the bench vm failed")?;
                fs::write(&file, format!("{found:#}\n")).with_context(|| file.display().to_string())?;
            }
            name => {
                let mut command = sh::cargo();
                command.args(["bench", "--quiet", "--package=tcmu-dif", "--bench", name, "--", "--json"]);
                let status = command.arg(&file).args(more).status()?;
                if !status.success() {
                    bail!("the bench {name} failed: {status}");
                }
            }
        }
        let found =
            serde_json::from_str(&fs::read_to_string(&file)?).with_context(|| file.display().to_string())?;
        let picture = pictures.join(format!("{name}.svg"));
        if plot::draw(name, &found, &picture)? {
            println!("{}", picture.display());
        }
    }
    Ok(())
}
