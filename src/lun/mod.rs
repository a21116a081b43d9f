//! One LUN: its thread, its event loop, the stack it is built from.
