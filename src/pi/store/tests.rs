//! The sidecar over a simulated disk.
