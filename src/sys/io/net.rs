//! Sockets of a LUN's thread: streams that never block, with the wait for readiness in [`Io::turn`](super::Io::turn).
//!
//! A send or a receive is a system call on the spot, straight from or into a scatter list; only where the socket is not ready is an
//! operation of the backend waited for. So a future that is dropped leaves nothing under way that could still write to memory.
//! Called by `image/nbd`, and by a LUN's thread that waits for another's answer (`lun/away`).

use std::{
    fs::File,
    io::{self, IoSlice},
    net::SocketAddr,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    rc::Rc,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, connect, ipproto, recv, sendmsg, shutdown, socket_with, sockopt,
};

use smallvec::SmallVec;

use super::{IOV_MAX, Io, Request};
use crate::sys::mem::Sg;

/// A connected stream.
pub struct Stream {
    io: Io,
    file: Rc<File>,
}

impl Stream {
    /// Connects to a Unix socket.
    ///
    /// # Errors
    /// What connect(2) says; EAGAIN if the server's queue is full.
    pub async fn unix(io: &Io, path: &Path) -> io::Result<Stream> {
        let address = SocketAddrUnix::new(path)?;
        Stream::connect(io, AddressFamily::UNIX, |fd| connect(fd, &address)).await
    }

    /// Connects to a host. Small messages are sent at once, and an end that is gone is noticed some time (SO_KEEPALIVE).
    ///
    /// # Errors
    /// What connect(2) says.
    pub async fn tcp(io: &Io, address: SocketAddr) -> io::Result<Stream> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let stream = Stream::connect(io, family, |fd| connect(fd, &address)).await?;
        sockopt::set_tcp_nodelay(&stream.file, true)?;
        sockopt::set_socket_keepalive(&stream.file, true)?;
        Ok(stream)
    }

    /// One end of a pair of Unix sockets, and the other for another thread.
    ///
    /// # Errors
    /// What socketpair(2) says.
    pub fn pair(io: &Io) -> io::Result<(Stream, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Stream { io: io.clone(), file: Rc::new(File::from(OwnedFd::from(ours))) }, theirs))
    }

    async fn connect(
        io: &Io,
        family: AddressFamily,
        connect: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>,
    ) -> io::Result<Stream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let protocol = (family != AddressFamily::UNIX).then_some(ipproto::TCP);
        let fd = socket_with(family, SocketType::STREAM, flags, protocol)?;
        let connecting = match connect(&fd) {
            Ok(()) => false,
            Err(rustix::io::Errno::INPROGRESS) => true,
            Err(e) => return Err(e.into()),
        };
        let stream = Stream { io: io.clone(), file: Rc::new(File::from(fd)) };
        if connecting {
            stream.ready(libc::POLLOUT).await?;
            sockopt::socket_error(&stream.file)??;
        }
        Ok(stream)
    }

    /// Waits until there is something to receive, or the end.
    ///
    /// # Errors
    /// What poll(2) says.
    pub async fn readable(&self) -> io::Result<()> {
        self.ready(libc::POLLIN).await
    }

    /// Waits until the socket takes something.
    ///
    /// # Errors
    /// What poll(2) says.
    pub async fn writable(&self) -> io::Result<()> {
        self.ready(libc::POLLOUT).await
    }

    async fn ready(&self, events: i16) -> io::Result<()> {
        self.io.start(Request::Poll { events }, Some(&self.file), &Sg::new()).await.map(drop)
    }

    /// Receives some bytes, as many as there are and fit; 0 at the end of the stream.
    ///
    /// # Errors
    /// What recvmsg(2) says.
    pub async fn receive(&self, to: &Sg) -> io::Result<usize> {
        loop {
            match self.try_receive(to) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.ready(libc::POLLIN).await?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Fills all of `to`.
    ///
    /// # Errors
    /// What recvmsg(2) says, and that the stream ends before.
    pub async fn receive_all(&self, to: &Sg) -> io::Result<()> {
        let mut done = 0;
        while done < to.len() {
            match self.receive(&to.slice(done, to.len() - done)).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Sends all of `from`.
    ///
    /// # Errors
    /// What sendmsg(2) says. Some of the bytes may have gone.
    pub async fn send(&self, from: &Sg) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let rest = if done == 0 { from.clone() } else { from.slice(done, from.len() - done) };
            match self.try_send(&rest) {
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.ready(libc::POLLOUT).await?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Receives what is there, into memory of the caller's own; 0 at the end of the stream.
    ///
    /// # Errors
    /// What recv(2) says; EAGAIN if there is nothing.
    pub fn try_receive_bytes(&self, to: &mut [u8]) -> io::Result<usize> {
        Ok(recv(&self.file, to, RecvFlags::DONTWAIT)?.0)
    }

    /// Sends what the socket takes of that without waiting, and gives how much that was.
    ///
    /// # Errors
    /// What sendmsg(2) says; EAGAIN if it takes nothing.
    pub fn try_send_bytes(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let from = &from[..from.len().min(IOV_MAX)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(&self.file, from, &mut SendAncillaryBuffer::default(), flags)?)
    }

    /// Ends the stream in both directions: whoever waits for it is woken.
    pub fn shut_down(&self) {
        // One that has ended already need not be ended.
        let _ = shutdown(&self.file, Shutdown::Both);
    }

    fn try_receive(&self, to: &Sg) -> io::Result<usize> {
        self.message(to, |fd, message| {
            // SAFETY: the descriptor is open; the message's iovecs are of live memory that the list keeps, and the call does not
            // outlast it.
            unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends what the socket takes without waiting, and gives how much that was.
    ///
    /// # Errors
    /// What sendmsg(2) says; EAGAIN if it takes nothing.
    pub fn try_send(&self, from: &Sg) -> io::Result<usize> {
        self.message(from, |fd, message| {
            // SAFETY: as above; the kernel only reads.
            unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
        })
    }

    fn message(
        &self,
        sg: &Sg,
        call: impl FnOnce(libc::c_int, *mut libc::msghdr) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let mut iovecs: SmallVec<[libc::iovec; 8]> = sg.iovecs().take(IOV_MAX).collect();
        // SAFETY: msghdr is plain data, for which zeros mean that there is nothing.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        message.msg_iovlen = iovecs.len();
        let done = call(self.file.as_raw_fd(), &raw mut message);
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{
        exec::join,
        io::{Backend, Wait},
        mem::Buffer,
        run_on,
    };
    use std::{
        future::Future,
        io::{Read, Write},
        net::TcpListener,
        os::unix::net::UnixListener,
        task::{Context, Waker},
        time::Duration,
    };

    fn on_both(test: impl AsyncFn(Io) + Copy + 'static) {
        for backend in [Backend::Uring, Backend::Threads] {
            run_on(backend, async move |io| test(io).await);
        }
    }

    fn scattered(bytes: &[u8]) -> Sg {
        let mut sg = Sg::new();
        bytes.chunks(700).for_each(|part| sg.append(&Buffer::from_slice(part).sg()));
        sg
    }

    #[test]
    fn more_than_the_socket_holds_comes_through_whole_in_both_directions() {
        on_both(async |io| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("socket");
            let listener = UnixListener::bind(&path).unwrap();
            let echo = std::thread::spawn(move || {
                let (mut there, _) = listener.accept().unwrap();
                let mut bytes = vec![0; 4 << 20];
                there.read_exact(&mut bytes).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                there.write_all(&bytes).unwrap();
            });
            let stream = Stream::unix(&io, &path).await.unwrap();
            let sent: Vec<u8> = (0..4u32 << 20).map(|i| (i / 3) as u8).collect();
            let got = scattered(&vec![0; 4 << 20]);
            let from = scattered(&sent);
            assert!(from.segments() > IOV_MAX);
            let (a, b) = join(stream.send(&from), stream.receive_all(&got)).await;
            a.unwrap();
            b.unwrap();
            assert!(got.to_vec() == sent);
            echo.join().unwrap();
            assert_eq!(stream.receive(&got).await.unwrap(), 0);
            assert_eq!(stream.receive_all(&got).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        });
    }

    #[test]
    fn nobody_at_the_other_end_is_an_error_over_tcp_and_unix() {
        on_both(async |io| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let stream = Stream::tcp(&io, address).await.unwrap();
            stream.send(&Buffer::from_slice(b"x").sg()).await.unwrap();
            let (there, _) = listener.accept().unwrap();
            drop((there, listener));
            assert!(matches!(stream.receive(&Buffer::zeroed(1).sg()).await, Ok(0) | Err(_)));
            let refused = Stream::tcp(&io, address).await.err().unwrap();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            let none = Stream::unix(&io, Path::new("/nonexistent/socket")).await.err().unwrap();
            assert_eq!(none.kind(), io::ErrorKind::NotFound);
        });
    }

    #[test]
    fn a_wait_that_is_given_up_leaves_nothing_in_flight() {
        for backend in [Backend::Uring, Backend::Threads] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("socket");
            let _listener = UnixListener::bind(&path).unwrap();
            let at = path.clone();
            let io = Io::new(backend).unwrap();
            let handle = io.clone();
            let mut waiting = Box::pin(async move {
                let stream = Stream::unix(&handle, &at).await.unwrap();
                stream.receive(&Buffer::zeroed(1).sg()).await
            });
            assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            io.turn(Wait::No).unwrap();
            assert_eq!(io.in_flight(), 1);
            drop(waiting);
            for _ in 0..100 {
                io.turn(Wait::AtMost(Duration::from_millis(1))).unwrap();
            }
            assert_eq!(io.in_flight(), 0, "{backend}");
        }
    }
}
