//! The new image of a LUN that comes from another host with its storage: made under a name of its own, filled with what comes, and given its name when all of it is there.
//!
//! Called by the destination of a handover, on a thread that does nothing else. Blocks are compared with the tuples that come with them before they are stored, and stored with just
//! those. What does not come to its end is removed; what a process that was killed has left is removed by the next one that is to make the same image, if nobody uses it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{LunError, chain, config::DeviceConfig, event_loop::run_to_end, stack::Stack};
use crate::{
    files,
    handover::{
        Failure,
        storage::{Kept, Piece},
    },
    image::{
        Format,
        create::{CreateError, create_qcow2, create_raw},
        lock::{ImageLock, LockMode},
        owner,
        qcow2::CreateOptions,
    },
    job::Side,
    pi::{
        PiMode, PiType,
        store::{NewSidecar, Sidecar, Stamp, default_path, open_file},
        tools,
    },
    sys::{
        exec::Executor,
        io::{Backend, Io},
        mem::Buffer,
    },
    units::{BlockSize, ByteOffset, Lba},
    volume::Volume,
};

/// Bytes that may come before they are made durable: a flush at the end, for which initiators wait, has no more to do.
const DURABLE: u64 = 64 << 20;

/// What the new image is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The LUN's configuration here: image, format, protection.
    pub config: DeviceConfig,
    /// Bytes of a block.
    pub block_size: BlockSize,
    /// Bytes.
    pub capacity: u64,
}

/// An image that is being made.
pub struct Landing {
    io: Io,
    exec: Executor,
    plan: Plan,
    format: Format,
    /// Open, until it is settled.
    stack: Option<Rc<Stack>>,
    /// Files that are removed with it, as they are called now.
    made: Vec<PathBuf>,
    since_flush: u64,
    kept: bool,
}

fn failed(what: impl std::fmt::Display, e: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(format!("{what}: {}", chain(e)))
}

fn not_made(e: &CreateError) -> Failure {
    let next = e.next_step();
    let failure = Failure::new(chain(e));
    next.into_iter().fold(failure, Failure::then)
}

/// What it is called until it is whole.
fn beside(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".incoming");
    name.into()
}

/// Looks whether an image could be made there, with its sidecar.
///
/// # Errors
/// What is in the way.
pub fn check_place(image: &Path) -> Result<(), Failure> {
    for there in [image.to_owned(), default_path(image), owner::path_of(image)] {
        if there.symlink_metadata().is_ok() {
            return Err(Failure::new(format!(
                "{} is there already, and nothing is overwritten",
                there.display()
            ))
            .then("choose another place for the new image, or remove the file"));
        }
    }
    let dir = image.parent().unwrap_or(Path::new("/"));
    match dir.metadata() {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(Failure::new(format!("{} is no directory", dir.display()))),
        Err(e) => {
            Err(Failure::new(format!("{}: {e}", dir.display())).then(format!("mkdir -p {}", dir.display())))
        }
    }
}

/// Renames a file, and replaces nothing.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that cannot do that at once, as NFS: a link replaces nothing either.
        Err(rustix::io::Errno::INVAL) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        done => Ok(done?),
    }
}

/// Removes what a process that was killed has left under the passing name.
fn remove_left(image: &Path) -> Result<(), Failure> {
    let path = beside(image);
    let file = match File::options().read(true).write(true).open(&path) {
        Ok(file) => Rc::new(file),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let _ = fs::remove_file(default_path(&path));
            return Ok(());
        }
        Err(e) => return Err(failed(path.display(), &e)),
    };
    // Whoever fills it has it locked.
    let _alone = ImageLock::acquire(&file, LockMode::Writer).map_err(|e| {
        failed(path.display(), &e).then("another handover makes the same image: wait for its end")
    })?;
    fs::remove_file(&path).map_err(|e| failed(path.display(), &e))?;
    let _ = fs::remove_file(default_path(&path));
    tracing::warn!(path = %path.display(), "half an image, left by a handover that was cut off, is removed");
    Ok(())
}

