//! tcmu-dif: the userspace half of Linux's `target_core_user`, with T10 protection information.
//!
//! The folders are the architecture, and the arrows point down; `docs/architecture.md` has the map, `tests/layering.rs`
//! keeps it true.

pub mod admin;
pub mod cli;
pub mod conformance;
pub mod control;
pub mod daemon;
pub mod dbus;
pub mod demo;
pub mod export;
mod files;
pub mod handover;
pub mod image;
pub mod job;
pub mod kernel;
pub mod lun;
pub mod nbd;
pub mod peer;
pub mod pi;
pub mod ring;
pub mod scsi;
pub mod storage;
pub mod sync;
pub mod sys;
pub mod tls;
pub mod units;
pub mod volume;
