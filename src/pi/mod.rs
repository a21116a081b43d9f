//! T10 protection information: tuples, guards, the sidecar, and the decorator that protects a volume.
