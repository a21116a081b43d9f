//! The files of a directory of certificates, read with what can be wrong about them.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use super::{CA, Role, TlsError};

/// A file of certificates or keys is no longer.
const LONGEST: u64 = 4 << 20;

fn wanted(dir: &Path, role: Role) -> String {
    let word = role.word();
    format!("a {word} needs {CA}, {word}-cert.pem and {word}-key.pem in {}", dir.display())
}

/// There is such a directory.
pub(super) fn directory(dir: &Path, role: Role) -> Result<(), TlsError> {
    match dir.metadata() {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(TlsError::new(
            format!("{} is no directory of certificates", dir.display()),
            wanted(dir, role),
        )),
        Err(e) => Err(TlsError::new(
            format!("the directory of certificates {} cannot be used: {e}", dir.display()),
            wanted(dir, role),
        )),
    }
}

/// The content, and the permissions.
fn read(path: &Path) -> io::Result<(Vec<u8>, u32)> {
    // Not opened at all if it were to wait for a writer.
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let file = File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is longer than 4 MiB"));
    }
    Ok((bytes, mode & 0o777))
}

fn needed(path: &Path, dir: &Path, role: Role) -> Result<(Vec<u8>, u32), TlsError> {
    read(path)
        .map_err(|e| TlsError::new(format!("{} cannot be read: {e}", path.display()), wanted(dir, role)))
}

fn all<T: PemObject>(bytes: &[u8]) -> Result<Vec<T>, pem::Error> {
    T::pem_slice_iter(bytes).collect()
}

/// All certificates of a file.
pub(super) fn certificates(
    path: &Path,
    dir: &Path,
    role: Role,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (bytes, _) = needed(path, dir, role)?;
    match all(&bytes) {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(TlsError::new(
            format!("{} holds no certificate", path.display()),
            "put it there in PEM form, beginning with -----BEGIN CERTIFICATE-----",
        )),
        Err(e) => Err(TlsError::new(
            format!("{} is not as a PEM file is: {e}", path.display()),
            "copy it anew from where it was made",
        )),
    }
}

/// The key of a file that is not everybody's.
pub(super) fn key(path: &Path, dir: &Path, role: Role) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (bytes, mode) = needed(path, dir, role)?;
    if mode & 0o007 != 0 {
        return Err(TlsError::new(
            format!("{} is open to everybody on this host (mode {mode:04o})", path.display()),
            format!(
                "chmod 600 {}; and if somebody may have read it, have key and certificate made anew",
                path.display()
            ),
        ));
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|e| match e {
        pem::Error::NoItemsFound => TlsError::new(
            format!("{} holds no private key", path.display()),
            "put it there in PEM form and without a passphrase: nobody is there to be asked for one",
        ),
        e => TlsError::new(
            format!("{} is not as a PEM file is: {e}", path.display()),
            "copy it anew from where it was made",
        ),
    })
}

/// What the CA has revoked; nothing, if there is no such file.
pub(super) fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let wrong = |e: &dyn std::fmt::Display| {
        TlsError::new(
            format!("{} cannot be read: {e}", path.display()),
            "have the CA make it anew, or take the file away if nothing is revoked",
        )
    };
    match read(path) {
        Ok((bytes, _)) => all(&bytes).map_err(|e| wrong(&e)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(wrong(&e)),
    }
}