impl Landing {
    /// Makes the image, with that protection information, and opens it.
    ///
    /// # Errors
    /// Why not; nothing of it is left.
    pub fn begin(plan: Plan, kept: Option<Kept>, backend: Option<Backend>) -> Result<Landing, Failure> {
        check_place(&plan.config.image)?;
        remove_left(&plan.config.image)?;
        let io = match backend {
            Some(backend) => Io::new(backend).map_err(|e| failed("its I/O", &e))?,
            None => Io::best().0,
        };
        let format = plan.config.format.unwrap_or(Format::Raw);
        let mut landing = Landing {
            io,
            exec: Executor::new(),
            plan,
            format,
            stack: None,
            made: Vec::new(),
            since_flush: 0,
            kept: false,
        };
        landing.make(kept)?;
        Ok(landing)
    }

    fn run<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> Result<T, Failure> {
        run_to_end(&self.io, &self.exec, None, task).map_err(|e| failed("its I/O", &e))
    }

    fn make(&mut self, kept: Option<Kept>) -> Result<(), Failure> {
        let Plan { config, block_size, capacity } = self.plan.clone();
        if kept.is_some() != config.pi.is_some() {
            return Err(Failure::new("one of the hosts alone knows of the LUN's protection information"));
        }
        let path = beside(&config.image);
        let (io, at, format) = (self.io.clone(), path.clone(), self.format);
        let made = self.run(async move {
            match format {
                Format::Raw => create_raw(&io, &at, capacity).await,
                Format::Qcow2 => create_qcow2(&io, &at, &CreateOptions::new(capacity)).await,
            }
        })?;
        made.map_err(|e| not_made(&e))?;
        self.made.push(path.clone());
        let sidecar = default_path(&path);
        if let (Some(kept), Some(kind)) = (kept, config.pi) {
            let new = NewSidecar {
                block_size,
                kind,
                mode: if kept.journal { PiMode::Journal } else { PiMode::Bitmap },
                capacity: block_size.blocks_in(capacity),
                format: format.into(),
                stamp: Stamp::of(&path).map_err(|e| failed(path.display(), &e))?,
            };
            let (io, image, at) = (self.io.clone(), path.clone(), sidecar.clone());
            let made = self.run(async move { tools::create(&io, &image, &at, new).await })?;
            made.map_err(|e| failed(sidecar.display(), &e))?;
            self.made.push(sidecar.clone());
            let (io, at) = (self.io.clone(), sidecar.clone());
            let as_there = self.run(async move { keep_as(&io, &at, kept, kind).await })?;
            as_there.map_err(|e| failed(sidecar.display(), &e))?;
        }
        let config =
            DeviceConfig { image: path, format: Some(format), sidecar: None, read_only: false, ..config };
        let io = self.io.clone();
        let opened = self.run(async move { Stack::open(&io, &config, block_size, capacity).await })?;
        let stack = opened
            .map_err(|e: LunError| e.next_step().into_iter().fold(Failure::new(chain(&e)), Failure::then))?;
        let is = stack.protected().map(|p| p.kind_at_rest().number());
        self.stack = Some(Rc::new(stack));
        if is != kept.map(|k| k.kind) {
            return Err(Failure::new(
                "the new image keeps another type of protection information than the LUN",
            ));
        }
        Ok(())
    }

    /// Does that to the image.
    ///
    /// # Errors
    /// Why not. It is of no use any more then.
    pub fn land(&mut self, piece: Piece) -> Result<(), Failure> {
        let Some(stack) = self.stack.clone() else { return Err(Failure::new("the new image is closed")) };
        let name = self.plan.config.image.display().to_string();
        let told = |e: crate::volume::IoError| Failure::new(format!("the new image {name}: {}", chain(&e)));
        let flush = piece == Piece::Flush;
        match piece {
            Piece::Begin(_) => return Err(Failure::new("the new image has begun already")),
            Piece::Nothing | Piece::Flush => {}
            Piece::Write { at, data, tuples } => {
                self.since_flush += data.len() as u64;
                let block = self.plan.block_size.bytes();
                let sg = Buffer::from_slice(&data).sg();
                self.check(&stack, at / block, &sg, tuples.as_deref())?;
                let done = async move { stack.write_whole(ByteOffset(at), &sg, tuples).await };
                self.run(done)?.map_err(told)?;
            }
            Piece::Zeroes { at, len, may_unmap } => {
                let done = async move { stack.write_zeroes(ByteOffset(at), len, may_unmap).await };
                self.run(done)?.map_err(told)?;
            }
            Piece::Discard { at, len } => {
                let done = async move { stack.discard(ByteOffset(at), len).await };
                self.run(done)?.map_err(told)?;
            }
        }
        if flush || self.since_flush >= DURABLE {
            self.flush()?;
        }
        Ok(())
    }

