//! Making a new image, with `qemu-img create`'s options.

use std::{fs::File, path::Path, rc::Rc};

use super::{
    FileStorage, HeaderError, Qcow2, Storage,
    header::{MIN_EXTENDED_BITS, NewHeader},
    layout::{Geometry, MAX_REFCOUNT_TABLE_BYTES},
    tables::encode,
};
use crate::{
    sys::{io::Io, mem::Buffer},
    units::ByteOffset,
    volume::{IoError, IoOp, Volume},
};

/// How much of a new image is made at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every cluster has its place; the file is sparse where the file system can.
    Metadata,
}

/// The options of a new image.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Bytes of the guest's disk.
    pub size: u64,
    /// Bytes of a cluster: a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a refcount: a power of two, 1 to 64.
    pub refcount_bits: u32,
    /// 2 (compat=0.10) or 3 (compat=1.1).
    pub version: u32,
    /// Clusters of 32 subclusters.
    pub extended_l2: bool,
    /// The name of an external data file as the header shall have it.
    pub data_file: Option<String>,
    /// The external data file is to be a raw image by itself.
    pub data_file_raw: bool,
    /// The backing file's name as the header shall have it.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// How much is made at once.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The sizes that the image is built from; the options have been checked.
    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            refcount_order: self.refcount_bits.trailing_zeros(),
            extended_l2: self.extended_l2,
            data_file: self.data_file.is_some(),
        }
    }

    /// qemu-img's defaults: version 3, 64 KiB clusters, 16-bit refcounts.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            cluster_size: 65536,
            refcount_bits: 16,
            version: 3,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            backing_file: None,
            backing_format: None,
            preallocation: Preallocation::Off,
        }
    }
}

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// An option that makes no sense.
    #[error("{option}={value}: {reason}")]
    Option {
        /// qemu-img's name of it.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The header does not hold what it should say.
    #[error("the image's header cannot be made")]
    Header(#[from] HeaderError),
    /// Writing failed.
    #[error("the image cannot be written")]
    Io(#[from] IoError),
}

fn refused(option: &'static str, value: impl ToString, reason: &'static str) -> CreateError {
    CreateError::Option { option, value: value.to_string(), reason }
}

/// Makes an image in an empty file, durably, and in an empty data file where it is to have one. The caller has made the files, and
/// removes them if this fails.
///
/// # Errors
/// [`CreateError`].
pub async fn create(
    io: &Io,
    file: Rc<File>,
    data: Option<Rc<File>>,
    path: &Path,
    options: &CreateOptions,
) -> Result<(), CreateError> {
    let storage = |file| FileStorage::new(io, file).map_err(|e| IoError::from_io(IoOp::Open, e).path(path));
    let data = data.map(storage).transpose()?;
    create_on(storage(file)?, data, path, options).await
}

/// As [`create`], on any storage.
///
/// # Errors
/// [`CreateError`].
pub async fn create_on<S: Storage>(
    storage: S,
    data: Option<S>,
    path: &Path,
    options: &CreateOptions,
) -> Result<(), CreateError> {
    let g = check(options)?;
    let failed = |e| IoError::from_io(IoOp::Write, e).path(path);
    let l1_entries = g.l1_entries_for(options.size);
    let l1_clusters = g.clusters_for(l1_entries * 8);
    // Header, refcount table, refcount blocks, L1: as many blocks as count them all.
    let (mut blocks, mut table) = (1u64, 1u64);
    loop {
        let total = 1 + table + blocks + l1_clusters;
        let need = total.div_ceil(1 << g.block_bits());
        if need <= blocks && g.clusters_for(blocks * 8) <= table {
            break;
        }
        blocks = need.max(blocks);
        table = g.clusters_for(blocks * 8).max(table);
    }
    if table << g.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
        return Err(refused("size", options.size, "too large for this cluster size"));
    }
    let total = 1 + table + blocks + l1_clusters;
    let byte = |cluster: u64| cluster << g.cluster_bits;
    let header = NewHeader {
        geometry: g,
        virtual_size: options.size,
        backing_file: options.backing_file.as_deref(),
        backing_format: options.backing_format.as_deref(),
        data_file: options.data_file.as_deref(),
        raw_data_file: options.data_file_raw,
        l1_entries: l1_entries as u32,
        l1_offset: byte(1 + table + blocks),
        refcount_table_offset: byte(1),
        refcount_table_clusters: table as u32,
    }
    .encode()?;

    if let Some(data) = data.as_ref().filter(|_| options.data_file_raw) {
        data.set_size(options.size).await.map_err(failed)?;
        data.sync().await.map_err(failed)?;
    }
    storage.set_size(byte(total)).await.map_err(failed)?;
    if storage.is_fixed() {
        storage.zero(0, byte(total)).await.map_err(failed)?;
    }
    for block in 0..blocks {
        let mut content = vec![0; g.cluster() as usize];
        let counted = (total - (block << g.block_bits())).min(1 << g.block_bits());
        for index in 0..counted {
            g.set_refcount(&mut content, index as usize, 1);
        }
        let content = Buffer::from_slice(&content).sg();
        storage.write(byte(1 + table + block), &content).await.map_err(failed)?;
    }
    let entries: Vec<u64> = (0..blocks).map(|block| byte(1 + table + block)).collect();
    storage.write(byte(1), &encode(&entries).sg()).await.map_err(failed)?;
    storage.sync().await.map_err(failed)?;
    // The header comes last: without it this is no image.
    storage.write(0, &Buffer::from_slice(&header).sg()).await.map_err(failed)?;
    storage.sync().await.map_err(failed)?;
    if options.preallocation == Preallocation::Metadata && options.size > 0 {
        let image = Qcow2::open_with(storage, data, path, false, None).await?;
        image.write_zeroes(ByteOffset(0), options.size, false).await?;
        image.close().await?;
    }
    Ok(())
}

/// Whether an image can be made with these options.
///
/// # Errors
/// [`CreateError::Option`].
pub fn check_options(options: &CreateOptions) -> Result<(), CreateError> {
    check(options).map(|_| ())
}

fn check(options: &CreateOptions) -> Result<Geometry, CreateError> {
    if !options.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&options.cluster_size) {
        return Err(refused("cluster_size", options.cluster_size, "must be a power of two, 512 to 2 MiB"));
    }
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        return Err(refused("refcount_bits", options.refcount_bits, "must be a power of two, 1 to 64"));
    }
    if !(2..=3).contains(&options.version) {
        return Err(refused("compat", options.version, "must be 0.10 (v2) or 1.1 (v3)"));
    }
    if options.version == 2 && options.refcount_bits != 16 {
        return Err(refused("refcount_bits", options.refcount_bits, "compat=0.10 has 16 and no other"));
    }
    if options.backing_format.is_some() && options.backing_file.is_none() {
        let format = options.backing_format.clone().unwrap_or_default();
        return Err(refused("backing_fmt", format, "there is no backing file"));
    }
    if options.preallocation == Preallocation::Metadata && options.backing_file.is_some() {
        return Err(refused("preallocation", "metadata", "would hide the backing file"));
    }
    let g = options.geometry();
    if options.data_file_raw && (!g.data_file || options.backing_file.is_some()) {
        return Err(refused("data_file_raw", "on", "needs an external data file, and no backing file"));
    }
    if g.data_file && g.version < 3 {
        return Err(refused(
            "data_file",
            options.data_file.as_deref().unwrap_or_default(),
            "needs compat=1.1",
        ));
    }
    if g.extended_l2 && g.version < 3 {
        return Err(refused("extended_l2", "on", "needs compat=1.1"));
    }
    if g.extended_l2 && g.cluster_bits < MIN_EXTENDED_BITS {
        return Err(refused(
            "extended_l2",
            "on",
            "needs clusters of at least 16 KiB; qemu-img's advice is 128k",
        ));
    }
    if !g.can_hold(options.size) {
        return Err(refused("size", options.size, "too large for this cluster size"));
    }
    Ok(g)
}
