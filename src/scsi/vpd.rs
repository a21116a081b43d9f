//! What the logical unit says it is: standard INQUIRY data and the vital product data pages 00, 80, 83, 86, 8F, B0, B1, B2.
//!
//! Pure functions of [`Identity`] and [`Geometry`]; the limits that page B0 names are the ones that the target enforces.

use super::{copy_list, neighbour::Designator};
use crate::units::BlockSize;

/// Who the logical unit is; stable across restarts.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// T10 VENDOR IDENTIFICATION.
    pub vendor: [u8; 8],
    /// PRODUCT IDENTIFICATION.
    pub product: [u8; 16],
    /// PRODUCT REVISION LEVEL.
    pub revision: [u8; 4],
    /// UNIT SERIAL NUMBER, printable ASCII.
    pub serial: String,
    /// NAA designator.
    pub naa: u64,
}

impl Identity {
    /// Those that are the logical unit's own: vendor and serial, NAA.
    pub fn designators(&self) -> Vec<Designator> {
        let mut t10 = self.vendor.to_vec();
        t10.extend(self.serial.bytes().take(240));
        vec![
            Designator { code_set: 2, kind: 1, value: t10 }, // ASCII, T10 vendor ID based
            Designator { code_set: 1, kind: 3, value: self.naa.to_be_bytes().to_vec() }, // binary, NAA
        ]
    }
}

/// What the volume is, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub block_size: BlockSize,
    /// Capacity; what does not make a whole block is not counted.
    pub blocks: u64,
    /// It frees space: LBPME = 1.
    pub thin: bool,
    /// Blocks that are freed at once.
    pub unmap_granularity: u32,
    /// Blocks of the cheapest I/O.
    pub transfer_granularity: u16,
    /// Most blocks that can be written as a whole or not at all; 0 if even one may be torn.
    pub atomic: u32,
    /// What the first of them and their number have to be multiples of.
    pub atomic_granule: u32,
    /// The space beneath can be counted, so there are thresholds.
    pub thresholds: bool,
    /// The volume itself may not be written.
    pub read_only: bool,
}

impl Geometry {
    /// log2 of the logical blocks per physical block: 4096 bytes is what file systems, page caches and clusters work in.
    pub fn physical_exponent(&self) -> u8 {
        (12 - self.block_size.shift()) as u8
    }

    /// THRESHOLD EXPONENT: a threshold set is 1 MiB; 0 without thresholds.
    pub fn threshold_exponent(&self) -> u8 {
        if self.thresholds { (THRESHOLD_SET_SHIFT - self.block_size.shift()) as u8 } else { 0 }
    }

    /// MAXIMUM TRANSFER LENGTH: 16 MiB.
    pub fn max_transfer(&self) -> u64 {
        (16 << 20) / self.block_size.bytes()
    }

    /// OPTIMAL TRANSFER LENGTH: 1 MiB, rounded up to whole granules (Linux ignores it otherwise).
    fn optimal_transfer(&self) -> u32 {
        let blocks = ((1 << 20) / self.block_size.bytes()) as u32;
        blocks.next_multiple_of(u32::from(self.transfer_granularity).max(1))
    }

    /// MAXIMUM WRITE SAME LENGTH: 2 GiB, which a host can write well within its timeout.
    pub fn max_write_same(&self) -> u64 {
        (2 << 30) / self.block_size.bytes()
    }
}

/// log2 of the bytes of a threshold set.
pub(super) const THRESHOLD_SET_SHIFT: u32 = 20;
/// MAXIMUM COMPARE AND WRITE LENGTH, the most that its one-byte field can say.
pub(super) const MAX_COMPARE_AND_WRITE: u8 = 255;
/// MAXIMUM UNMAP LBA COUNT.
pub(super) const MAX_UNMAP_BLOCKS: u32 = 1 << 20;
/// MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT.
pub(super) const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// The one target port group, and the relative identifier of the one target port: the ring does not say through which port
/// a command came.
pub(super) const PORT_GROUP: u16 = 1;
pub(super) const RELATIVE_PORT: u16 = 1;

/// VERSION DESCRIPTORs (SPC-4 annex E): SAM-5, SPC-4 and SBC-3, none by edition. SBC-3 is named since that is the number that
/// initiators know; what SBC-4 adds and is supported says so itself.
const VERSIONS: [u16; 3] = [0x00a0, 0x0460, 0x04c0];

