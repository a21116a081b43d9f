//! Socket options that neither rustix nor the netlink crate knows: those that `kernel::netlink` sets, and who is at the other end, which
//! `control` asks.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

fn set<T>(socket: &impl AsRawFd, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the call, and the pointer and length describe one live `T`, which the kernel
    // only reads.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the receive buffer to that many bytes, above `net.core.rmem_max` where the caller may (CAP_NET_ADMIN), and up to
/// it otherwise.
///
/// # Errors
/// setsockopt's.
pub fn force_receive_buffer(socket: &impl AsRawFd, bytes: u32) -> io::Result<()> {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SO_RCVBUFFORCE, &value).or_else(|_| set(socket, libc::SO_RCVBUF, &value))
}

/// Lets a receive give up after that time with EAGAIN.
///
/// # Errors
/// setsockopt's.
pub fn receive_timeout(socket: &impl AsRawFd, after: Duration) -> io::Result<()> {
    let value = libc::timeval {
        tv_sec: libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: libc::suseconds_t::from(after.subsec_micros()),
    };
    set(socket, libc::SO_RCVTIMEO, &value)
}

/// Who is at the other end of a Unix socket, as it was when it connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

/// Groups that are asked for; NGROUPS_MAX of Linux.
const MAX_GROUPS: usize = 65536;

/// Asks who is at the other end (SO_PEERCRED, SO_PEERGROUPS).
///
/// # Errors
/// getsockopt's.
pub fn peer(socket: &(impl AsRawFd + AsFd)) -> io::Result<Peer> {
    let cred = rustix::net::sockopt::socket_peercred(socket)?;
    let mut groups: Vec<libc::gid_t> = vec![0; MAX_GROUPS];
    let mut bytes = (MAX_GROUPS * size_of::<libc::gid_t>()) as libc::socklen_t;
    // SAFETY: the descriptor is borrowed for the call; the pointer leads to `bytes` bytes that this thread alone has, and the
    // kernel writes no more than that, and how many it wrote into `bytes`.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &mut bytes,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(bytes as usize / size_of::<libc::gid_t>());
    Ok(Peer { uid: cred.uid.as_raw(), gid: cred.gid.as_raw(), groups })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, os::unix::net::UnixStream};

    #[test]
    fn a_receive_gives_up_after_its_timeout() {
        let (mut here, _there) = UnixStream::pair().unwrap();
        receive_timeout(&here, Duration::from_millis(10)).unwrap();
        assert_eq!(here.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (here, _there) = UnixStream::pair().unwrap();
        let found = peer(&here).unwrap();
        let mut groups: Vec<u32> =
            rustix::process::getgroups().unwrap().into_iter().map(|g| g.as_raw()).collect();
        let mut same = found.groups.clone();
        groups.sort_unstable();
        same.sort_unstable();
        assert_eq!(
            (found.uid, found.gid),
            (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
        );
        assert_eq!(same, groups);
    }

    #[test]
    fn the_receive_buffer_grows_as_far_as_is_permitted() {
        let (here, _there) = UnixStream::pair().unwrap();
        force_receive_buffer(&here, 4 << 20).unwrap();
        assert!(rustix::net::sockopt::socket_recv_buffer_size(&here).unwrap() >= 100 << 10);
    }
}
