//! What a page shows in its `console` blocks: commands after the prompt `# `, and what they say.

/// A command of a console block, and what is shown under it.
#[derive(Debug, PartialEq, Eq)]
pub struct Shown {
    /// The command, without the prompt.
    pub command: String,
    /// The lines under it, as they stand there.
    pub output: Vec<String>,
}

/// The commands of every block that is marked `console`, in order.
pub fn commands(page: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        match line.strip_prefix("# ") {
            _ if line.starts_with("```") => inside = line == "```console",
            Some(command) if inside => {
                all.push(Shown { command: command.to_owned(), output: Vec::new() });
            }
            None if inside => all.iter_mut().last().into_iter().for_each(|c| c.output.push(line.to_owned())),
            _ => (),
        }
    }
    all
}

/// Whether lines are alike: runs of space are one, any number stands for any other and any name for any other; a line
/// `...` stands for all the rest.
pub fn matches(shown: &[String], said: &str) -> bool {
    let said: Vec<String> = said.trim_end().lines().map(normal).collect();
    let wanted: Vec<String> = shown.iter().map(|line| normal(line)).collect();
    match wanted.iter().position(|line| line == "...") {
        Some(end) => said.len() >= end && said[..end] == wanted[..end],
        None => said == wanted,
    }
}

fn normal(line: &str) -> String {
    let words = line.split_whitespace().map(|word| match word.split_once("naa.") {
        // A world-wide name: 16 hexadecimal digits.
        Some((before, after)) if after.len() >= 16 => format!("{before}naa.N{}", &after[16..]),
        _ => word.to_owned(),
    });
    let mut out = String::new();
    for c in words.collect::<Vec<_>>().join(" ").chars() {
        match c {
            '0'..='9' if out.ends_with('N') => (),
            '0'..='9' => out.push('N'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_blocks_are_read_and_others_are_not() {
        let readme = "# Title\n```sh\n# no\n```\n```console\n# a b\nout 1\n\n# c\n```\n# Heading\n";
        let shown = commands(readme);
        assert_eq!(shown.iter().map(|s| s.command.as_str()).collect::<Vec<_>>(), ["a b", "c"]);
        assert_eq!(shown[0].output, ["out 1", ""]);
        assert_eq!(shown[1].output, [""; 0]);
    }

    #[test]
    fn numbers_and_names_may_differ_and_words_may_not() {
        let shown = ["loopback naa.5001405d134a0666: /dev/sda".to_owned()];
        assert!(matches(&shown, "loopback   naa.50014050000000ff: /dev/sda\n"));
        assert!(!matches(&shown, "vhost naa.50014050000000ff: /dev/sda"));
        assert!(matches(&["mismatches:  0".to_owned()], "mismatches: 12"));
        assert!(!matches(&["a".to_owned(), "b".to_owned()], "a"));
        assert!(matches(&["a".to_owned(), "...".to_owned()], "a\nb\nc"));
    }
}
