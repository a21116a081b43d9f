//! One LUN: its thread, its event loop, the stack it is built from.

pub mod config;
mod event_loop;
mod inbox;
#[cfg(test)]
mod loop_tests;
mod spin;

/// placeholder
#[derive(Debug)]
pub struct Stats;
/// placeholder
#[derive(Debug)]
pub struct LunError;
