//! Signals as a descriptor: the daemon's loop reads them between two events, and nothing runs in a handler.

use std::{
    io::{self, Read},
    mem::MaybeUninit,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// The signals that the daemon takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM or SIGINT: stop in good order.
    Stop,
    /// SIGHUP: look anew at what there is.
    Reload,
    /// SIGUSR1: write the state files.
    Report,
}

/// A signalfd. From its making on, the signals reach it and nothing else in threads that are started later.
pub struct Signals(std::fs::File);

impl Signals {
    /// Blocks SIGTERM, SIGINT, SIGHUP and SIGUSR1 on the calling thread, and takes them through a descriptor that never blocks.
    /// To be called before any thread is started, since threads inherit the mask.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take() -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set that it is given, and the calls after it work on that set alone;
        // pthread_sigmask reads it and writes nothing, since the old mask is not asked for.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let rc = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            if rc != 0 {
                return Err(io::Error::from_raw_os_error(rc));
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Signals(fd.into()))
    }

    /// The next signal that has come, if one has.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take_next(&self) -> io::Result<Option<Signal>> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match (&self.0).read(&mut info) {
            Ok(n) if n == info.len() => {}
            Ok(_) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        }
        // `ssi_signo` is the first field of the record.
        let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        Ok(Some(match number {
            n if n == libc::SIGUSR1 as u32 => Signal::Report,
            n if n == libc::SIGHUP as u32 => Signal::Reload,
            _ => Signal::Stop,
        }))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_to_the_thread_arrives_as_a_value() {
        let signals = Signals::take().unwrap();
        assert_eq!(signals.take_next().unwrap(), None);
        let told =
            [(libc::SIGUSR1, Signal::Report), (libc::SIGHUP, Signal::Reload), (libc::SIGTERM, Signal::Stop)];
        for (number, signal) in told {
            // SAFETY: the signal is blocked on this thread, so that no handler runs.
            unsafe { libc::pthread_kill(libc::pthread_self(), number) };
            assert_eq!(signals.take_next().unwrap(), Some(signal));
        }
        assert_eq!(signals.take_next().unwrap(), None);
    }
}
