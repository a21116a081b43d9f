//! LUNs that are taken out of service for a while, on somebody's order: a handover stops one, and starts it again if it does not come about.
//!
//! The worker does it, between its other orders. Meanwhile commands wait in the ring, as in a restart of the daemon, and nothing but that order or the device's end
//! starts or ends it.

use std::{
    sync::{
        Arc, Weak,
        mpsc::{Sender, SyncSender, sync_channel},
    },
    time::Duration,
};

use super::worker::Order;
use crate::control::Pausing;

/// How long a LUN may take to stop or to start. It flushes, and its storage may be slow; initiators give up sooner.
const PATIENCE: Duration = Duration::from_secs(60);

/// The worker, as those who order pauses see it. It keeps no worker alive.
pub struct Pauses(Weak<Sender<Order>>);

impl Pauses {
    /// Those of the worker that takes these orders.
    pub fn of(orders: &Arc<Sender<Order>>) -> Pauses {
        Pauses(Arc::downgrade(orders))
    }

    fn order(&self, order: impl FnOnce(SyncSender<Result<(), String>>) -> Order) -> Result<(), String> {
        let (back, answer) = sync_channel(1);
        let gone = || "the device is being removed".to_owned();
        self.0.upgrade().ok_or_else(gone)?.send(order(back)).map_err(|_| gone())?;
        answer.recv_timeout(PATIENCE).map_err(|e| match e {
            std::sync::mpsc::RecvTimeoutError::Timeout => {
                format!("it has not come about in {} seconds", PATIENCE.as_secs())
            }
            std::sync::mpsc::RecvTimeoutError::Disconnected => gone(),
        })?
    }
}

impl Pausing for Pauses {
    fn pause(&self) -> Result<(), String> {
        self.order(|back| Order::Pause(true, back))
    }

    fn resume(&self) -> Result<(), String> {
        self.order(|back| Order::Pause(false, back))
    }
}
