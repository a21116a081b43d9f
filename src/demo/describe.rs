//! Shows a LUN as `sg_inq` and its siblings would: INQUIRY, capacity, vital product data.

use super::{Disk, Result, Steps};
use crate::peer::kernel::Data;

pub(super) fn device(steps: &mut Steps<'_>, disk: &mut Disk, capacity: u64) -> Result<()> {
    let inquiry = disk.run(&[0x12, 0, 0, 0, 96, 0], Data::In(96))?.data;
    steps.line(format!(
        "  INQUIRY: {} {} {}, {}, PROTECT {}",
        text(&inquiry, 8..16),
        text(&inquiry, 16..32),
        text(&inquiry, 32..36),
        if byte(&inquiry, 0) & 0x1f == 0 { "direct access block device" } else { "not a disk" },
        byte(&inquiry, 5) & 1,
    ))?;
    let mut cdb = [0u8; 16];
    (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
    let cap = disk.run(&cdb, Data::In(32))?.data;
    let last = cap.get(..8).map_or(0, |b| b.iter().fold(0, |n, b| n << 8 | u64::from(*b)));
    let block = cap.get(8..12).map_or(0, |b| b.iter().fold(0, |n, b| n << 8 | u64::from(*b)));
    steps.line(format!(
        "  READ CAPACITY(16): last LBA {last}, blocks of {block} bytes, thin provisioned {}, unmapped reads as zeros {}",
        byte(&cap, 14) >> 7,
        byte(&cap, 14) >> 6 & 1,
    ))?;
    let pages = vpd(disk, 0)?;
    let names: Vec<String> = pages.iter().map(|p| format!("{p:02X}")).collect();
    steps.line(format!("  VPD pages: {}", names.join(" ")))?;
    let serial = vpd(disk, 0x80)?;
    steps.line(format!("  VPD 80: serial {}", text(&serial, 0..serial.len())))?;
    let ids = vpd(disk, 0x83)?;
    steps.line(format!("  VPD 83: {}", designators(&ids).join(", ")))?;
    let limits = vpd(disk, 0xb0)?;
    let word =
        |at: usize| limits.get(at..at + 4).map_or(0, |b| b.iter().fold(0u64, |n, b| n << 8 | u64::from(*b)));
    steps.line(format!("  VPD B0: at most {} blocks a transfer, {} blocks an UNMAP", word(4), word(16)))?;
    steps.must("the capacity is what was asked for", (last + 1) * block, capacity)?;
    steps.must(
        "every listed page is there",
        pages.iter().all(|p| vpd(disk, *p).is_ok_and(|v| !v.is_empty())),
        true,
    )
}

/// What a vital product data page holds behind its header of four bytes.
fn vpd(disk: &mut Disk, page: u8) -> Result<Vec<u8>> {
    let data = disk.run(&[0x12, 1, page, 1, 0, 0], Data::In(256))?.data;
    let len = data.get(2..4).map_or(0, |b| usize::from(b[0]) << 8 | usize::from(b[1]));
    Ok(data.get(4..(4 + len).min(data.len())).map(<[u8]>::to_vec).unwrap_or_default())
}

/// The designators of VPD 83, as far as they name the logical unit.
fn designators(mut page: &[u8]) -> Vec<String> {
    let mut out = Vec::new();
    while let [code, kind, _, len, rest @ ..] = page {
        let Some((id, next)) = rest.split_at_checked(usize::from(*len)) else { break };
        match (kind >> 4 & 3, kind & 0xf, code & 0xf) {
            (0, 3, _) => {
                out.push(format!("naa.{}", id.iter().map(|b| format!("{b:02x}")).collect::<String>()))
            }
            (0, 1, 2) => out.push(format!("t10.{}", String::from_utf8_lossy(id).trim_end())),
            _ => {}
        }
        page = next;
    }
    out
}

fn byte(data: &[u8], at: usize) -> u8 {
    data.get(at).copied().unwrap_or_default()
}

fn text(data: &[u8], range: std::ops::Range<usize>) -> String {
    data.get(range).map(|b| String::from_utf8_lossy(b).trim().to_owned()).unwrap_or_default()
}
