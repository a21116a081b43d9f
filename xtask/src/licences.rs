//! Whether everything that the workspace is built and tested with comes from a registry, under licences that we take: those of `deny.toml`. `cargo deny`
//! does the same and more where it is installed; this needs nothing but cargo, and always runs.

use crate::metadata::{Metadata, Package};
use crate::{sbom, sh};
use anyhow::{Context, Result, bail};
use std::fs;

/// Looks at every crate; says how many there are.
pub fn check() -> Result<usize> {
    let allowed = allowed(&fs::read_to_string(sh::workspace_root().join("deny.toml")).context("deny.toml")?)?;
    let metadata = Metadata::of_workspace()?;
    let built = metadata.built();
    let wrong: Vec<String> = built.iter().filter_map(|p| fault(p, &allowed)).collect();
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    Ok(built.len())
}

/// The licences that `deny.toml` allows.
fn allowed(deny: &str) -> Result<Vec<String>> {
    let deny: toml::Value = toml::from_str(deny).context("deny.toml")?;
    let list = deny.get("licenses").and_then(|l| l.get("allow")).and_then(toml::Value::as_array);
    let list = list.context("deny.toml has no [licenses] allow")?;
    Ok(list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect())
}

/// What is wrong with a crate.
fn fault(package: &Package, allowed: &[String]) -> Option<String> {
    let who = format!("{} {}", package.name, package.version);
    if let Some(source) = package.source.as_deref().filter(|s| !s.starts_with("registry+")) {
        return Some(format!("{who} comes from {source}, and not from a registry"));
    }
    let Some(licence) = &package.license else { return Some(format!("{who} names no licence")) };
    match may_be_taken(&sbom::spdx(licence), allowed) {
        Some(true) => None,
        Some(false) => Some(format!("{who}: its licence is not in deny.toml's list: {licence}")),
        None => Some(format!("{who}: its licence cannot be read: {licence}")),
    }
}

/// Whether an SPDX expression can be kept by licences of the list; nothing if it is none.
fn may_be_taken(expression: &str, allowed: &[String]) -> Option<bool> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let (taken, rest) = any(&words, allowed)?;
    rest.is_empty().then_some(taken)
}

type Parsed<'a> = Option<(bool, &'a [&'a str])>;

/// Parts joined by OR.
fn any<'a>(words: &'a [&'a str], allowed: &[String]) -> Parsed<'a> {
    let (mut taken, mut rest) = every(words, allowed)?;
    while let ["OR", more @ ..] = rest {
        let (next, after) = every(more, allowed)?;
        (taken, rest) = (taken || next, after);
    }
    Some((taken, rest))
}

/// Parts joined by AND, which binds closer.
fn every<'a>(words: &'a [&'a str], allowed: &[String]) -> Parsed<'a> {
    let (mut taken, mut rest) = single(words, allowed)?;
    while let ["AND", more @ ..] = rest {
        let (next, after) = single(more, allowed)?;
        (taken, rest) = (taken && next, after);
    }
    Some((taken, rest))
}

/// A licence, perhaps with an exception, or an expression in parentheses.
fn single<'a>(words: &'a [&'a str], allowed: &[String]) -> Parsed<'a> {
    let is = |name: &str| allowed.iter().any(|a| a == name);
    match words {
        ["(", inner @ ..] => match any(inner, allowed)? {
            (taken, [")", rest @ ..]) => Some((taken, rest)),
            _ => None,
        },
        ["AND" | "OR" | "WITH" | ")", ..] | [] => None,
        [name, "WITH", exception, rest @ ..] => Some((is(&format!("{name} WITH {exception}")), rest)),
        [name, rest @ ..] => Some((is(name), rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_is_kept_by_the_licences_of_the_list_or_it_is_not() {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"].map(str::to_owned);
        for (expression, want) in [
            ("MIT", Some(true)),
            ("GPL-3.0-only", Some(false)),
            ("GPL-3.0-only OR MIT", Some(true)),
            ("GPL-3.0-only AND MIT", Some(false)),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", Some(true)),
            ("(MIT OR Apache-2.0) AND GPL-3.0-only", Some(false)),
            ("MIT OR Apache-2.0 AND GPL-3.0-only", Some(true)),
            ("Apache-2.0 WITH LLVM-exception", Some(false)),
            ("Apache-2.0 WITH LLVM-exception OR MIT", Some(true)),
            ("", None),
            ("MIT OR", None),
            ("(MIT", None),
            ("MIT)", None),
            ("MIT Apache-2.0", None),
        ] {
            assert_eq!(may_be_taken(expression, &allowed), want, "{expression}");
        }
    }

    #[test]
    fn a_crate_from_elsewhere_or_without_a_licence_is_a_fault() {
        let package = |source: Option<&str>, license: Option<&str>| Package {
            id: "x".to_owned(),
            name: "x".to_owned(),
            version: "1.0.0".to_owned(),
            license: license.map(str::to_owned),
            source: source.map(str::to_owned),
            manifest_path: "Cargo.toml".into(),
            repository: None,
        };
        let allowed = ["MIT".to_owned()];
        let fault = |source, license| fault(&package(source, license), &allowed);
        assert_eq!(fault(None, Some("MIT")), None);
        assert_eq!(fault(Some("registry+x"), Some("MIT")), None);
        assert!(fault(Some("git+x"), Some("MIT")).unwrap().contains("git+x"));
        assert!(fault(Some("registry+x"), None).unwrap().contains("names no licence"));
        assert!(fault(Some("registry+x"), Some("GPL-2.0")).unwrap().contains("GPL-2.0"));
    }

    #[test]
    fn every_crate_of_the_workspace_is_taken() {
        assert!(check().unwrap() > 50);
    }
}
