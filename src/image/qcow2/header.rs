//! The header of a qcow2 image: read, checked against every bound before anything is allocated, and written when an image is
//! created. The opener probes with it to walk a backing chain; the driver keeps it as its constants.

use std::fmt::Write as _;

use super::{
    bitmaps::BitmapDirectory,
    compressed::Compression,
    layout::{Geometry, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, be32, be64},
};

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
/// The largest cluster, and so the most that [`probe_header`] ever looks at.
pub const MAX_CLUSTER: usize = 2 << 20;
/// Incompatible bit 0: refcounts may be wrong (lazy refcounts, not closed).
pub const DIRTY: u64 = 1;
/// Incompatible bit 1: metadata were found damaged; the image must not be written.
pub const CORRUPT: u64 = 2;
/// Incompatible bit 2: the guest's clusters lie in a file of their own.
pub const EXTERNAL_DATA: u64 = 4;
/// Autoclear bit 0: the bitmaps extension says what is true.
pub const BITMAPS: u64 = 1;
/// Autoclear bit 1: the external data file is a raw image by itself.
pub const RAW_DATA_FILE: u64 = 2;
const COMPRESSION_TYPE: u64 = 8;
/// Incompatible bit 4: L2 entries of 128 bits, with subclusters.
pub const EXTENDED_L2: u64 = 16;
const SUPPORTED: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
/// Compatible bit 0: lazy refcounts.
pub const LAZY_REFCOUNTS: u64 = 1;

/// Offsets of header fields that are written in place.
pub mod field {
    /// backing_file_offset, 8 bytes; backing_file_size, 4 bytes, follows.
    pub const BACKING_FILE: u64 = 8;
    /// Virtual size, 8 bytes; crypt_method, l1_size and l1_table_offset follow.
    pub const SIZE: u64 = 24;
    /// refcount_table_offset, 8 bytes; refcount_table_clusters follows.
    pub const REFCOUNT_TABLE: u64 = 48;
    /// incompatible_features, 8 bytes.
    pub const INCOMPATIBLE: u64 = 72;
    /// autoclear_features, 8 bytes.
    pub const AUTOCLEAR: u64 = 88;
}

pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
pub const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_DATA_FILE: u32 = 0x4441_5441;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Bytes of a version 3 header with the compression type, padded to 8.
pub const V3_LENGTH: u32 = 112;
const V2_LENGTH: u32 = 72;
/// log2 of the smallest cluster with subclusters, which have 512 bytes then.
pub const MIN_EXTENDED_BITS: u32 = 14;
/// QEMU's bound on the number of snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
const MAX_BACKING_NAME: u32 = 1023;

/// Why a header is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The magic number is not there.
    #[error("not a qcow2 image")]
    NotQcow2,
    /// The file ends within its header.
    #[error("the file ends within its qcow2 header")]
    Truncated,
    /// A version other than 2 and 3.
    #[error("qcow2 version {0} is not supported")]
    Version(u32),
    /// A field that contradicts the specification or the bounds.
    #[error("{field} is {value}: {reason}")]
    Field {
        /// The specification's name.
        field: &'static str,
        /// What it says.
        value: u64,
        /// What is wrong with that.
        reason: &'static str,
    },
    /// A format feature that this driver does not do.
    #[error("the image uses {0}, which is not supported")]
    Feature(String),
}

impl HeaderError {
    /// What the administrator does next, if there is something.
    pub fn next_step(&self) -> Option<String> {
        match self {
            HeaderError::Feature(_) | HeaderError::Version(_) => {
                Some("convert the image: qemu-img convert -O qcow2 OLD NEW".into())
            }
            HeaderError::NotQcow2 => Some("open it as raw, if that is what it is".into()),
            HeaderError::Truncated | HeaderError::Field { .. } => {
                Some("restore the image from a backup".into())
            }
        }
    }
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderInfo {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of a refcount's width in bits.
    pub refcount_order: u32,
    /// Bytes of the guest's disk.
    pub virtual_size: u64,
    /// The backing file's name as it stands there, if there is one.
    pub backing_file: Option<String>,
    /// The backing file's format as it stands there, if it does.
    pub backing_format: Option<String>,
    /// The name of the external data file as it stands there, if there is one.
    pub data_file: Option<String>,
    /// Where its persistent dirty bitmaps are listed, if they are; valid with autoclear bit 0.
    pub bitmaps: Option<BitmapDirectory>,
    /// How its compressed clusters are compressed.
    pub compression: Compression,
    /// Refcounts may be wrong until the image has been checked.
    pub dirty: bool,
    /// The image was marked corrupt.
    pub corrupt: bool,
    /// Whoever writes may postpone refcounts (we don't).
    pub lazy_refcounts: bool,
    /// Autoclear bits: features that are void once somebody writes who does not know them.
    pub autoclear: u64,
    /// Incompatible bits as they stand there.
    pub incompatible: u64,
    /// Bytes of the header.
    pub header_length: u32,
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshot_count: u32,
    pub(super) snapshot_offset: u64,
}

impl HeaderInfo {
    /// Whether the external data file is the same disk by itself (autoclear bit 1).
    pub fn data_file_raw(&self) -> bool {
        self.data_file.is_some() && self.autoclear & RAW_DATA_FILE != 0
    }

