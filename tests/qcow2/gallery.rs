//! Images of every kind, made by qemu-img, for tests of the tools.

use std::path::{Path, PathBuf};

use crate::support::{must, qemu_img, qemu_io};

/// A directory of images.
pub struct Gallery {
    dir: tempfile::TempDir,
    pub images: Vec<PathBuf>,
}

/// Bytes of most of the disks.
pub const SIZE: u64 = (3 << 20) + 512 * 5;

const KINDS: [&str; 10] = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=2M",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "refcount_bits=64",
    "preallocation=metadata",
    "preallocation=metadata,cluster_size=4k,lazy_refcounts=on",
    "compression_type=zstd,cluster_size=1k,refcount_bits=8",
];

impl Gallery {
    /// All kinds; `small` leaves out those of many megabytes.
    pub fn new(small: bool) -> Gallery {
        let dir = tempfile::tempdir().unwrap();
        let mut gallery = Gallery { dir, images: Vec::new() };
        for (number, options) in KINDS.iter().enumerate() {
            if !(small && options.contains("2M")) {
                gallery.kind(number, options);
            }
        }
        gallery.chain();
        gallery
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn copy(&mut self, from: &Path, name: &str) -> PathBuf {
        let to = self.at(name);
        std::fs::copy(from, &to).unwrap();
        to
    }

    fn kind(&mut self, number: usize, options: &str) {
        let path = self.at(&format!("plain{number}.qcow2"));
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, &SIZE.to_string()]);
        qemu_io(
            &path,
            &[
                "write -P 1 0 300k",
                "write -P 2 1M 100k",
                "write -P 2 512 512",
                "write -z 2M 64k",
                "write -P 3 1500k 200k",
            ],
        );
        if !options.contains("0.10") {
            // Zeros that keep their clusters, and zeros that do not.
            qemu_io(&path, &["write -z 1500k 64k", "discard 64k 64k", "write -z -u 1600k 20k"]);
        }
        if !options.contains("preallocation") && !options.contains("2M") {
            qemu_io(&path, &["write -c -P 9 2560k 64k"]);
        }
        self.images.push(path.clone());
        if !options.contains("refcount_bits=1,") && !options.ends_with("refcount_bits=1") {
            let snapshots = self.copy(&path, &format!("snapshots{number}.qcow2"));
            let name = snapshots.to_str().unwrap();
            qemu_img(&["snapshot", "-c", "one", name]);
            qemu_io(&snapshots, &["write -P 5 10k 200k"]);
            qemu_img(&["snapshot", "-c", "two", name]);
            qemu_io(&snapshots, &["write -P 6 1M 40k"]);
            self.images.push(snapshots);
        }
        if !options.contains("0.10") {
            let bitmaps = self.copy(&path, &format!("bitmaps{number}.qcow2"));
            let name = bitmaps.to_str().unwrap();
            qemu_img(&["bitmap", "--add", name, "one"]);
            qemu_img(&["bitmap", "--add", "-g", "64k", name, "another"]);
            qemu_io(&bitmaps, &["write -P 4 0 1M"]);
            self.images.push(bitmaps);
        }
    }

    /// raw, qcow2 over it, qcow2 over that.
    fn chain(&mut self) {
        let [raw, middle, top] = ["base.raw", "middle.qcow2", "top.qcow2"].map(|name| self.at(name));
        let name = |path: &Path| path.to_str().unwrap().to_owned();
        qemu_img(&["create", "-q", "-f", "raw", &name(&raw), "2097664"]);
        must("qemu-io", &["-f", "raw", "-c", "write -P 1 64k 70k", "-c", "write -P 1 1M 3k", &name(&raw)]);
        let create = ["create", "-q", "-f", "qcow2"];
        qemu_img(&[&create[..], &["-b", "base.raw", "-F", "raw", &name(&middle), "1900k"]].concat());
        qemu_io(&middle, &["write -P 2 128k 64k", "write -z 192k 64k", "write -z 1M 1k"]);
        let over = ["-o", "cluster_size=4k", "-b", "middle.qcow2", "-F", "qcow2"];
        qemu_img(&[&create[..], &over[..], &[&name(&top), "3M"]].concat());
        qemu_io(
            &top,
            &[
                "write -P 2 256k 64k",
                "write -z 256k 16k",
                "write -z -u 320k 64k",
                "write -c -P 1 384k 4k",
                "write -P 8 0 4k",
            ],
        );
        self.images.extend([raw, middle, top]);
        let empty = self.at("empty.qcow2");
        qemu_img(&[&create[..], &[&name(&empty), "10G"]].concat());
        let tiny = self.at("tiny.qcow2");
        qemu_img(&[&create[..], &["-o", "cluster_size=512", &name(&tiny), "512"]].concat());
        self.images.extend([empty, tiny]);
    }
}
