//! What cargo says of the packages that the program is built from.

use crate::sh;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// What `cargo metadata` prints, as far as it is wanted here.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    pub packages: Vec<Package>,
    pub resolve: Resolve,
    pub workspace_members: BTreeSet<String>,
}

/// A crate.
#[derive(Debug, Clone, Deserialize)]
pub struct Package {
    pub id: String,
    pub name: String,
    pub version: String,
    pub license: Option<String>,
    /// Where it comes from; nothing for one of the workspace.
    pub source: Option<String>,
    pub manifest_path: PathBuf,
    pub repository: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct Resolve {
    pub nodes: Vec<Node>,
}

/// A crate that is built, and which others it is built with.
#[derive(Debug, Deserialize)]
pub struct Node {
    pub id: String,
    pub deps: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
pub struct Dependency {
    pub pkg: String,
    pub dep_kinds: Vec<Kind>,
}

/// `dev`, `build`, or nothing for what is in the program itself.
#[derive(Debug, Deserialize)]
pub struct Kind {
    pub kind: Option<String>,
}

impl Metadata {
    /// Of this workspace, for Linux on this machine's processor.
    pub fn of_workspace() -> Result<Metadata> {
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let said = sh::quiet(sh::cargo().args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--filter-platform",
            &target,
        ]))?;
        serde_json::from_str(&said).context("cargo metadata prints something else")
    }

    /// Every crate that anything in the workspace is built or tested with.
    pub fn built(&self) -> Vec<&Package> {
        let ids: BTreeSet<&str> = self.resolve.nodes.iter().map(|n| n.id.as_str()).collect();
        self.packages.iter().filter(|p| ids.contains(p.id.as_str())).collect()
    }

    /// The package of that name in the workspace.
    pub fn member(&self, name: &str) -> Result<&Package> {
        let found = self.packages.iter().find(|p| p.name == name && self.workspace_members.contains(&p.id));
        found.with_context(|| format!("the workspace has no package {name}"))
    }

    /// A package with all that its program is made of (its own code first), each with what it needs directly. Macros are among
    /// them; what only builds or tests is not.
    pub fn made_of(&self, root: &Package) -> Vec<(&Package, Vec<&Package>)> {
        let packages: BTreeMap<&str, &Package> = self.packages.iter().map(|p| (p.id.as_str(), p)).collect();
        let nodes: BTreeMap<&str, &Node> = self.resolve.nodes.iter().map(|n| (n.id.as_str(), n)).collect();
        let needs = |id: &str| -> Vec<&Package> {
            let deps = nodes.get(id).into_iter().flat_map(|n| &n.deps);
            let normal = deps.filter(|d| d.dep_kinds.iter().any(|k| k.kind.is_none()));
            normal.filter_map(|d| packages.get(d.pkg.as_str()).copied()).collect()
        };
        let mut seen = BTreeSet::new();
        let mut out = Vec::new();
        let mut next = vec![root.id.as_str()];
        while let Some(id) = next.pop() {
            let Some(package) = packages.get(id).filter(|_| seen.insert(id.to_owned())) else { continue };
            let mut direct = needs(id);
            direct.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
            next.extend(direct.iter().map(|p| p.id.as_str()));
            out.push((*package, direct));
        }
        out[1..].sort_by(|(a, _), (b, _)| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
        out
    }
}
