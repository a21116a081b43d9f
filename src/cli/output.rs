//! Printing: JSON, tables and lines, to stdout; a reader that goes away ends the program without a word.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use comfy_table::{ContentArrangement, Table, presets::NOTHING};
use serde::Serialize;

use super::{CliError, Done};

/// Prints to stdout, and ends the command well.
pub fn print(text: &str) -> Done {
    let mut out = io::stdout().lock();
    printed(writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()))
}

/// How a command ends that has printed, or could not.
pub fn printed(done: io::Result<()>) -> Done {
    match done {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(CliError::from("stdout", "", &e)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Prints a value as JSON.
pub fn json(value: &impl Serialize) -> Done {
    let text = serde_json::to_string_pretty(value).map_err(|e| CliError::from("json", "", &e))?;
    print(&text)
}

/// A table without lines, its cells kept apart by two blanks.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// `key: value` lines, the values in one column.
pub fn lines(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len() + 1).max().unwrap_or(0);
    let line = |(key, value): &(&str, String)| format!("{:<width$} {value}", format!("{key}:"));
    pairs.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_columns_and_no_trailing_blanks() {
        let text =
            table(&["NAME", "SIZE"], [vec!["vm1".into(), "1 GiB".into()], vec!["longer".into(), "2".into()]]);
        assert_eq!(text, "NAME    SIZE\nvm1     1 GiB\nlonger  2");
    }

    #[test]
    fn values_stand_in_one_column() {
        assert_eq!(lines(&[("a", "1".into()), ("bcd", "2".into())]), "a:   1\nbcd: 2");
    }
}
