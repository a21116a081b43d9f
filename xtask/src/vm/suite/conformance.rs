//! Being written.

use super::Test;

pub const TESTS: &[Test] = &[];
