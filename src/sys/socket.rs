//! Socket options that neither rustix nor the netlink crate sets: used by `kernel::netlink` alone.

use std::{io, os::fd::AsRawFd, time::Duration};

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
    fn the_receive_buffer_grows_as_far_as_is_permitted() {
        let (here, _there) = UnixStream::pair().unwrap();
        force_receive_buffer(&here, 4 << 20).unwrap();
        assert!(rustix::net::sockopt::socket_recv_buffer_size(&here).unwrap() >= 100 << 10);
    }
}
