//! Events: what happens is told to every client that has negotiated, and nobody waits for any of them.
//!
//! Each client has a queue of [`QUEUE`] events. Whoever publishes puts a line into each queue and goes on; a client whose queue is full
//! loses the event, and what it has asked for goes on as before. The client's own thread writes what stands in its queue.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{
    job_id,
    schema::{Enum, Member, Type, has, may},
    types::{JOB_STATUS, JOB_TYPE, MIGRATION_STATUS},
};
use crate::{
    lun::{
        events::{Event, Watcher},
        jobs::BlockJob,
    },
    volume::IoOp,
};

/// Events that may wait for one client.
pub const QUEUE: usize = 256;

/// An event, as it is declared.
pub(super) struct Declared {
    pub(super) name: &'static str,
    pub(super) data: &'static [Member],
    pub(super) help: &'static str,
}

static IO_OPERATION: Enum = Enum { name: "IoOperationType", values: &["read", "write"] };
static ERROR_ACTION: Enum = Enum { name: "BlockErrorAction", values: &["ignore", "report", "stop"] };
static FOUND_BY: Enum = Enum { name: "PiFoundBy", values: &["read", "write", "scrub", "mirror", "backup"] };
static CAUSE: Enum = Enum { name: "ShutdownCause", values: &["host-qmp-quit", "host-signal"] };

/// What the events of block jobs have.
const BLOCK_JOB: &[Member] = &[
    has("type", Type::Enum(&JOB_TYPE)),
    has("device", Type::Str),
    has("len", Type::Int),
    has("offset", Type::Int),
    has("speed", Type::Int),
];

/// Every event.
pub(super) static EVENTS: &[Declared] = &[
    Declared {
        name: "BLOCK_IO_ERROR",
        data: &[
            has("device", Type::Str),
            has("node-name", Type::Str),
            has("operation", Type::Enum(&IO_OPERATION)),
            has("action", Type::Enum(&ERROR_ACTION)),
            has("nospace", Type::Bool),
            has("reason", Type::Str),
            may("offset", Type::Int),
            has("missed", Type::Int),
        ],
        help: "a command failed because the image's I/O did; all that is no read is `write`, `offset` is a byte of the LUN, `missed` \
               counts those before it that the limit of 10 a second kept back",
    },
    Declared {
        name: "BLOCK_EXPORT_DELETED",
        data: &[has("id", Type::Str)],
        help: "as in QEMU: an export was removed, with its server or its LUN perhaps",
    },
    Declared {
        name: "BLOCK_JOB_CANCELLED",
        data: BLOCK_JOB,
        help: "as in QEMU: a job was ended before it was done",
    },
    Declared {
        name: "BLOCK_JOB_COMPLETED",
        data: &[
            has("type", Type::Enum(&JOB_TYPE)),
            has("device", Type::Str),
            has("len", Type::Int),
            has("offset", Type::Int),
            has("speed", Type::Int),
            may("error", Type::Str),
        ],
        help: "as in QEMU: a job has ended, with `error` if it could not go on; `device` is the job's id",
    },
    Declared {
        name: "BLOCK_JOB_ERROR",
        data: &[
            has("device", Type::Str),
            has("operation", Type::Enum(&IO_OPERATION)),
            has("action", Type::Enum(&ERROR_ACTION)),
            has("reason", Type::Str),
        ],
        help: "as in QEMU: I/O of a job failed, a `read` of its source or a `write` of its target; `reason` is ours, and names the place",
    },
    Declared {
        name: "BLOCK_JOB_READY",
        data: BLOCK_JOB,
        help: "as in QEMU: a mirror has caught up, and can be completed",
    },
    Declared {
        name: "JOB_STATUS_CHANGE",
        data: &[has("id", Type::Str), has("status", Type::Enum(&JOB_STATUS))],
        help: "as in QEMU: `created`, `running`, `paused`; of a mirror `ready`, `standby`; `waiting`, `pending`, `concluded`, `null` of a mirror that has ended as it \
               should, and of a scrub that has looked at everything; `aborting`, `concluded`, `null` of one that ends before",
    },
    Declared { name: "LUN_ADDED", data: &[has("device", Type::Str)], help: "a LUN serves" },
    Declared {
        name: "LUN_REMOVED",
        data: &[has("device", Type::Str)],
        help: "a LUN serves no more: it was removed, or the daemon stops",
    },
    Declared {
        name: "MIGRATION",
        data: &[may("device", Type::Str), has("status", Type::Enum(&MIGRATION_STATUS))],
        help: "as QEMU's, of one LUN that goes over (`migrate`) or comes (`migrate-incoming`); `device` is ours, and not known while a source is waited for. `failed` means of \
               one that goes that it is here as before, unless the command's error says otherwise, and of one that comes that nothing of it is here",
    },
    Declared {
        name: "PI_MISMATCH",
        data: &[
            has("device", Type::Str),
            has("operation", Type::Enum(&FOUND_BY)),
            has("lba", Type::Int),
            has("tag", Type::Str),
            has("expected", Type::Int),
            has("found", Type::Int),
            has("missed", Type::Int),
        ],
        help: "a block does not match its protection information: one that was read, that an initiator sent, or that a scrub looked at or \
               a mirror was to copy; `missed` as in `BLOCK_IO_ERROR`",
    },
    Declared {
        name: "SHUTDOWN",
        data: &[has("guest", Type::Bool), has("reason", Type::Enum(&CAUSE))],
        help: "the daemon begins to stop, once",
    },
];