    /// The sizes that the image is built from.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.incompatible & EXTENDED_L2 != 0,
            data_file: self.data_file.is_some(),
        }
    }
}

/// Whether a file that begins so is a qcow2 image (of any version).
pub fn is_qcow2(first: &[u8]) -> bool {
    be32(first, 0) == MAGIC && first.len() >= 8
}

fn field(field: &'static str, value: impl Into<u64>, reason: &'static str) -> HeaderError {
    HeaderError::Field { field, value: value.into(), reason }
}

/// Reads a header. `first` is the beginning of the file: its first cluster, the whole file if that is shorter, or
/// [`MAX_CLUSTER`] bytes if the cluster size is not known yet.
///
/// # Errors
/// Every contradiction with the specification, every bound exceeded, every feature not supported. Dirty and corrupt images
/// are not an error here.
pub fn probe_header(first: &[u8]) -> Result<HeaderInfo, HeaderError> {
    if !is_qcow2(first) {
        return Err(HeaderError::NotQcow2);
    }
    let version = be32(first, 4);
    if !(2..=3).contains(&version) {
        return Err(HeaderError::Version(version));
    }
    if first.len() < if version == 2 { V2_LENGTH } else { 104 } as usize {
        return Err(HeaderError::Truncated);
    }
    let cluster_bits = be32(first, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(field("cluster_bits", cluster_bits, "must be 9 to 21"));
    }
    let cluster = 1u64 << cluster_bits;
    let first = &first[..first.len().min(cluster as usize)];
    let header_length = if version == 2 { V2_LENGTH } else { be32(first, 100) };
    if version > 2 && (header_length < 104 || u64::from(header_length) > cluster || header_length % 8 != 0) {
        return Err(field("header_length", header_length, "must be 104 to the cluster size, in steps of 8"));
    }
    if header_length as usize > first.len() {
        return Err(HeaderError::Truncated);
    }
    let (incompatible, compatible, autoclear, refcount_order) = match version {
        2 => (0, 0, 0, 4),
        _ => (be64(first, 72), be64(first, 80), be64(first, 88), be32(first, 96)),
    };
    if refcount_order > 6 {
        return Err(field("refcount_order", refcount_order, "must be 0 to 6"));
    }
    match be32(first, 32) {
        0 => {}
        1 => return Err(HeaderError::Feature("AES encryption".into())),
        2 => return Err(HeaderError::Feature("LUKS encryption".into())),
        n => return Err(field("crypt_method", n, "must be 0, 1 or 2")),
    }
    let extensions = Extensions::read(first, header_length as usize, be64(first, 8))?;
    refuse_features(incompatible, &extensions)?;
    if incompatible & EXTENDED_L2 != 0 && cluster_bits < MIN_EXTENDED_BITS {
        return Err(field("cluster_bits", cluster_bits, "must be at least 14 with extended L2 entries"));
    }
    let data_file = data_file(incompatible, extensions.data_file)?;
    if data_file.is_some() && be32(first, 60) != 0 {
        return Err(field("nb_snapshots", be32(first, 60), "an image with an external data file has none"));
    }
    let compression = compression(first, header_length, incompatible)?;

    let info = HeaderInfo {
        version,
        cluster_bits,
        refcount_order,
        virtual_size: be64(first, 24),
        backing_file: backing_name(first, cluster)?,
        backing_format: extensions.backing_format,
        data_file,
        bitmaps: extensions.bitmaps,
        compression,
        dirty: incompatible & DIRTY != 0,
        corrupt: incompatible & CORRUPT != 0,
        lazy_refcounts: compatible & LAZY_REFCOUNTS != 0,
        autoclear,
        incompatible,
        header_length,
        l1_entries: be32(first, 36),
        l1_offset: be64(first, 40),
        refcount_table_offset: be64(first, 48),
        refcount_table_clusters: be32(first, 56),
        snapshot_count: be32(first, 60),
        snapshot_offset: be64(first, 64),
    };
    check_tables(&info)?;
    Ok(info)
}

