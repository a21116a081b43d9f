//! The storage of a LUN that goes along, on the host that it leaves: copied while the LUN serves, and then marked as the other host's, since it has missed what is written there.

use std::{
    path::Path,
    sync::{Arc, mpsc::Sender},
};

use super::Going;
use crate::{
    admin::way::Address,
    handover::{Failure, WithStorage, state::DirtyBitmap, storage::Parcel, wire::Host},
    image::owner::{Claim, HostId, Left, OwnerError},
    kernel::names::Name,
    lun::{
        away::{self, Far},
        chain,
    },
};

/// How far it is with it.
pub(super) struct Storage {
    address: String,
    /// The way to the new image.
    far: Option<Arc<Far>>,
    /// The image that stays, once it is marked.
    left: Option<Left>,
}

impl Storage {
    pub(super) fn new(to: &Address) -> Storage {
        Storage { address: to.to_string(), far: None, left: None }
    }

    /// The LUN is about to stop, and sends then what is left to copy.
    pub(super) fn last_call(&mut self) -> Result<Arc<Far>, Failure> {
        let far = self.far.clone().ok_or_else(|| Failure::new("nothing has been copied"))?;
        far.call_the_last();
        Ok(far)
    }

    /// The dirty bitmaps of the LUN, which has stopped.
    pub(super) fn bitmaps(&self) -> Vec<DirtyBitmap> {
        self.far.as_ref().map(|far| far.bitmaps()).unwrap_or_default()
    }
}

/// The job that copies that LUN.
pub(super) fn job_of(name: &Name) -> String {
    format!("handover@{name}")
}

fn this_host() -> Result<Claim, Failure> {
    Claim::of_this_host().map_err(|e| Failure::new(format!("this host has no identity: {e}")))
}

fn marked(image: &Path, e: &OwnerError) -> Failure {
    let next = e.next_step(image);
    let failure = Failure::new(format!("{}: {}", image.display(), chain(e)));
    next.into_iter().fold(failure, Failure::then)
}

impl WithStorage for Going<'_> {
    fn image(&self) -> String {
        self.known.as_ref().map(|known| known.image.display().to_string()).unwrap_or_default()
    }

    fn copy(&mut self, to: Sender<Parcel>) -> Result<(), Failure> {
        let remote = self.remote()?;
        let id = job_of(&self.name);
        let Some(storage) = &mut self.storage else { return Err(Failure::new("its storage stays")) };
        let far = Far::new(to, storage.address.clone());
        self.progress.goes();
        away::copy(&remote, &id, far.clone(), &|| self.progress.may_switch_over())?;
        storage.far = Some(far);
        Ok(())
    }

    fn leave(&mut self, to: &Host) -> Result<(), Failure> {
        let image = self.known()?.image.clone();
        let host = HostId { id: to.id, name: to.name.clone() };
        let left = Left::leave(&image, &this_host()?, &host).map_err(|e| marked(&image, &e))?;
        if let Some(storage) = &mut self.storage {
            storage.left = Some(left);
        }
        tracing::info!(lun = %self.name, image = %image.display(), to = to.name, "the image stays, and is not this host's any more");
        Ok(())
    }

    fn stay(&mut self) -> Result<(), Failure> {
        let image = self.known()?.image.clone();
        let Some(left) = self.storage.as_mut().and_then(|storage| storage.left.take()) else { return Ok(()) };
        left.take_back(&this_host()?).map_err(|e| marked(&image, &e))
    }
}
