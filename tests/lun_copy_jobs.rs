//! EXTENDED COPY on a LUN with dirty bitmaps and block jobs: what the kernel moves is marked, and a job that is attached misses nothing.
#![allow(clippy::unwrap_used)] // A test may panic.

use serde_json::json;
use tcmu_dif::{control::Registry, image::Format, peer::kernel::Data, scsi};

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/known.rs"]
mod known;
#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use known::{Known, SIZE, new_lun, path};
use rig::{MIB, Rig};

/// EXTENDED COPY of some blocks of vm1 to other blocks of it.
fn copy(known: &mut Known, blocks: u16, from: u64, to: u64) {
    let mut list = vec![1, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
    list.extend([0xe4, 0, 0, 0, 1, 3, 0, 8]);
    list.extend(scsi::naa_from_serial("vm1").to_be_bytes());
    list.extend([0; 12]);
    list.extend(512u32.to_be_bytes());
    list.extend([2, 0, 0, 0x18, 0, 0, 0, 0, 0, 0]);
    list.extend(blocks.to_be_bytes());
    list.extend(from.to_be_bytes());
    list.extend(to.to_be_bytes());
    let mut cdb = [0; 16];
    (cdb[0], cdb[13]) = (0x83, list.len() as u8);
    assert_eq!(known.guest.kernel.execute(&cdb, Data::Out(&list)).unwrap().status, 0);
    let (from, to, len) = (from as usize * 512, to as usize * 512, usize::from(blocks) * 512);
    known.disk.copy_within(from..from + len, to);
}

fn moved_by_kernel(known: &Known) -> u64 {
    known.guest.lun.stats().unwrap().moved_by_kernel.unwrap_or(0)
}

#[test]
fn what_the_kernel_moves_is_marked_in_dirty_bitmaps() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, false);
    let mut talk = rig.talk();
    talk.get("block-dirty-bitmap-add", json!({ "node": "vm1", "name": "b", "granularity": 65536 }));
    copy(&mut known, 4096, 0, 8192);
    assert_eq!(moved_by_kernel(&known), 2 * MIB);
    let blocks = talk.get("query-block", json!({}));
    assert_eq!(blocks[0]["inserted"]["dirty-bitmaps"][0]["count"], 2 * MIB, "{blocks}");
    known.compare();
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_mirror_or_a_backup_that_is_attached_sees_what_a_copy_writes() {
    for (command, ready) in [("drive-mirror", true), ("drive-backup", false)] {
        let rig = Rig::new(Registry::default());
        let (old, mut known) = new_lun(&rig, Format::Raw, false);
        let before = known.disk.clone();
        let new = rig.dir.path().join("new.raw");
        let mut talk = rig.talk();
        let slow = json!({ "device": "vm1", "target": path(&new), "sync": "full", "format": "raw", "speed": if ready { 0 } else { MIB } });
        talk.get(command, slow);
        if ready {
            talk.event("BLOCK_JOB_READY");
        }
        for i in 0..8 {
            copy(&mut known, 1024, i * 1024, (SIZE / 512 - 1024) - i * 512);
        }
        assert_eq!(moved_by_kernel(&known), 0, "{command}");
        let same = known.disk.clone();
        if ready {
            talk.get("block-job-cancel", json!({ "device": "vm1" }));
        } else {
            talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
        }
        let done = talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"].get("error").is_none(), "{done}");
        while talk.event("JOB_STATUS_CHANGE")["data"]["status"] != "null" {}
        copy(&mut known, 1024, 0, 4096);
        assert_eq!(moved_by_kernel(&known), 512 << 10, "after the job");
        known.compare();
        known.guest.lun.stop().unwrap();
        assert!(std::fs::read(&old).unwrap() == known.disk);
        let kept = std::fs::read(&new).unwrap();
        assert!(kept == if ready { same } else { before }, "{command}");
    }
}
