//! Project chores: `cargo xtask test`, `cargo xtask vm`, `cargo xtask ci`.
fn main() {}
