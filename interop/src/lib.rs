//! A crate for tests alone: other people's qcow2 libraries as second readers of what our driver writes. They are kept out of the
//! main package, so that it does not carry their dependencies.
