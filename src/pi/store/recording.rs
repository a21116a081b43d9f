//! What only a sidecar with a journal does: record what is to come, and tell what was recorded. Others have nothing in theirs.
//! Called by the decorator.

use std::io;

use super::{
    Sidecar,
    journal::{Claims, Intention, Journal, Recorded},
};
use crate::storage::Storage;

impl<S: Storage> Sidecar<S> {
    /// Blocks of one write that the journal has room for.
    pub fn most_recorded(&self) -> u64 {
        self.journal.as_ref().map_or(u64::MAX, Journal::most)
    }

    /// Makes an intention durable before its blocks are written. `None` if the journal has no room: then
    /// [`Sidecar::drain`], flush and try again.
    ///
    /// # Errors
    /// What the file says; nothing has been touched then.
    pub async fn record(&self, what: &Intention<'_>) -> io::Result<Option<Recorded<'_>>> {
        match &self.journal {
            Some(journal) => journal.append(&self.storage, what).await,
            None => Ok(None),
        }
    }

    /// Whether an intention would find room now.
    pub fn has_room(&self, what: &Intention<'_>) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.has_room(what))
    }

    /// Lets no record in until [`Sidecar::drained`], and waits for those whose blocks are being written.
    pub async fn drain(&self) {
        if let Some(journal) = &self.journal {
            journal.drain().await;
        }
    }

    /// Lets records in again.
    pub fn drained(&self) {
        if let Some(journal) = &self.journal {
            journal.reopen();
        }
    }

    /// A record that was dropped unfinished needs no keeping any more.
    pub fn release(&self, id: (u64, u64)) {
        if let Some(journal) = &self.journal {
            journal.release(id);
        }
    }

    /// What the journal claims: the run of this session (`mine`), or the one that an earlier session left.
    pub async fn claims(&self, mine: bool) -> io::Result<Claims> {
        match &self.journal {
            Some(journal) => journal.claims(&self.storage, mine).await,
            None => Ok(Claims::default()),
        }
    }

    /// Empties the journal, durably. Everything that it claims must be settled.
    pub async fn clear_journal(&self) -> io::Result<()> {
        match &self.journal {
            Some(journal) => journal.clear(&self.storage).await,
            None => Ok(()),
        }
    }
}
