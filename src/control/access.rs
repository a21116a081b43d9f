//! Who may ask: told by the socket's file mode, and once more by who the peer is (SO_PEERCRED), so that a descriptor that was
//! passed on or a directory that was opened too wide lets nobody in.

use std::{fs::Metadata, os::unix::fs::MetadataExt};

use crate::sys::socket::Peer;

/// The group may write.
const GROUP_WRITE: u32 = 0o020;

/// Refuses a peer that is neither root, nor the daemon's own user, nor in the socket's group where the mode permits that to write.
///
/// # Errors
/// In words, for the peer.
pub(super) fn check(peer: &Peer, own_uid: u32, socket: &Metadata) -> Result<(), String> {
    decide(peer, own_uid, socket.gid(), socket.mode())
}

fn decide(peer: &Peer, own_uid: u32, gid: u32, mode: u32) -> Result<(), String> {
    if peer.uid == 0 || peer.uid == own_uid {
        return Ok(());
    }
    if mode & GROUP_WRITE != 0 && (peer.gid == gid || peer.groups.contains(&gid)) {
        return Ok(());
    }
    Err(format!(
        "user {} may not ask this daemon: run it as root, or have root give the socket to one of your groups (chgrp GROUP, chmod 0660)",
        peer.uid
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_daemons_user_and_a_group_that_may_write_are_let_in_and_nobody_else() {
        let peer = |uid, gid, groups: &[u32]| Peer { uid, gid, groups: groups.to_vec() };
        let allowed = |peer: &Peer, mode| decide(peer, 100, 50, mode).is_ok();
        assert!(allowed(&peer(0, 0, &[]), 0o600));
        assert!(allowed(&peer(100, 7, &[]), 0o600));
        assert!(allowed(&peer(1000, 50, &[]), 0o660));
        assert!(allowed(&peer(1000, 1000, &[4, 50]), 0o660));
        assert!(!allowed(&peer(1000, 50, &[50]), 0o600), "the mode does not permit the group");
        assert!(!allowed(&peer(1000, 1000, &[4]), 0o660), "not in the group");
        assert!(!allowed(&peer(1000, 1000, &[]), 0o666), "everybody is not a group");
        let words = decide(&peer(1000, 1000, &[]), 100, 50, 0o666).unwrap_err();
        assert!(words.contains("user 1000") && words.contains("root"), "{words}");
    }
}
