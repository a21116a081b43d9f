//! Writes that are there as a whole or not at all, whenever the process dies or the power fails ([`WriteFlags::atomic`]).
//!
//! What the medium keeps whole by itself, a part of one sector or page, is written in place. Everything else gets new clusters: the
//! data, and around them what the guest sees there, are written to clusters that nobody refers to, and made durable. Then one write that the
//! medium keeps whole changes what refers to them; a crash before it leaks them, and one after it the old ones.
//!
//! | the range has its L2 entries in | that write changes | and before it are written |
//! | --- | --- | --- |
//! | one sector | these entries | |
//! | several sectors, or several L2 tables | entries of the L1 table | these L2 tables, to new places |
//! | tables whose L1 entries lie in several sectors | the header | the L1 table too, to a new place |
//!
//! So every range of every length can be written so. With clusters of 64 KiB and sectors of 512 bytes the second row is met where a range
//! crosses a multiple of 4 MiB, and the third where it crosses one of 32 GiB.
//!
//! Order:
//! 1. Nobody else writes to these clusters, be it in place ([`Qcow2::moves`]) or elsewhere (`guests`): what is copied stays true.
//! 2. The new clusters come from the pool: refcount 1, durably. Data and tables are written there.
//! 3. Nobody else writes to the page of the table that is to change. One sync: data and new tables are durable, and no write of that page is
//!    on its way to the disk, into which the change could slip half.
//! 4. The change.
//! 5. The old clusters wait until it is durable and their readers are gone, as always ([`super::alloc`]).
//!
//! With an external data file a cluster has one place and no other, so there nothing can be moved; what is promised is what an ordinary
//! write keeps: a piece in place, or within what one entry maps.

use super::{
    Qcow2, Storage,
    layout::{COPIED, Entry},
    map::{Kind, Run},
    refcount::Clusters,
    tables::{Switch, encode},
};
use crate::{
    sys::{
        exec::join_all,
        mem::{Buffer, Sg},
    },
    units::ByteOffset,
    volume::{IoErrorKind, IoOp, Result, Volume, WriteFlags},
};

/// Most bytes that are written as a whole: 256 blocks of 4096 bytes. Any number would do for the format; this bounds what one write
/// allocates and copies.
const MOST: u32 = 1 << 20;
/// What a cluster must not share with another: the kernel writes pages, and a table's page must be its own.
const PAGE: u64 = 4096;
const OP: IoOp = IoOp::Write;

/// New places of guest clusters, in their order: offsets in the file, and numbers of clusters.
type Places = Vec<(u64, u64)>;

/// L2 tables at new places.
#[derive(Default)]
struct NewTables {
    /// Their L1 entries.
    l1: Vec<u64>,
    /// The clusters of the old ones.
    old: Vec<u64>,
    /// What the guest clusters had before.
    freed: Vec<Clusters>,
}

impl<S: Storage> Qcow2<S> {
    /// Most bytes of an atomic write, and what its offset and length have to be multiples of.
    pub(super) fn atomic_limits(&self) -> (u32, u32) {
        let g = &self.geometry;
        let piece = self.atomic_piece() as u32;
        if g.cluster() < PAGE || piece == 0 {
            return (0, 0);
        }
        if self.data.is_none() {
            return (MOST, 1);
        }
        let piece = if g.extended_l2 { piece.min(1 << g.unit_bits()) } else { piece };
        (piece, piece)
    }

    /// Bytes of an aligned piece of guest's data that stays whole where it is written in place.
    fn atomic_piece(&self) -> u64 {
        u64::from(self.data().atomic_write()).min(PAGE)
    }

    pub(super) async fn write_atomic(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        self.check_range(OP, at, from.len() as u64)?;
        let change = self.change(OP).await?;
        let done = self.write_atomic_inside(at, from, flags).await;
        change.finish();
        done.map_err(|e| e.at(at))
    }

    async fn write_atomic_inside(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        // It may have had to wait while the disk became shorter.
        self.check_range(OP, at, from.len() as u64)?;
        if !self.limits().keeps_whole(at, from.len() as u64) {
            return Err(self.error(IoErrorKind::Unsupported, OP, "so much cannot be written as a whole"));
        }
        if from.is_empty() {
            return Ok(());
        }
        if !self.write_piece(at.0, from).await? {
            self.write_elsewhere(at.0, from).await?;
            if self.pool_is_low() {
                self.reserve_ahead(OP).await;
            }
            self.relieve(OP).await?;
        }
        if flags.fua { self.sync(OP).await } else { Ok(()) }
    }