/// Standard INQUIRY data (SPC-4 6.6.2), 96 bytes; `protect`: initiators may see protection information.
pub(super) fn standard(id: &Identity, protect: bool) -> Vec<u8> {
    let mut d = vec![0; 96];
    d[2] = 0x06; // VERSION: SPC-4
    d[3] = 0x02; // RESPONSE DATA FORMAT
    d[4] = 96 - 5;
    d[5] = 0x18 | u8::from(protect); // TPGS = 01b: REPORT TARGET PORT GROUPS is there, SET is not; 3PC; PROTECT
    d[7] = 0x02; // CMDQUE
    d[8..16].copy_from_slice(&id.vendor);
    d[16..32].copy_from_slice(&id.product);
    d[32..36].copy_from_slice(&id.revision);
    for (i, version) in VERSIONS.iter().enumerate() {
        d[58 + 2 * i..60 + 2 * i].copy_from_slice(&version.to_be_bytes());
    }
    d
}

/// The page of that code with its header (SPC-4 7.8), or `None` if it is not supported.
pub(super) fn page(code: u8, id: &Identity, g: &Geometry, protect: bool) -> Option<Vec<u8>> {
    let body = match code {
        0x00 => SUPPORTED.to_vec(),
        0x80 => id.serial.as_bytes().to_vec(),
        0x83 => designators(id),
        0x86 => extended_inquiry(protect),
        0x8f => copy_list::third_party_copy(g.block_size),
        0xb0 => block_limits(g),
        0xb1 => characteristics(g),
        0xb2 => provisioning(g),
        _ => return None,
    };
    let mut out = vec![0, code];
    out.extend((body.len() as u16).to_be_bytes());
    out.extend(body);
    Some(out)
}

const SUPPORTED: &[u8] = &[0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2];

/// Device identification (SPC-4 7.8.6): vendor and serial, NAA, and the port.
fn designators(id: &Identity) -> Vec<u8> {
    let mut out = Vec::new();
    let own = id.designators();
    let own = own.iter().map(|d| (d.code_set, d.kind, &d.value[..]));
    for (code_set, kind, value) in own.chain([
        (1, 0x14, &[0, 0, (RELATIVE_PORT >> 8) as u8, RELATIVE_PORT as u8][..]), // target port, relative identifier
        (1, 0x15, &[0, 0, (PORT_GROUP >> 8) as u8, PORT_GROUP as u8][..]),       // target port, group
    ]) {
        out.extend([code_set, kind, 0, value.len() as u8]);
        out.extend(value);
    }
    out
}

/// Extended INQUIRY data (SPC-4 7.8.8): with `protect` types 1, 2 and 3 may be formatted (SPT = 111b) and every tag is
/// checked (GRD_CHK, APP_CHK, REF_CHK), a tuple for every block (P_I_I_SUP = 0); simple tasks; the cache is volatile.
fn extended_inquiry(protect: bool) -> Vec<u8> {
    let mut d = vec![0; 60];
    d[0] = if protect { 0x3f } else { 0 };
    d[1] = 0x01; // SIMPSUP
    d[2] = 0x01; // V_SUP
    d
}

/// Block limits (SBC-4 6.6.4).
fn block_limits(g: &Geometry) -> Vec<u8> {
    let mut d = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| d[at - 4..at - 4 + bytes.len()].copy_from_slice(bytes);
    // WSNZ = 0: a WRITE SAME of 0 blocks goes to the end of the medium.
    put(5, &[MAX_COMPARE_AND_WRITE]);
    put(6, &g.transfer_granularity.to_be_bytes());
    put(8, &(g.max_transfer() as u32).to_be_bytes());
    put(12, &g.optimal_transfer().to_be_bytes());
    if g.thin {
        put(20, &MAX_UNMAP_BLOCKS.to_be_bytes());
        put(24, &MAX_UNMAP_DESCRIPTORS.to_be_bytes());
        put(28, &g.unmap_granularity.to_be_bytes());
        put(32, &0x8000_0000u32.to_be_bytes()); // UGAVALID, aligned to LBA 0
    }
    put(36, &g.max_write_same().to_be_bytes());
    // MAXIMUM ATOMIC TRANSFER LENGTH, ATOMIC ALIGNMENT, ATOMIC TRANSFER LENGTH GRANULARITY. No atomic boundary.
    if g.atomic > 0 {
        put(44, &g.atomic.to_be_bytes());
        put(48, &g.atomic_granule.to_be_bytes());
        put(52, &g.atomic_granule.to_be_bytes());
    }
    d
}

/// Block device characteristics (SBC-4 6.6.2): no rotation; blocks read without error after a block erase (WABEREQ = 01b);
/// VERIFY compares unmapped blocks as zeros (VBULS).
fn characteristics(g: &Geometry) -> Vec<u8> {
    let mut d = vec![0; 60];
    d[1] = 0x01; // MEDIUM ROTATION RATE
    d[3] = if g.thin { 0x40 } else { 0 };
    d[4] = 0x01;
    d
}