    /// What comes has to be what its tuples say.
    fn check(
        &self,
        stack: &Stack,
        lba: u64,
        data: &crate::sys::mem::Sg,
        tuples: Option<&[u8]>,
    ) -> Result<(), Failure> {
        let (protected, tuples) = match (stack.protected(), tuples) {
            (Some(protected), Some(tuples)) => (protected, tuples),
            (None, None) => return Ok(()),
            _ => return Err(Failure::new("blocks come without their protection information")),
        };
        if tuples.len() as u64 != data.len() as u64 / self.plan.block_size.bytes() * 8 {
            return Err(Failure::new("blocks come with another number of tuples"));
        }
        match protected.checker().verify(data, Lba(lba), tuples) {
            Ok(_) => Ok(()),
            Err(m) => Err(Failure::new(format!(
                "block {} does not match its protection information as it comes here: the {} is {:#x} and not {:#x}",
                m.lba.0, m.tag, m.found, m.expected
            ))
            .then("what lies between the hosts changes data: look for that, and begin again")),
        }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        let Some(stack) = self.stack.clone() else { return Ok(()) };
        let name = self.plan.config.image.display().to_string();
        self.run(async move { stack.flush().await })?
            .map_err(|e| failed(format!("the new image {name}"), &e))?;
        self.since_flush = 0;
        Ok(())
    }

    /// Closes the image, all of which has come.
    ///
    /// # Errors
    /// Why it is not whole.
    pub fn settle(&mut self) -> Result<(), Failure> {
        let Some(stack) = self.stack.take() else {
            return Err(Failure::new("nothing of the image has come"));
        };
        let name = self.plan.config.image.display().to_string();
        self.run(async move { stack.close().await })?.map_err(|e| failed(format!("the new image {name}"), &e))
    }

    /// Gives the closed image its name, durably. Nothing is replaced.
    ///
    /// # Errors
    /// What is there, or the file system's.
    pub fn name(&mut self) -> Result<(), Failure> {
        let image = self.plan.config.image.clone();
        check_place(&image)?;
        // The sidecar first: an image that has its name has its protection information.
        for i in (0..self.made.len()).rev() {
            let to = if i == 0 { image.clone() } else { default_path(&image) };
            rename_new(&self.made[i], &to).map_err(|e| failed(to.display(), &e))?;
            self.made[i] = to;
        }
        files::sync_folder_of(&image).map_err(|e| failed(image.display(), &e))
    }

    /// The image is the LUN's now, and stays.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Its locks go with the files.
        drop(self.stack.take());
        self.exec.clear();
        for path in &self.made {
            match fs::remove_file(path) {
                Ok(()) => {
                    tracing::info!(path = %path.display(), "the new image came to nothing, and is removed")
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "half an image cannot be removed: remove it");
                }
            }
        }
    }
}

/// Has a new sidecar, which is not open, keep tuples as they are kept there: FORMAT UNIT may have chosen others than the configuration.
async fn keep_as(io: &Io, path: &Path, kept: Kept, kind: PiType) -> io::Result<()> {
    let sidecar = Sidecar::open(open_file(io, path, false).await?).await.map_err(io::Error::other)?;
    let wanted = PiType::from_number(kept.kind)
        .ok_or_else(|| io::Error::other(format!("protection of type {} is not known here", kept.kind)))?;
    if wanted != kind {
        sidecar.reformat(Some(wanted)).await?;
    }
    if kept.hidden {
        sidecar.reformat(None).await?;
    }
    if kept.initiators { sidecar.admit_initiator_tags().await } else { Ok(()) }
}