#[derive(Debug, Default)]
struct Queues {
    next: u64,
    all: BTreeMap<u64, SyncSender<Arc<str>>>,
}

/// Where events are published.
#[derive(Debug, Clone, Default)]
pub(super) struct Bus(Arc<Mutex<Queues>>);

/// A client's queue.
pub(super) struct Subscription {
    id: u64,
    pub(super) queue: Receiver<Arc<str>>,
}

impl Subscription {
    /// For [`Bus::unsubscribe`].
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl Bus {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, every event goes into that queue.
    pub(super) fn subscribe(&self) -> Subscription {
        let (sender, queue) = sync_channel(QUEUE);
        let mut queues = self.queues();
        queues.next += 1;
        let id = queues.next;
        queues.all.insert(id, sender);
        Subscription { id, queue }
    }

    /// No more events for that one: its queue ends.
    pub(super) fn unsubscribe(&self, id: u64) {
        self.queues().all.remove(&id);
    }

    /// Tells every client. Never waits.
    pub(super) fn publish(&self, name: &str, data: Value) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
        let line = format!("{}\r\n", json!({ "event": name, "data": data, "timestamp": timestamp }));
        let line: Arc<str> = line.into();
        self.queues().all.retain(|_, queue| match queue.try_send(line.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                tracing::debug!("qmp: a client that does not read has lost an event");
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        });
    }

    /// No more events: the queues end after what stands in them.
    pub(super) fn close(&self) {
        self.queues().all.clear();
    }

    /// Publishes what happens to a LUN.
    pub(super) fn watcher(&self, device: &str) -> Watcher {
        let (bus, device) = (self.clone(), device.to_owned());
        Watcher::new(move |event| bus.happened(&device, event))
    }

    fn happened(&self, device: &str, event: Event) {
        match event {
            Event::IoError { op, no_space, at, reason, missed } => {
                let mut data = json!({
                    "device": device, "node-name": device, "action": "report", "nospace": no_space,
                    "operation": if op == IoOp::Read { "read" } else { "write" },
                    "reason": reason, "missed": missed,
                });
                if let Some(at) = at {
                    data["offset"] = at.into();
                }
                self.publish("BLOCK_IO_ERROR", data);
            }
            Event::PiMismatch { lba, tag, expected, found, by, missed } => {
                let data = json!({
                    "device": device, "operation": by, "lba": lba, "tag": tag, "expected": expected,
                    "found": found, "missed": missed,
                });
                self.publish("PI_MISMATCH", data);
            }
            Event::Scrub(status) => {
                self.publish("JOB_STATUS_CHANGE", json!({ "id": job_id(device), "status": status }));
            }
            Event::Job { id, status } => {
                self.publish("JOB_STATUS_CHANGE", json!({ "id": id, "status": status }));
            }
            Event::BlockJob { id, task, what, progress: (offset, len, speed) } => {
                let mut data = json!({
                    "type": task.word(), "device": id, "len": len, "offset": offset, "speed": speed,
                });
                let name = match what {
                    BlockJob::Ready => "BLOCK_JOB_READY",
                    BlockJob::Cancelled => "BLOCK_JOB_CANCELLED",
                    BlockJob::Completed(error) => {
                        if let Some(error) = error {
                            data["error"] = error.into();
                        }
                        "BLOCK_JOB_COMPLETED"
                    }
                };
                self.publish(name, data);
            }
            Event::BlockJobError { id, read, action, reason } => {
                let operation = if read { "read" } else { "write" };
                let data = json!({
                    "device": id, "operation": operation, "action": action, "reason": reason,
                });
                self.publish("BLOCK_JOB_ERROR", data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_does_not_read_loses_events_and_holds_up_nobody() {
        let bus = Bus::default();
        let (staller, reader) = (bus.subscribe(), bus.subscribe());
        for _ in 0..QUEUE * 3 {
            bus.publish("LUN_ADDED", json!({ "device": "a" }));
            let line = reader.queue.recv().unwrap();
            assert!(line.contains("\"microseconds\"") && line.ends_with("\r\n"), "{line}");
        }
        bus.close();
        assert_eq!(staller.queue.iter().count(), QUEUE);
    }
}
