//! The SCSI target over a volume in memory: what initiators are promised, command family by command family.
#![allow(clippy::unwrap_used)] // A test may panic.

mod atomic;
mod compare;
mod copy;
mod copy_along;
mod erase;
mod memory;
mod modes;
mod pi;
mod pi_bench;
mod pi_model;
mod provision;
mod random;
mod report;
mod rw;
mod space;