fn check_tables(info: &HeaderInfo) -> Result<(), HeaderError> {
    let g = info.geometry();
    let lies_well = |name, offset: u64, bytes: u64| {
        if !g.aligned(offset) {
            return Err(field(name, offset, "must be the start of a cluster"));
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= i64::MAX as u64 => Ok(()),
            _ => Err(field(name, offset, "lies beyond the largest file")),
        }
    };
    if info.virtual_size > i64::MAX as u64 {
        return Err(field("size", info.virtual_size, "must be below 2^63"));
    }
    let l1_bytes = u64::from(info.l1_entries) * 8;
    if l1_bytes > MAX_L1_BYTES {
        return Err(field("l1_size", info.l1_entries, "the L1 table is larger than 32 MiB"));
    }
    if u64::from(info.l1_entries) < g.l1_entries_for(info.virtual_size) {
        return Err(field("l1_size", info.l1_entries, "too small for the image's size"));
    }
    lies_well("l1_table_offset", info.l1_offset, l1_bytes)?;
    if info.l1_offset == 0 && l1_bytes > 0 {
        return Err(field("l1_table_offset", 0u32, "the header lies there"));
    }
    let table = u64::from(info.refcount_table_clusters) << info.cluster_bits;
    if info.refcount_table_clusters == 0 || info.refcount_table_offset == 0 {
        return Err(field(
            "refcount_table_clusters",
            info.refcount_table_clusters,
            "there is no refcount table",
        ));
    }
    if table > MAX_REFCOUNT_TABLE_BYTES {
        return Err(field(
            "refcount_table_clusters",
            info.refcount_table_clusters,
            "the refcount table is larger than 8 MiB",
        ));
    }
    lies_well("refcount_table_offset", info.refcount_table_offset, table)?;
    if info.snapshot_count > MAX_SNAPSHOTS {
        return Err(field("nb_snapshots", info.snapshot_count, "must be at most 65536"));
    }
    if info.snapshot_count > 0 {
        lies_well("snapshots_offset", info.snapshot_offset, 0)?;
    }
    Ok(())
}

fn backing_name(first: &[u8], cluster: u64) -> Result<Option<String>, HeaderError> {
    let (offset, len) = (be64(first, 8), be32(first, 16));
    if offset == 0 {
        return Ok(None);
    }
    if len > MAX_BACKING_NAME {
        return Err(field("backing_file_size", len, "must be at most 1023"));
    }
    if offset.checked_add(len.into()).is_none_or(|end| end > cluster) {
        return Err(field("backing_file_offset", offset, "the name does not lie in the first cluster"));
    }
    let name = first.get(offset as usize..offset as usize + len as usize).ok_or(HeaderError::Truncated)?;
    match std::str::from_utf8(name) {
        Ok("") => Ok(None),
        Ok(name) if !name.contains('\0') => Ok(Some(name.to_owned())),
        _ => Err(field("backing_file_offset", offset, "the name is not text")),
    }
}

#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    bitmaps: Option<BitmapDirectory>,
    /// (type, bit, name) of the feature name table.
    features: Vec<(u8, u8, String)>,
}

