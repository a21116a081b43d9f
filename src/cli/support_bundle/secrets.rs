//! What is left out of settings: values whose names speak of a secret, passwords in URLs, and keys.
//!
//! Line by line: a secret that goes on for several lines under a harmless name is not found. The help says to look at the bundle before it is sent.

/// What stands in a secret's place.
const LEFT_OUT: &str = "(left out)";

/// Words in a setting's name that make its value a secret.
const WORDS: [&str; 6] = ["password", "passwd", "secret", "token", "credential", "key"];

/// The text without them.
pub fn without(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_key = false;
    for line in text.lines() {
        if line.contains("-----BEGIN") {
            in_key = true;
            out.push_str(LEFT_OUT);
            out.push('\n');
        }
        if !in_key {
            out.push_str(&url(&value(line)));
            out.push('\n');
        }
        in_key &= !line.contains("-----END");
    }
    out
}

/// A line without what follows the `=` or `:` after such a word.
fn value(line: &str) -> String {
    // ASCII alone changes, so that places stay where they are.
    let lower = line.to_ascii_lowercase();
    let first = WORDS.iter().filter_map(|word| lower.find(word)).min();
    match first.and_then(|at| Some(at + lower[at..].find(['=', ':'])?)) {
        Some(at) => format!("{} {LEFT_OUT}", &line[..=at]),
        None => line.to_owned(),
    }
}

/// A line without what stands between `//` and `@` in URLs.
fn url(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let authority = after.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(after.len());
        rest = match after[..authority].rfind('@') {
            Some(user) => {
                out.push_str(LEFT_OUT);
                &after[user..]
            }
            None => after,
        };
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_secrets_are_left_out_and_the_rest_stays() {
        for (line, want) in [
            ("image = \"/images/vm1.raw\"", "image = \"/images/vm1.raw\""),
            ("password = \"hunter2\"", "password = (left out)"),
            ("chap_PassWd: hunter2", "chap_PassWd: (left out)"),
            ("Environment=API_TOKEN=hunter2", "Environment=API_TOKEN= (left out)"),
            ("{ name = \"a\", secret=\"hunter2\" }", "{ name = \"a\", secret= (left out)"),
            ("nbd://me:hunter2@host/x and http://b", "nbd://(left out)@host/x and http://b"),
            ("é password=hunter2", "é password= (left out)"),
            ("the key is elsewhere", "the key is elsewhere"),
        ] {
            assert_eq!(without(line), format!("{want}\n"), "{line}");
        }
        let pem = "a = 1\n-----BEGIN X-----\nhunter2\n-----END X-----\nb = 2\n";
        assert_eq!(without(pem), "a = 1\n(left out)\nb = 2\n");
    }
}