    /// Writes in place what the medium keeps whole by itself. Gives whether that was possible.
    async fn write_piece(&self, at: u64, from: &Sg) -> Result<bool> {
        let (piece, len) = (self.atomic_piece(), from.len() as u64);
        if piece == 0 || at / piece != (at + len - 1) / piece {
            return Ok(false);
        }
        let _stays = self.stays(at, len).await;
        if self.data.is_some() {
            self.sync(OP).await?;
            return self.write_range(OP, at, from).await.map(|()| true);
        }
        let in_place = async || match self.run(OP, at, len).await? {
            Run { len: all, kind: Kind::Data { host, owned: true } } if all == len => Ok(Some(host)),
            _ => Ok(None),
        };
        let _at_work = self.epochs.enter();
        if in_place().await?.is_none() {
            return Ok(false);
        }
        // Nobody else is at the page, and nothing of it is on its way to the disk after this.
        self.sync(OP).await?;
        // It may have been discarded meanwhile.
        let Some(host) = in_place().await? else { return Ok(false) };
        self.write_in_place(OP, host, from).await.map(|()| true)
    }

    /// Writes to new clusters, and lets them take the place of the old ones.
    async fn write_elsewhere(&self, at: u64, from: &Sg) -> Result<()> {
        let g = self.geometry;
        let (first, last) = (g.index(at), g.index(at + from.len() as u64 - 1));
        let _moved = self.moves.hold(first, last - first + 1).await;
        let _at_work = self.epochs.enter();
        let unit = u64::from(self.storage.atomic_write()).clamp(8, PAGE);
        let in_sector = unit / g.entry_bytes();
        if first / in_sector == last / in_sector {
            let _held = self.guests.exclusive(first, last - first + 1).await;
            return self.switch_entries_of(first, last, at, from).await;
        }
        // Their tables move, so nobody may change any entry of them.
        let (top, end) = (g.l1_index(first), g.l1_index(last) + 1);
        let _held = self.guests.exclusive(top << g.l2_bits(), (end - top) << g.l2_bits()).await;
        let places = self.write_to_new(at, from).await?;
        let mut made = Vec::new();
        let done = self.switch_tables(first, &self.entries_at(&places), unit, &mut made).await;
        if done.is_err() {
            // Nothing refers to them, or the image has failed.
            for table in made {
                self.tables.borrow_mut().remove(&g.index(table));
                self.give_back(table, 1);
            }
            self.give_all_back(&places);
        }
        done
    }

    /// The first row: all entries lie in one sector.
    async fn switch_entries_of(&self, first: u64, last: u64, at: u64, from: &Sg) -> Result<()> {
        let entries = self.entries(OP, first).await?;
        let old: Vec<Entry> = (first..=last).map(|cluster| self.entry(&entries, cluster)).collect();
        let freed = self.referred_by(&old).await?;
        let places = self.write_to_new(at, from).await?;
        let new = self.entries_at(&places);
        let switched = self.set_entries_as(OP, &entries, first, &new, Switch::AtOnce).await;
        if let Err(e) = switched {
            if (first..=last).zip(&old).all(|(cluster, old)| self.entry(&entries, cluster) == *old) {
                self.give_all_back(&places);
            }
            return Err(e);
        }
        freed.into_iter().for_each(|(first, count)| self.free_later(first, count));
        Ok(())
    }

    /// The second row and the third: gives guest clusters from `first` on new entries, in tables at new places, which are noted in `made`.
    /// The caller holds all that these tables map.
    async fn switch_tables(&self, first: u64, new: &[Entry], unit: u64, made: &mut Vec<u64>) -> Result<()> {
        let g = self.geometry;
        let _linking = self.linking.lock().await;
        let end = first + new.len() as u64;
        let (top, last) = (g.l1_index(first), g.l1_index(end - 1));
        let mut tables = NewTables::default();
        for index in top..=last {
            let start = first.max(index << g.l2_bits());
            let stop = end.min((index + 1) << g.l2_bits());
            let part = &new[(start - first) as usize..(stop - first) as usize];
            self.move_table(start, part, &mut tables, made).await?;
        }
        let mut l1 = self.l1.borrow().clone();
        let Some(slots) = l1.get_mut(top as usize..=last as usize) else {
            return Err(self.damaged(OP, "the L1 table is too small for the disk").await);
        };
        slots.copy_from_slice(&tables.l1);
        let in_sector = unit / 8;
        if top / in_sector == last / in_sector {
            // Whoever changes the L1 table holds `linking`.
            self.sync(OP).await?;
            let written = self.storage.write(self.l1_at.get() + top * 8, &encode(&tables.l1).sg()).await;
            if let Err(e) = written {
                // The file may name either tables now.
                self.barrier.fail();
                return Err(self.io_error(OP, e));
            }
            *self.l1.borrow_mut() = l1;
        } else {
            self.move_l1(OP, l1).await?;
        }
        for table in tables.old {
            self.tables.borrow_mut().remove(&table);
            self.free_later(table, 1);
        }
        tables.freed.into_iter().for_each(|(first, count)| self.free_later(first, count));
        Ok(())
    }

