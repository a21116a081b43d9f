//! TLS 1.3 with certificates on both sides: for NBD, client (`image/nbd`) and server (`export`), and for handovers (`admin`).
//!
//! Certificates lie in a directory of QEMU's layout (`tls-creds-x509`): `ca-cert.pem`, `client-cert.pem`, `client-key.pem`, `server-cert.pem`,
//! `server-key.pem`, and `ca-crl.pem` if there is one. Each side shows a certificate of that CA and wants one of the other; there is no
//! way to do without. They are read anew for each connection, so a certificate that was renewed counts from the next one on.
//!
//! [`Session`] does no I/O: bytes of the other side go in, bytes for it come out, and plain data on the near side. [`duplex`] is the same over
//! a socket that blocks. What goes wrong is told in words ([`TlsError`]): which file, and what to do.

pub mod duplex;
mod files;
mod session;
mod words;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateRevocationListDer, ServerName, UnixTime},
    server::{ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};

pub use session::Session;

/// Where certificates are looked for if nobody says where.
pub const DIRECTORY: &str = "/etc/tcmu-dif/tls";

/// The CA's certificates: who is believed.
const CA: &str = "ca-cert.pem";
/// What that CA has revoked.
const CRL: &str = "ca-crl.pem";

/// Why there is no TLS, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct TlsError {
    /// In words.
    pub why: String,
    /// What an administrator does next.
    pub next: String,
}

impl TlsError {
    pub(crate) fn new(why: impl Into<String>, next: impl Into<String>) -> TlsError {
        TlsError { why: why.into(), next: next.into() }
    }

    /// What a stream said, if it is this.
    pub fn of(e: &std::io::Error) -> Option<&TlsError> {
        e.get_ref()?.downcast_ref()
    }

    /// Reason and next step, for where there is one line.
    pub fn in_one_line(&self) -> String {
        format!("{} (next: {})", self.why, self.next)
    }
}

impl From<TlsError> for std::io::Error {
    fn from(e: TlsError) -> std::io::Error {
        std::io::Error::new(std::io::ErrorKind::InvalidData, e)
    }
}

/// What it means if a server hangs up on a client that has just done the handshake with the certificates of that directory.
pub fn hung_up(dir: &Path) -> TlsError {
    words::gone(dir)
}

/// Which side of a connection one is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Client,
    Server,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Client => "client",
            Role::Server => "server",
        }
    }

    fn other(self) -> Role {
        match self {
            Role::Client => Role::Server,
            Role::Server => Role::Client,
        }
    }

    fn certificate(self, dir: &Path) -> PathBuf {
        dir.join(format!("{}-cert.pem", self.word()))
    }

    fn key(self, dir: &Path) -> PathBuf {
        dir.join(format!("{}-key.pem", self.word()))
    }
}

/// What a side has read: its own certificate with its key, and whom it believes.
struct Credentials {
    dir: PathBuf,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    own: CertifiedKey,
}

impl Credentials {
    fn read(dir: &Path, role: Role) -> Result<Credentials, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        files::directory(dir, role)?;
        let ca = dir.join(CA);
        let mut roots = RootCertStore::empty();
        for certificate in files::certificates(&ca, dir, role)? {
            roots.add(certificate).map_err(|e| {
                TlsError::new(
                    format!("{} holds a certificate that no CA can have: {e}", ca.display()),
                    "put the certificate of the CA there that signs those of servers and clients",
                )
            })?;
        }
        let (chain, key) =
            (files::certificates(&role.certificate(dir), dir, role)?, files::key(&role.key(dir), dir, role)?);
        let own = CertifiedKey::from_der(chain, key, &provider)
            .map_err(|e| words::of_own(&e, &role.certificate(dir), &role.key(dir)))?;
        let revoked = files::revoked(&dir.join(CRL))?;
        let all = Credentials { dir: dir.to_owned(), provider, roots: Arc::new(roots), revoked, own };
        all.check_own(role)?;
        Ok(all)
    }

    /// Looks at our own certificate with the other side's eyes, so that what is wrong with it is told here and not only there.
    fn check_own(&self, role: Role) -> Result<(), TlsError> {
        let Some((own, between)) = self.own.cert.split_first() else { return Ok(()) };
        let now = UnixTime::now();
        let looked = match role {
            Role::Client => self.client_verifier()?.verify_client_cert(own, between, now).map(drop),
            Role::Server => ParsedCertificate::try_from(own).and_then(|parsed| {
                let algorithms = self.provider.signature_verification_algorithms.all;
                rustls::client::verify_server_cert_signed_by_trust_anchor(
                    &parsed,
                    &self.roots,
                    between,
                    now,
                    algorithms,
                )
            }),
        };
        looked.map_err(|e| words::of_certificate(&e, &self.subject_own(role), &self.dir, role))
    }

    fn subject_own(&self, role: Role) -> String {
        role.certificate(&self.dir).display().to_string()
    }

    fn client_verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .with_crls(self.revoked.clone())
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| self.unusable(&e))
    }

    fn unusable(&self, e: &dyn std::fmt::Display) -> TlsError {
        TlsError::new(
            format!("{} cannot be used: {e}", self.dir.display()),
            "have the certificates, or the list of revoked ones, made anew",
        )
    }
}

/// What a client needs for a connection.
#[derive(Debug, Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    dir: PathBuf,
}

impl Client {
    /// Reads the certificates of a client, for a server of that name or address.
    ///
    /// # Errors
    /// What is wrong with them, or with the name.
    pub fn read(dir: &Path, host: &str) -> Result<Client, TlsError> {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| {
            TlsError::new(
                format!("'{host}' is no name that a certificate could have"),
                "name the host by a name or an address that is in its certificate",
            )
        })?;
        let read = Credentials::read(dir, Role::Client)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(read.roots.clone(), read.provider.clone())
            .with_crls(read.revoked.clone())
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| read.unusable(&e))?;
        let mut config = ClientConfig::builder_with_provider(read.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| read.unusable(&e))?
            .with_webpki_verifier(verifier)
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(read.own)));
        // Each connection looks at all certificates.
        config.resumption = Resumption::disabled();
        Ok(Client { config: Arc::new(config), name, dir: read.dir })
    }
}

/// What a server needs for a connection.
#[derive(Debug, Clone)]
pub struct Server {
    config: Arc<ServerConfig>,
    dir: PathBuf,
}

impl Server {
    /// Reads the certificates of a server.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(dir: &Path) -> Result<Server, TlsError> {
        let read = Credentials::read(dir, Role::Server)?;
        let mut config = ServerConfig::builder_with_provider(read.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| read.unusable(&e))?
            .with_client_cert_verifier(read.client_verifier()?)
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(read.own)));
        config.send_tls13_tickets = 0;
        Ok(Server { config: Arc::new(config), dir: read.dir })
    }
}

#[cfg(test)]
#[path = "../../tests/common/certificates.rs"]
#[allow(missing_docs)] // A test's.
pub(crate) mod certificates;
#[cfg(test)]
mod tests;
