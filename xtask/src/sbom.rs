//! `cargo xtask sbom`: what the program is made of, for those who have to know: an SBOM (CycloneDX 1.5, JSON) and the licences of
//! everything in it with their texts. Both come from `cargo metadata` and `Cargo.lock`, and are the same for the same lock file.

use crate::metadata::{Metadata, Package};
use crate::sh;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The names of both files.
pub const SBOM: &str = "tcmu-dif.cdx.json";
pub const LICENCES: &str = "third-party-licences.txt";

/// Writes both into a directory.
pub fn main(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let metadata = Metadata::of_workspace()?;
    let parts = metadata.made_of(metadata.member("tcmu-dif")?);
    let lock = fs::read_to_string(sh::workspace_root().join("Cargo.lock")).context("Cargo.lock")?;
    let checksums = checksums(&lock)?;
    let bill = serde_json::to_string_pretty(&bill(&parts, &checksums)?)?;
    for (name, text) in [(SBOM, bill + "\n"), (LICENCES, licences(&parts)?)] {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// The SHA-256 of every crate from a registry, by name and version.
fn checksums(lock: &str) -> Result<BTreeMap<(String, String), String>> {
    let lock: toml::Value = toml::from_str(lock).context("Cargo.lock")?;
    let packages =
        lock.get("package").and_then(toml::Value::as_array).context("Cargo.lock has no packages")?;
    let of = |p: &toml::Value| {
        let text = |key| Some(p.get(key)?.as_str()?.to_owned());
        Some(((text("name")?, text("version")?), text("checksum")?))
    };
    Ok(packages.iter().filter_map(of).collect())
}

/// The name by which a component is known everywhere.
fn purl(package: &Package) -> String {
    format!("pkg:cargo/{}@{}", package.name, package.version)
}

/// Cargo's older way of writing a choice, in SPDX's words.
pub fn spdx(licence: &str) -> String {
    licence.split('/').map(str::trim).collect::<Vec<_>>().join(" OR ")
}

fn component(package: &Package, kind: &str, checksums: &BTreeMap<(String, String), String>) -> Result<Value> {
    let Some(licence) = &package.license else {
        bail!("{} {} names no licence", package.name, package.version)
    };
    let mut value = json!({
        "type": kind, "bom-ref": purl(package), "name": package.name, "version": package.version,
        "purl": purl(package), "licenses": [{ "expression": spdx(licence) }],
    });
    if let Some(sum) = checksums.get(&(package.name.clone(), package.version.clone())) {
        value["hashes"] = json!([{ "alg": "SHA-256", "content": sum }]);
    }
    if let Some(repository) = &package.repository {
        value["externalReferences"] = json!([{ "type": "vcs", "url": repository }]);
    }
    Ok(value)
}

/// The bill of materials; the first part is the program itself.
fn bill(
    parts: &[(&Package, Vec<&Package>)],
    checksums: &BTreeMap<(String, String), String>,
) -> Result<Value> {
    let ((program, _), others) = parts.split_first().context("nothing is built")?;
    let components: Vec<Value> =
        others.iter().map(|(p, _)| component(p, "library", checksums)).collect::<Result<_>>()?;
    let needs = |(p, needs): &(&Package, Vec<&Package>)| json!({ "ref": purl(p), "dependsOn": needs.iter().map(|n| purl(n)).collect::<Vec<_>>() });
    Ok(json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": { "component": component(program, "application", checksums)? },
        "components": components,
        "dependencies": parts.iter().map(needs).collect::<Vec<_>>(),
    }))
}

/// Whether a file in a crate's folder tells its licence.
fn is_licence(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let begins = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
    begins.iter().any(|b| name.starts_with(b)) && !name.ends_with(".RS")
}

