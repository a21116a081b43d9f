//! LUNs exported over NBD, for what reads disks and is no SCSI initiator: backup programs, `nbdcopy`, `qemu-img`.
//!
//! One server, as QEMU has it: on a Unix socket that its owner alone may use, on a loopback address, or with TLS on any. An export is a
//! name for a LUN; what a client asks for is done by the LUN's own thread, through the SCSI target, so protection information is verified on the way, and
//! made for what is written. Called by `control`.

mod connection;
mod contexts;
mod server;
mod wire;

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    lun::{Remote, exported::Exported},
    nbd::uri::{self, Place},
    tls::{self, TlsError},
};
use server::{Clients, Server};

/// Clients at a time, unless somebody says another number.
const MAX_CLIENTS: usize = 32;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// An address of this host's: one that nobody else reaches, unless the server has TLS.
    Inet(SocketAddr),
}

impl Address {
    /// The address of a host and a port. Without TLS it has to be a loopback address, so that nobody else's host reads a disk.
    ///
    /// # Errors
    /// In words.
    pub fn inet(host: &str, port: &str, tls: bool) -> Result<Address, ExportError> {
        let port = port.parse().map_err(|_| ExportError::Address(format!("'{port}' is no port")))?;
        let ip: Option<IpAddr> =
            if host == "localhost" { "127.0.0.1".parse().ok() } else { host.parse().ok() };
        match ip {
            Some(ip) if tls || ip.is_loopback() => Ok(Address::Inet(SocketAddr::new(ip, port))),
            None if tls => Err(ExportError::Address(format!(
                "'{host}' is no address: give one of this host's, or 0.0.0.0 or :: for all of them"
            ))),
            _ => Err(ExportError::Address(format!(
                "'{host}' is no loopback address, and there is no TLS: use 127.0.0.1, ::1 or a Unix socket, or give tls-certificates"
            ))),
        }
    }
}

/// A LUN as it is exported.
#[derive(Debug, Clone)]
pub struct Export {
    /// What the export is known by to who manages it.
    pub id: String,
    /// The LUN's name.
    pub device: String,
    /// The name that clients ask for.
    pub name: String,
    /// In words, for those who list exports.
    pub description: String,
    /// Clients may write.
    pub writable: bool,
    /// Clients may ask which image of the chain has the data.
    pub allocation_depth: bool,
    /// The LUN, as it is or as it was.
    pub lun: Exported,
}

/// Why something is not done about exports.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// An address that is none, or that a server may not have.
    #[error("{0}")]
    Address(String),
    /// There is no TLS, as was asked for.
    #[error("no TLS: {}", .0.in_one_line())]
    Tls(#[from] TlsError),
    /// There is a server.
    #[error("NBD server already running")]
    Running,
    /// There is none.
    #[error("NBD server not running")]
    NotRunning,
    /// The server cannot listen.
    #[error("cannot listen: {0}")]
    Listen(#[from] io::Error),
    /// That is taken.
    #[error("Block export id '{0}' is already in use")]
    IdInUse(String),
    /// That is taken.
    #[error("NBD server already has export named '{0}'")]
    NameInUse(String),
    /// A name that the protocol cannot say.
    #[error("export name '{0}' is longer than 4096 bytes")]
    NameTooLong(String),
    /// There is none.
    #[error("Export '{0}' is not found")]
    NotFound(String),
    /// Clients use it.
    #[error("export '{0}' still in use")]
    InUse(String),
    /// Writes were asked for, and the LUN refuses them.
    #[error("LUN '{0}' is read-only")]
    ReadOnly(String),
}

#[derive(Default)]
struct State {
    server: Option<Server>,
    exports: BTreeMap<String, Export>,
}

/// What is shared with those who serve clients.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    clients: Clients,
}

/// The server, if there is one, and what it exports. Clones are the same.
#[derive(Clone, Default)]
pub struct Exports(Arc<Shared>);

impl fmt::Debug for Exports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Exports").field(&self.state().exports.keys()).finish()
    }
}

impl Exports {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens; with a directory of certificates for clients with TLS alone.
    ///
    /// # Errors
    /// That there is a server, what is wrong with the certificates, or what the socket says.
    pub fn start(
        &self,
        address: Address,
        max_clients: Option<usize>,
        certificates: Option<PathBuf>,
    ) -> Result<(), ExportError> {
        let mut state = self.state();
        if state.server.is_some() {
            return Err(ExportError::Running);
        }
        if let Some(dir) = &certificates {
            // Read again for each client; what is wrong with them now is better told now.
            tls::Server::read(dir)?;
        }
        let most = max_clients.filter(|n| *n > 0).unwrap_or(MAX_CLIENTS);
        state.server = Some(Server::listen(address, most, certificates, Arc::downgrade(&self.0))?);
        Ok(())
    }

    /// Ends the server and all exports, and gives their ids.
    ///
    /// # Errors
    /// That there is none.
    pub fn stop(&self) -> Result<Vec<String>, ExportError> {
        let (server, exports) = {
            let mut state = self.state();
            (state.server.take().ok_or(ExportError::NotRunning)?, std::mem::take(&mut state.exports))
        };
        exports.values().for_each(|export| export.lun.end());
        drop(server);
        self.0.clients.hang_up(|_| true);
        Ok(exports.into_keys().collect())
    }

