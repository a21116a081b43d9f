//! Man pages and shell completions, made of the same definitions that parse the command line: for those who package.

use std::{fs, process::ExitCode};

use clap::CommandFactory;
use clap_complete::Shell;

use super::{
    Done,
    args::{Cli, PackagingFiles},
    error::CliError,
};

/// Writes `man/*.1` and `completions/*` into a directory, and names it.
pub fn run(args: &PackagingFiles) -> Done {
    let written = || {
        let (man, completions) = (args.directory.join("man"), args.directory.join("completions"));
        fs::create_dir_all(&man)?;
        fs::create_dir_all(&completions)?;
        clap_mangen::generate_to(Cli::command(), &man)?;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut Cli::command(), "tcmu-dif", &completions)?;
        }
        Ok(())
    };
    written().map_err(|e: std::io::Error| {
        CliError::from("packaging-files", args.directory.display(), &e)
            .then("give a directory that can be written to")
    })?;
    Ok(ExitCode::SUCCESS)
}