/// Logical block provisioning (SBC-4 6.6.6): UNMAP and both WRITE SAME unmap, unmapped blocks read as zeros (LBPRZ = 001b), no
/// anchored blocks; thresholds where the space beneath can be counted.
fn provisioning(g: &Geometry) -> Vec<u8> {
    if g.thin { vec![g.threshold_exponent(), 0xe4, 0x02, 0] } else { vec![0, 0, 0x00, 0] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> Identity {
        Identity {
            vendor: *b"TCMU-DIF",
            product: *b"DISK            ",
            revision: *b"0.1 ",
            serial: "vm1".into(),
            naa: 0x3123_4567_89ab_cdef,
        }
    }

    fn geometry(block_size: BlockSize, thin: bool) -> Geometry {
        Geometry {
            block_size,
            blocks: 1000,
            thin,
            unmap_granularity: 128,
            transfer_granularity: 8,
            atomic: if thin { 2048 } else { 0 },
            atomic_granule: 8,
            thresholds: false,
            read_only: false,
        }
    }

    #[test]
    fn every_page_that_is_listed_can_be_read_and_says_its_length() {
        for thin in [false, true] {
            let g = geometry(BlockSize::B512, thin);
            for code in 0..=255u8 {
                let page = page(code, &id(), &g, false);
                assert_eq!(page.is_some(), SUPPORTED.contains(&code), "{code:#x}");
                if let Some(p) = page {
                    assert_eq!((p[1], usize::from(u16::from_be_bytes([p[2], p[3]]))), (code, p.len() - 4));
                }
            }
        }
    }

    #[test]
    fn standard_inquiry_is_spc_4_in_96_bytes() {
        let d = standard(&id(), false);
        assert_eq!((d.len(), d[0], d[2], d[3], d[4], d[5], d[7]), (96, 0, 6, 2, 91, 0x18, 2));
        assert_eq!(&d[8..36], b"TCMU-DIFDISK            0.1 ");
        assert_eq!(d[58..64], [0x00, 0xa0, 0x04, 0x60, 0x04, 0xc0]);
    }

    #[test]
    fn the_designators_are_vendor_and_serial_naa_and_port() {
        let p = page(0x83, &id(), &geometry(BlockSize::B512, true), false).unwrap();
        assert_eq!(&p[4..8], &[2, 1, 0, 11]);
        assert_eq!(&p[8..19], b"TCMU-DIFvm1");
        assert_eq!(&p[19..31], &[1, 3, 0, 8, 0x31, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        assert_eq!(&p[31..], &[1, 0x14, 0, 4, 0, 0, 0, 1, 1, 0x15, 0, 4, 0, 0, 0, 1]);
    }

    #[test]
    fn a_volume_that_frees_nothing_claims_no_unmap() {
        let g = geometry(BlockSize::B4096, false);
        let b0 = page(0xb0, &id(), &g, false).unwrap();
        assert_eq!((b0.len(), b0[3], b0[5]), (64, 0x3c, 255));
        assert!(b0[20..36].iter().chain(&b0[44..]).all(|b| *b == 0));
        assert_eq!(page(0xb2, &id(), &g, false).unwrap()[5..7], [0, 0]);
        let g = geometry(BlockSize::B512, true);
        let b0 = page(0xb0, &id(), &g, false).unwrap();
        assert_eq!(b0[8..16], [0, 0, 0x80, 0, 0, 0, 8, 0]);
        assert_eq!(b0[20..36], [0, 0x10, 0, 0, 0, 0, 1, 0, 0, 0, 0, 128, 0x80, 0, 0, 0]);
        assert_eq!(b0[44..], [0, 0, 8, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page(0xb2, &id(), &g, false).unwrap()[4..8], [0, 0xe4, 2, 0]);
        for (size, exponent) in [(BlockSize::B512, 11), (BlockSize::B4096, 8)] {
            let g = Geometry { thresholds: true, ..geometry(size, true) };
            assert_eq!(page(0xb2, &id(), &g, false).unwrap()[4..8], [exponent, 0xe4, 2, 0]);
        }
        assert_eq!(page(0xb1, &id(), &g, false).unwrap()[4..9], [0, 1, 0, 0x40, 1]);
    }

    #[test]
    fn protection_information_is_claimed_where_initiators_see_it_and_nowhere_else() {
        let g = geometry(BlockSize::B512, true);
        assert_eq!(standard(&id(), true)[5], 0x19);
        assert_eq!(page(0x86, &id(), &g, true).unwrap()[4..8], [0x3f, 1, 1, 0]);
        assert_eq!(page(0x86, &id(), &g, false).unwrap()[4..8], [0, 1, 1, 0]);
    }
}