    /// Where clients find an export; the port is the real one, if none was asked for.
    pub fn uri(&self, export: &str) -> Option<String> {
        let state = self.state();
        let server = state.server.as_ref()?;
        let place = match server.address() {
            Address::Unix(path) => Place::Unix(path.clone()),
            Address::Inet(at) => Place::Tcp { host: at.ip().to_string(), port: at.port() },
        };
        Some(uri::of(&place, export, server.has_tls()))
    }

    /// Whether there is a server.
    ///
    /// # Errors
    /// That there is none.
    pub fn is_there(&self) -> Result<(), ExportError> {
        self.state().server.as_ref().map(drop).ok_or(ExportError::NotRunning)
    }

    /// Exports a LUN.
    ///
    /// # Errors
    /// An [`ExportError`].
    pub fn add(&self, export: Export) -> Result<(), ExportError> {
        let mut state = self.state();
        if state.server.is_none() {
            return Err(ExportError::NotRunning);
        }
        if export.name.len() > crate::nbd::MAX_STRING {
            return Err(ExportError::NameTooLong(export.name));
        }
        if state.exports.contains_key(&export.id) {
            return Err(ExportError::IdInUse(export.id));
        }
        if state.exports.values().any(|there| there.name == export.name) {
            return Err(ExportError::NameInUse(export.name));
        }
        if export.writable && export.lun.lun().made().config.read_only {
            return Err(ExportError::ReadOnly(export.device));
        }
        state.exports.insert(export.id.clone(), export);
        Ok(())
    }

    /// Ends an export; with `hard` even while clients use it.
    ///
    /// # Errors
    /// That there is none, or that it is in use.
    pub fn remove(&self, id: &str, hard: bool) -> Result<(), ExportError> {
        {
            let mut state = self.state();
            if !state.exports.contains_key(id) {
                return Err(ExportError::NotFound(id.to_owned()));
            }
            if !hard && self.0.clients.of(id) > 0 {
                return Err(ExportError::InUse(id.to_owned()));
            }
            if let Some(export) = state.exports.remove(id) {
                export.lun.end();
            }
        }
        self.0.clients.hang_up(|of| of == Some(id));
        Ok(())
    }

    /// A LUN is gone, and its exports with it: gives their ids.
    pub fn lun_gone(&self, lun: &Remote) -> Vec<String> {
        let gone: Vec<String> = {
            let mut state = self.state();
            let ids: Vec<String> =
                state.exports.values().filter(|e| e.lun.lun().is_same(lun)).map(|e| e.id.clone()).collect();
            ids.iter().for_each(|id| drop(state.exports.remove(id)));
            ids
        };
        self.0.clients.hang_up(|of| of.is_some_and(|of| gone.iter().any(|id| id == of)));
        gone
    }

    /// All exports.
    pub fn all(&self) -> Vec<Export> {
        self.state().exports.values().cloned().collect()
    }
}

impl Shared {
    fn find(&self, name: &str) -> Option<Export> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.exports.values().find(|e| e.name == name).cloned()
    }

    fn list(&self) -> Vec<(String, String)> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.exports.values().map(|e| (e.name.clone(), e.description.clone())).collect()
    }

    fn has(&self, id: &str) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).exports.contains_key(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_tls_only_this_host_is_an_address_and_with_it_others_are() {
        for (host, port) in [("127.0.0.1", "10809"), ("localhost", "0"), ("::1", "1"), ("127.9.9.9", "65535")]
        {
            assert!(Address::inet(host, port, false).is_ok(), "{host}:{port}");
            assert!(Address::inet(host, port, true).is_ok(), "{host}:{port}");
        }
        for (host, port) in [
            ("0.0.0.0", "1"),
            ("::", "1"),
            ("10.0.0.1", "1"),
            ("example.com", "1"),
            ("", "1"),
            ("127.0.0.1", "x"),
            ("127.0.0.1", "70000"),
        ] {
            assert!(
                matches!(Address::inet(host, port, false), Err(ExportError::Address(_))),
                "{host}:{port}"
            );
            let is_address = host.parse::<IpAddr>().is_ok() && port == "1";
            assert_eq!(Address::inet(host, port, true).is_ok(), is_address, "{host}:{port}");
        }
    }

    #[test]
    fn an_export_needs_a_server_and_a_name_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let exports = Exports::default();
        let export = |id: &str, name: &str| Export {
            id: id.into(),
            device: "vm1".into(),
            name: name.into(),
            description: String::new(),
            writable: false,
            allocation_depth: false,
            lun: Exported::as_it_is(Remote::of_nobody()),
        };
        assert!(matches!(exports.add(export("a", "a")), Err(ExportError::NotRunning)));
        let socket = dir.path().join("nbd.sock");
        exports.start(Address::Unix(socket.clone()), None, None).unwrap();
        assert!(matches!(
            exports.start(Address::Unix(socket.clone()), None, None),
            Err(ExportError::Running)
        ));
        exports.add(export("a", "a")).unwrap();
        assert!(matches!(exports.add(export("a", "b")), Err(ExportError::IdInUse(_))));
        assert!(matches!(exports.add(export("b", "a")), Err(ExportError::NameInUse(_))));
        assert!(matches!(exports.remove("b", false), Err(ExportError::NotFound(_))));
        exports.remove("a", false).unwrap();
        exports.add(export("b", "a")).unwrap();
        assert_eq!(exports.stop().unwrap(), ["b"]);
        assert!(matches!(exports.stop(), Err(ExportError::NotRunning)));
        assert!(!socket.exists(), "the socket is gone with the server");
        exports.start(Address::Unix(socket), None, None).unwrap();
    }
}
