//! Man pages and shell completions, made of the same definitions that parse the command line: for those who package.

use std::{fs, process::ExitCode};

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::{
    Done,
    args::{Cli, PackagingFiles},
    error::CliError,
};

const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// The definitions without what is hidden: generators of completions leave nothing out by themselves.
fn visible(command: &Command) -> Command {
    // clap keeps names for as long as the program runs, and this one is about to end.
    let name: &'static str = Box::leak(command.get_name().to_owned().into_boxed_str());
    let about = command.get_about().cloned().unwrap_or_default();
    Command::new(name)
        .about(about)
        .disable_help_subcommand(true)
        .disable_version_flag(command.get_version().is_none())
        .version(env!("CARGO_PKG_VERSION"))
        .args(command.get_arguments().filter(|a| !a.is_hide_set()).cloned())
        .subcommands(command.get_subcommands().filter(|c| !c.is_hide_set()).map(visible))
}

/// Writes `man/*.1` and `completions/*` into a directory, and names it.
pub fn run(args: &PackagingFiles) -> Done {
    let written = || {
        let (man, completions) = (args.directory.join("man"), args.directory.join("completions"));
        fs::create_dir_all(&man)?;
        fs::create_dir_all(&completions)?;
        clap_mangen::generate_to(Cli::command(), &man)?;
        for shell in SHELLS {
            clap_complete::generate_to(shell, &mut visible(&Cli::command()), "tcmu-dif", &completions)?;
        }
        Ok(())
    };
    written().map_err(|e: std::io::Error| {
        CliError::from("packaging-files", args.directory.display(), &e)
            .then("give a directory that can be written to")
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of commands and long options, those that are hidden or the others.
    fn names(command: &Command, hidden: bool, found: &mut Vec<String>) {
        let options = command.get_arguments().filter(|a| a.is_hide_set() == hidden);
        found.extend(options.filter_map(|a| a.get_long()).map(str::to_owned));
        for inner in command.get_subcommands().filter(|c| !c.is_hide_set() || hidden) {
            if inner.is_hide_set() == hidden {
                found.push(inner.get_name().to_owned());
            }
            if !inner.is_hide_set() {
                names(inner, hidden, found);
            }
        }
    }

    /// What a completion offers: the words of its code, without the descriptions of the commands and options.
    fn offered(shell: Shell, text: &str) -> Vec<String> {
        let code: Vec<&str> = match shell {
            Shell::Zsh => text.lines().map(|l| l.split(['[', ':']).next().unwrap_or(l)).collect(),
            Shell::Fish => text.lines().map(|l| l.split(" -d ").next().unwrap_or(l)).collect(),
            _ => text.lines().collect(),
        };
        let words =
            code.iter().flat_map(|l| l.split(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_'));
        words.map(|w| w.trim_start_matches('-').to_owned()).collect()
    }

    #[test]
    fn completions_offer_everything_but_what_is_hidden() {
        let (mut hidden, mut shown) = (Vec::new(), Vec::new());
        names(&Cli::command(), true, &mut hidden);
        names(&Cli::command(), false, &mut shown);
        for name in ["peer-vhost", "packaging-files", "release", "run-dir", "state-dir", "configfs"] {
            assert!(hidden.iter().any(|h| h == name), "{name}");
        }
        assert!(shown.len() > 80, "{shown:?}");
        for shell in SHELLS {
            let generate = |mut command: Command| {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut command, "tcmu-dif", &mut text);
                offered(shell, &String::from_utf8(text).unwrap())
            };
            let (all, offered) = (generate(Cli::command()), generate(visible(&Cli::command())));
            for name in &hidden {
                assert!(all.contains(name), "{shell}: the test would not find {name}");
                assert!(!offered.contains(name), "{shell} offers {name}");
            }
            for name in &shown {
                assert!(offered.contains(name), "{shell} does not offer {name}");
            }
        }
    }
}
