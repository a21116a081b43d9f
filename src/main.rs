//! The binary: everything is in the library.

fn main() -> std::process::ExitCode {
    tcmu_dif::cli::main()
}