    /// Writes an L2 table with new entries from the guest cluster `start` on to a new place.
    async fn move_table(
        &self,
        start: u64,
        new: &[Entry],
        tables: &mut NewTables,
        made: &mut Vec<u64>,
    ) -> Result<()> {
        let g = self.geometry;
        let old = match self.l2_table(start) {
            Ok(old) => old.map(|(table, _)| table),
            Err(why) => return Err(self.damaged(OP, why).await),
        };
        let table = Buffer::zeroed(g.cluster() as usize);
        if let Some(old) = old {
            self.storage.read(old, &table.sg()).await.map_err(|e| self.io_error(OP, e))?;
            tables.old.push(g.index(old));
        }
        let bytes = table.to_vec();
        let index = g.l2_index(start) as usize;
        let before: Vec<Entry> = (index..index + new.len()).map(|i| g.entry(&bytes, i)).collect();
        tables.freed.extend(self.referred_by(&before).await?);
        table.sg().copy_in(index * g.entry_bytes() as usize, &g.entry_table(new));
        let (host, _) = self.take(OP, 1).await?;
        made.push(host);
        self.l2.forget(host, g.cluster());
        self.tables.borrow_mut().insert(g.index(host));
        self.storage.write(host, &table.sg()).await.map_err(|e| self.io_error(OP, e))?;
        tables.l1.push(host | COPIED);
        Ok(())
    }

    /// The clusters of the file that entries refer to, which are to be let go of.
    async fn referred_by(&self, entries: &[Entry]) -> Result<Vec<Clusters>> {
        let mut all = Vec::new();
        for entry in entries {
            if let Some((first, count)) = self.referred(self.place_of(OP, *entry).await?) {
                self.check_not_metadata(OP, first, count).await?;
                all.push((first, count));
            }
        }
        Ok(all)
    }

    /// Writes guest bytes, with what the guest sees around them in their first and last clusters, to clusters that nobody refers to.
    async fn write_to_new(&self, at: u64, from: &Sg) -> Result<Places> {
        let g = self.geometry;
        let end = at + from.len() as u64;
        let (start, stop) = (at - g.within(at), end.next_multiple_of(g.cluster()));
        let head = self.seen(start, at - start).await?;
        let tail = self.seen(end, stop - end).await?;
        // The new clusters hold zeros.
        let written_from = if head.is_zero() { at } else { start };
        let written_to = if tail.is_zero() { end } else { stop };
        let mut whole = head;
        whole.append(from);
        whole.append(&tail);
        let places = self.take_all((stop - start) >> g.cluster_bits).await?;
        let mut pos = start;
        let mut writes = Vec::new();
        for (host, count) in &places {
            let (low, high) = (pos.max(written_from), (pos + (count << g.cluster_bits)).min(written_to));
            if low < high {
                let part = whole.slice((low - start) as usize, (high - low) as usize);
                let to = host + (low - pos);
                writes.push(async move { self.storage.write_data(to, &part).await });
            }
            pos += count << g.cluster_bits;
        }
        match join_all(writes).await.into_iter().collect::<std::io::Result<()>>() {
            Ok(()) => Ok(places),
            Err(e) => {
                self.give_all_back(&places);
                Err(self.io_error(OP, e))
            }
        }
    }

    /// Takes so many clusters from the pool, or none.
    async fn take_all(&self, count: u64) -> Result<Places> {
        let mut places = Places::new();
        let mut left = count;
        while left > 0 {
            match self.take(OP, left).await {
                Ok((host, count)) => {
                    places.push((host, count));
                    left -= count;
                }
                Err(e) => {
                    self.give_all_back(&places);
                    return Err(e);
                }
            }
        }
        Ok(places)
    }

    fn give_all_back(&self, places: &[(u64, u64)]) {
        places.iter().for_each(|(host, count)| self.give_back(*host, *count));
    }

    fn entries_at(&self, places: &[(u64, u64)]) -> Vec<Entry> {
        places.iter().flat_map(|(host, count)| self.side_by_side(*host, *count)).collect()
    }
}