/// Every crate with its licence, and then each text once, with those that have it.
fn licences(parts: &[(&Package, Vec<&Package>)]) -> Result<String> {
    let mut table = String::new();
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (package, _) in parts.iter().filter(|(p, _)| p.source.is_some()) {
        let who = format!("{} {}", package.name, package.version);
        let licence = package.license.as_deref().with_context(|| format!("{who} names no licence"))?;
        let folder = package.manifest_path.parent().context("a manifest lies in a folder")?;
        let mut found = 0;
        for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_file() && is_licence(&entry.file_name().to_string_lossy()) {
                let text = String::from_utf8_lossy(&fs::read(entry.path())?).replace("\r\n", "\n");
                texts.entry(text.trim().to_owned()).or_default().push(who.clone());
                found += 1;
            }
        }
        let note = if found == 0 { "  (no text in the crate)" } else { "" };
        table.push_str(&format!("{who:<32} {}{note}\n", spdx(licence)));
    }
    let mut out = format!(
        "tcmu-dif contains code of these crates. Where a licence is a choice (OR), any of them may be taken.\n\n{table}"
    );
    let rule = "-".repeat(78);
    for (text, mut who) in texts {
        who.sort();
        who.dedup();
        out.push_str(&format!("\n{rule}\n{}\n{rule}\n\n{text}\n", who.join(", ")));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bill_names_every_crate_in_the_program_once_and_nothing_that_only_tests_it() {
        let metadata = Metadata::of_workspace().unwrap();
        let parts = metadata.made_of(metadata.member("tcmu-dif").unwrap());
        let lock = fs::read_to_string(sh::workspace_root().join("Cargo.lock")).unwrap();
        let bill = bill(&parts, &checksums(&lock).unwrap()).unwrap();
        assert_eq!((&bill["bomFormat"], &bill["specVersion"]), (&"CycloneDX".into(), &"1.5".into()));
        assert_eq!(bill["metadata"]["component"]["name"], "tcmu-dif");
        let components = bill["components"].as_array().unwrap();
        let names: Vec<&str> = components.iter().map(|c| c["name"].as_str().unwrap()).collect();
        for inside in ["clap", "io-uring", "serde", "tcmu-sys"] {
            assert_eq!(names.iter().filter(|n| **n == inside).count(), 1, "{inside}");
        }
        for outside in ["proptest", "insta", "tempfile", "anyhow"] {
            assert!(!names.contains(&outside), "{outside}");
        }
        // Whatever is needed is a component, and what came from a registry has its hash.
        let refs: Vec<&Value> = components.iter().map(|c| &c["bom-ref"]).collect();
        for dependency in bill["dependencies"].as_array().unwrap() {
            for need in dependency["dependsOn"].as_array().unwrap() {
                assert!(refs.contains(&need), "{need}");
            }
        }
        for c in components.iter().filter(|c| c["name"] != "tcmu-sys") {
            assert_eq!(c["hashes"][0]["content"].as_str().map(str::len), Some(64), "{c}");
        }
    }

    #[test]
    fn every_crate_in_the_program_has_its_licence_in_the_list() {
        let metadata = Metadata::of_workspace().unwrap();
        let parts = metadata.made_of(metadata.member("tcmu-dif").unwrap());
        let text = licences(&parts).unwrap();
        for (package, _) in parts.iter().filter(|(p, _)| p.source.is_some()) {
            let line =
                text.lines().find(|l| l.starts_with(&format!("{} {} ", package.name, package.version)));
            assert!(line.is_some_and(|l| l.split_whitespace().nth(2).is_some()), "{}", package.name);
        }
        assert!(text.contains("Permission is hereby granted"));
    }

    #[test]
    fn a_choice_is_written_in_spdx_s_words() {
        assert_eq!(spdx("MIT/Apache-2.0"), "MIT OR Apache-2.0");
        assert_eq!(spdx("Apache-2.0 / MIT"), "Apache-2.0 OR MIT");
        assert_eq!(spdx("(MIT OR Apache-2.0) AND Unicode-3.0"), "(MIT OR Apache-2.0) AND Unicode-3.0");
    }
}
