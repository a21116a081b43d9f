//! NBD, from outside, in the clear and over TLS: exports of qemu-nbd, nbdkit and a server of our own as volumes and LUNs, with servers that fail, lie, die and come back;
//! and LUNs as exports, as they are and as they were, with dirty bitmaps, read by QEMU and libnbd. `TCMU_DIF_SCALE` (quick, default, full) sets how long.
#![allow(clippy::unwrap_used)] // A test may panic.
#![allow(missing_docs)]

#[path = "common/certificates.rs"]
#[allow(dead_code)] // The tests of TLS itself use more of it.
mod certificates;
#[path = "nbd/contexts.rs"]
mod contexts;
#[path = "nbd/export.rs"]
mod export;
#[path = "nbd/fake.rs"]
mod fake;
#[path = "nbd/hostile.rs"]
mod hostile;
#[path = "nbd/jobs.rs"]
mod jobs;
#[path = "common/known.rs"]
#[allow(dead_code)] // Other tests use more of it.
mod known;
#[path = "nbd/lun.rs"]
mod lun;
#[path = "qcow2/model.rs"]
#[allow(dead_code)] // The qcow2 tests use more of it.
mod model;
#[path = "nbd/past.rs"]
mod past;
#[path = "nbd/past_ends.rs"]
mod past_ends;
#[path = "nbd/reconnect.rs"]
mod reconnect;
#[path = "common/qmp_rig.rs"]
#[allow(dead_code)] // The QMP tests use more of it.
mod rig;
#[path = "nbd/servers.rs"]
mod servers;
#[path = "qcow2/support.rs"]
#[allow(dead_code)]
mod support;
#[path = "nbd/tls.rs"]
mod tls;
#[path = "nbd/tls_export.rs"]
mod tls_export;
#[path = "nbd/volume.rs"]
mod volume;
#[path = "qcow2/work.rs"]
#[allow(dead_code)]
mod work;
