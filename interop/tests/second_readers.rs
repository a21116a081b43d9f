//! The Rust libraries `imago` and `qcow2-rs` read an image that our driver wrote, and must see what the model says. `qemu-img` is
//! the first reader (`tests/qcow2_driver.rs`); two more that share no code with it, or with us, make a shared misreading
//! of the specification unlikely.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::path::{Path, PathBuf};

use tcmu_dif::{
    image::{
        create::create_qcow2,
        open::{OpenOptions, open},
        qcow2::CreateOptions,
    },
    sys::{self, mem::Buffer},
    units::ByteOffset,
    volume::{Volume, WriteFlags},
};

const SIZE: u64 = 12 << 20;

struct Case {
    name: &'static str,
    cluster_size: u64,
    refcount_bits: u32,
    version: u32,
    backing: bool,
}

const CASES: &[Case] = &[
    Case { name: "default", cluster_size: 65536, refcount_bits: 16, version: 3, backing: false },
    Case { name: "small-clusters", cluster_size: 4096, refcount_bits: 16, version: 3, backing: false },
    Case { name: "large-clusters", cluster_size: 2 << 20, refcount_bits: 16, version: 3, backing: false },
    Case { name: "refcounts-of-64-bits", cluster_size: 65536, refcount_bits: 64, version: 3, backing: false },
    Case { name: "version-2", cluster_size: 65536, refcount_bits: 16, version: 2, backing: false },
    Case { name: "overlay", cluster_size: 65536, refcount_bits: 16, version: 3, backing: true },
];

/// Writes, zeroes and discards at random through our driver; gives what the image must hold.
fn write_with_our_driver(dir: &Path, case: &Case) -> (PathBuf, Vec<u8>) {
    let path = dir.join(format!("{}.qcow2", case.name));
    let image = path.clone();
    let mut options = CreateOptions {
        cluster_size: case.cluster_size,
        refcount_bits: case.refcount_bits,
        version: case.version,
        ..CreateOptions::new(SIZE)
    };
    let mut model = vec![0u8; SIZE as usize];
    if case.backing {
        let base = dir.join("base.qcow2");
        // By its whole path: qcow2-rs looks for relative names in the current directory.
        options.backing_file = Some(base.display().to_string());
        let below = sys::run(async move |io| {
            create_qcow2(&io, &base, &CreateOptions::new(SIZE)).await.unwrap();
            fill(&io, &base, vec![0; SIZE as usize], 11).await
        });
        model = below;
        options.backing_format = Some("qcow2".into());
    }
    let model = sys::run(async move |io| {
        create_qcow2(&io, &image, &options).await.unwrap();
        fill(&io, &image, model, 77).await
    });
    (path, model)
}

async fn fill(io: &sys::io::Io, path: &Path, mut model: Vec<u8>, seed: u64) -> Vec<u8> {
    let options = OpenOptions::default();
    let image = open(io, path, &options).await.unwrap();
    let mut random = seed;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for i in 0..300u64 {
        let blocks = next() % 200 + 1;
        let at = next() % (SIZE / 512 - blocks) * 512;
        let len = blocks * 512;
        let range = at as usize..(at + len) as usize;
        match next() % 8 {
            0 => {
                image.discard(ByteOffset(at), len).await.unwrap();
                model[range].fill(0);
            }
            1 => {
                image.write_zeroes(ByteOffset(at), len, i % 2 == 0).await.unwrap();
                model[range].fill(0);
            }
            _ => {
                let data: Vec<u8> = (0..len).map(|_| next() as u8).collect();
                let buffer = Buffer::from_slice(&data);
                image.write(ByteOffset(at), &buffer.sg(), WriteFlags::default()).await.unwrap();
                model[range].copy_from_slice(&data);
            }
        }
    }
    image.close().await.unwrap();
    model
}

fn read_with_imago(path: &Path) -> Vec<u8> {
    use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, file::File, qcow2::Qcow2};
    let gate = PermissiveImplicitOpenGate::default();
    let image = FormatAccess::new(Qcow2::<File>::builder_path(path).open(gate).unwrap());
    let mut out = vec![0u8; SIZE as usize];
    image.read(&mut out[..], 0).unwrap();
    out
}

fn read_with_qcow2_rs(path: &Path) -> Vec<u8> {
    use qcow2_rs::{dev::Qcow2DevParams, helpers::Qcow2IoBuf, utils::qcow2_setup_dev_tokio};
    const STEP: usize = 64 << 10;
    let path = path.to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let params = Qcow2DevParams::new(9, None, None, true, false);
        let device = qcow2_setup_dev_tokio(&path, &params).await.unwrap();
        let mut out = Vec::with_capacity(SIZE as usize);
        let mut buffer = Qcow2IoBuf::<u8>::new(STEP);
        for at in (0..SIZE).step_by(STEP) {
            assert_eq!(device.read_at(&mut buffer, at).await.unwrap(), STEP);
            out.extend_from_slice(&buffer);
        }
        out
    })
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(x, y)| x != y)
}

#[test]
fn imago_reads_what_we_wrote() {
    let dir = tempfile::tempdir().unwrap();
    for case in CASES {
        let (path, model) = write_with_our_driver(dir.path(), case);
        assert_eq!(first_difference(&read_with_imago(&path), &model), None, "{}", case.name);
    }
}

#[test]
fn qcow2_rs_reads_what_we_wrote() {
    let dir = tempfile::tempdir().unwrap();
    for case in CASES {
        let (path, model) = write_with_our_driver(dir.path(), case);
        assert_eq!(first_difference(&read_with_qcow2_rs(&path), &model), None, "{}", case.name);
    }
}
