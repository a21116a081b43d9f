//! tmp
fn main() {
    if let Err(e) = tcmu_dif::demo::run(&mut std::io::stdout()) {
        eprintln!("{e} {:?}", std::error::Error::source(&e));
        std::process::exit(1);
    }
}
