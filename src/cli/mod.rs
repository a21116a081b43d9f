//! The command line: arguments, tables, JSON, progress bars.
