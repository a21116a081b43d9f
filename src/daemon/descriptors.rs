//! How many files the daemon may have open. A shell gives 1024, which 160 LUNs use up, and then every new file is an error: so the daemon
//! asks for as many as its unit gives it (`LimitNOFILE=` in `dist/systemd/tcmu-dif.service`).

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many as the unit gives.
const WANTED: u64 = 65536;
/// Those of a LUN on a raw image with protection; a qcow2 chain has two more for each image beneath.
const OF_A_LUN: u64 = 7;

/// Raises the limit to what is wanted, or as far as is permitted, and says so if that is less.
pub fn make_room() {
    let now = getrlimit(Resource::Nofile);
    let at_least = |limit: Option<u64>| limit.map(|limit| limit.max(WANTED));
    let tries = [
        Rlimit { current: at_least(now.current), maximum: at_least(now.maximum) },
        Rlimit { current: now.maximum, ..now },
    ];
    // Without CAP_SYS_RESOURCE the hard limit stays.
    let _ = tries.into_iter().any(|limit| setrlimit(Resource::Nofile, limit).is_ok());
    if let Some(files) = getrlimit(Resource::Nofile).current.filter(|files| *files < WANTED) {
        tracing::warn!(
            "no more than {files} files may be open, which suffices for some {} LUNs: raise the limit (ulimit -n, LimitNOFILE=) to {WANTED}",
            files / OF_A_LUN
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_shell_is_raised_and_a_higher_one_stays() {
        let before = getrlimit(Resource::Nofile);
        setrlimit(
            Resource::Nofile,
            Rlimit { current: Some(1024.min(before.maximum.unwrap_or(1024))), ..before },
        )
        .unwrap();
        make_room();
        let room = getrlimit(Resource::Nofile);
        assert!(
            room.current.is_none_or(|files| files >= WANTED || Some(files) == before.maximum),
            "{room:?}"
        );
        make_room();
        assert_eq!(getrlimit(Resource::Nofile), room);
    }
}