impl Extensions {
    fn read(first: &[u8], from: usize, backing_offset: u64) -> Result<Extensions, HeaderError> {
        let end = match usize::try_from(backing_offset) {
            Ok(0) | Err(_) => first.len(),
            Ok(offset) => offset.min(first.len()),
        };
        let mut found = Extensions::default();
        let mut at = from;
        while at + 8 <= end {
            let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
            if kind == 0 {
                break;
            }
            let Some(data) = first[..end].get(at + 8..).and_then(|rest| rest.get(..len)) else {
                return Err(field("header extension length", len as u64, "runs out of the header"));
            };
            match kind {
                EXT_BACKING_FORMAT => {
                    found.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                EXT_BITMAPS if len >= 24 => {
                    let (count, bytes, at) = (be32(data, 0), be64(data, 8), be64(data, 16));
                    found.bitmaps = Some(BitmapDirectory { count, bytes, at });
                }
                EXT_DATA_FILE => {
                    let name = std::str::from_utf8(data)
                        .ok()
                        .filter(|name| !name.is_empty() && !name.contains('\0'));
                    found.data_file = Some(name.map(str::to_owned).ok_or_else(|| {
                        field("external data file name", len as u64, "the name is not text")
                    })?);
                }
                EXT_FEATURE_NAMES => {
                    found.features = data
                        .chunks_exact(48)
                        .map(|e| {
                            let name = e[2..].split(|b| *b == 0).next().unwrap_or_default();
                            (e[0], e[1], String::from_utf8_lossy(name).into_owned())
                        })
                        .collect();
                }
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }
}

fn refuse_features(incompatible: u64, extensions: &Extensions) -> Result<(), HeaderError> {
    let mut names = String::new();
    let mut add = |name: &str| {
        let comma = if names.is_empty() { "" } else { ", " };
        let _ = write!(names, "{comma}{name}");
    };
    for bit in 0..64u8 {
        let mask = 1u64 << bit;
        if incompatible & !SUPPORTED & mask == 0 {
            continue;
        }
        match extensions.features.iter().find(|(kind, b, _)| *kind == 0 && *b == bit) {
            Some((_, _, name)) => add(&format!("incompatible feature {bit} ({name})")),
            None => add(&format!("incompatible feature {bit}")),
        }
    }
    if names.is_empty() { Ok(()) } else { Err(HeaderError::Feature(names)) }
}

/// The external data file's name, which counts where the feature bit is set.
fn data_file(incompatible: u64, name: Option<String>) -> Result<Option<String>, HeaderError> {
    match (incompatible & EXTERNAL_DATA != 0, name) {
        (false, _) => Ok(None),
        (true, Some(name)) => Ok(Some(name)),
        (true, None) => Err(HeaderError::Feature("an external data file without a name".into())),
    }
}

/// The specification wants the incompatible bit exactly where the type is not 0.
fn compression(first: &[u8], header_length: u32, incompatible: u64) -> Result<Compression, HeaderError> {
    let kind = if header_length > 104 { first[104] } else { 0 };
    match (kind, incompatible & COMPRESSION_TYPE != 0) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => Err(field("compression_type", kind, "must not be 0 with its incompatible bit")),
        (1, false) => Err(field("compression_type", kind, "set without its incompatible bit")),
        _ => Err(HeaderError::Feature(format!("compression type {kind}"))),
    }
}

/// What a new image's header says.
pub struct NewHeader<'a> {
    pub geometry: Geometry,
    pub virtual_size: u64,
    pub backing_file: Option<&'a str>,
    pub backing_format: Option<&'a str>,
    pub data_file: Option<&'a str>,
    pub raw_data_file: bool,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
}

impl NewHeader<'_> {
    /// The bytes that begin the file.
    ///
    /// # Errors
    /// If the backing file's name or format does not fit in the first cluster.
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        let g = self.geometry;
        let mut out = Vec::new();
        let u32be = |out: &mut Vec<u8>, n: u32| out.extend_from_slice(&n.to_be_bytes());
        let u64be = |out: &mut Vec<u8>, n: u64| out.extend_from_slice(&n.to_be_bytes());
        u32be(&mut out, MAGIC);
        u32be(&mut out, g.version);
        u64be(&mut out, 0);
        u32be(&mut out, 0);
        u32be(&mut out, g.cluster_bits);
        u64be(&mut out, self.virtual_size);
        u32be(&mut out, 0);
        u32be(&mut out, self.l1_entries);
        u64be(&mut out, self.l1_offset);
        u64be(&mut out, self.refcount_table_offset);
        u32be(&mut out, self.refcount_table_clusters);
        u32be(&mut out, 0);
        u64be(&mut out, 0);
        if g.version > 2 {
            let bit = |set: bool, bit: u64| if set { bit } else { 0 };
            u64be(&mut out, bit(g.extended_l2, EXTENDED_L2) | bit(g.data_file, EXTERNAL_DATA));
            u64be(&mut out, 0);
            u64be(&mut out, bit(self.raw_data_file, RAW_DATA_FILE));
            u32be(&mut out, g.refcount_order);
            u32be(&mut out, V3_LENGTH);
            out.extend_from_slice(&[0; 8]);
        }
        for (kind, text) in [(EXT_BACKING_FORMAT, self.backing_format), (EXT_DATA_FILE, self.data_file)] {
            if let Some(text) = text {
                u32be(&mut out, kind);
                u32be(&mut out, text.len() as u32);
                out.extend_from_slice(text.as_bytes());
                out.resize(out.len().next_multiple_of(8), 0);
            }
        }
        u64be(&mut out, 0);
        if let Some(name) = self.backing_file {
            let offset = out.len();
            if name.len() > MAX_BACKING_NAME as usize {
                return Err(field("backing_file_size", name.len() as u64, "must be at most 1023"));
            }
            out.extend_from_slice(name.as_bytes());
            out[8..16].copy_from_slice(&(offset as u64).to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        }
        if out.len() as u64 > g.cluster() {
            return Err(field("backing_file_size", out.len() as u64, "the header does not fit in a cluster"));
        }
        Ok(out)
    }
}
