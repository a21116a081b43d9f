//! `org.kernel.TCMUService1` on the system bus, through which an unmodified targetcli finds `user:dif` and asks whether a configuration string will do.
//!
//! A thread of its own, which the data path knows nothing of. It owns the name where nobody does. Where tcmu-runner has it, it registers with tcmu-runner's
//! HandlerManager1, which then offers our subtype beside its own and passes questions on; and where tcmu-runner comes second and waits for the
//! name, it gets it. A bus that is not there, or goes, or a name that cannot be had, is logged once with what to do, and tried again for as long as the
//! daemon runs. Called by the command line, which gives it what to ask.

mod service;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Thread},
    time::Duration,
};

use zbus::{
    Connection, ObjectPath,
    connection::Builder,
    fdo::{DBusProxy, ObjectManager, RequestNameFlags, RequestNameReply},
    names::{BusName, OwnedUniqueName, WellKnownName},
};

pub use service::Check;
use service::Handler;

/// The name that targetcli calls.
const SERVICE: &str = "org.kernel.TCMUService1";
/// Its ObjectManager; the subtypes are below.
const ROOT: &str = "/org/kernel/TCMUService1";
/// Where tcmu-runner takes registrations, and asks those who have registered.
const MANAGER: &str = "/org/kernel/TCMUService1/HandlerManager1";
const MANAGER_INTERFACE: &str = "org.kernel.TCMUService1.HandlerManager1";

/// How often it looks who has the name: the bus does not tell its owner of those who wait for it.
const LOOK: Duration = Duration::from_secs(2);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(25);

/// What is offered on the bus.
#[derive(Clone)]
pub struct Offer {
    /// The subtype: `dif`.
    pub subtype: String,
    /// What its configuration strings may hold, for people.
    pub description: String,
    /// Looks at one.
    pub check: Check,
    /// The bus's address; the system's, if there is none.
    pub address: Option<String>,
}

/// The service, while it is kept.
pub struct Service {
    stop: Arc<AtomicBool>,
    thread: Option<Thread>,
}

impl Service {
    /// Begins in a thread of its own. That there is none is logged, and no failure: LUNs are served all the same.
    pub fn begin(offer: Offer) -> Service {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::Builder::new().name("dbus".into()).spawn(move || run(&offer, &told));
        if let Err(e) = &thread {
            tracing::warn!(
                "no thread for D-Bus, and so nothing for targetcli: {e}; next: restart the daemon"
            );
        }
        Service { stop, thread: thread.ok().map(|t| t.thread().clone()) }
    }
}

impl Drop for Service {
    /// Asks it to end, and does not wait: the bus may hang, and what it knows of us goes with the connection.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.unpark();
        }
    }
}

/// How we stand on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// Nobody can call us yet.
    Nowhere,
    /// We have the name.
    Owner,
    /// This one has it, and passes questions on.
    Registered(OwnedUniqueName),
}

fn run(offer: &Offer, stop: &AtomicBool) {
    let mut said = String::new();
    let mut bus: Option<Bus> = None;
    while !stop.load(Ordering::Acquire) {
        let turned = zbus::block_on(async {
            if bus.as_ref().is_none_or(|b| b.connection.is_closed()) {
                bus = None;
                bus = Some(Bus::connect(offer).await?);
            }
            match &mut bus {
                Some(bus) => bus.turn(offer).await,
                None => Ok(()),
            }
        });
        match turned {
            Ok(()) => said.clear(),
            Err(Trouble { why, next }) => {
                if said != why {
                    tracing::warn!("targetcli cannot see user:{}: {why}; next: {next}", offer.subtype);
                    said = why;
                }
                // A connection on which something failed may hold half of what it should.
                bus = None;
            }
        }
        thread::park_timeout(LOOK);
    }
}

/// What keeps targetcli from seeing us.
struct Trouble {
    why: String,
    next: &'static str,
}

impl Trouble {
    fn new(what: &str, e: impl std::fmt::Display, next: &'static str) -> Trouble {
        Trouble { why: format!("{what}: {e}"), next }
    }
}

const NEXT_BUS: &str = "start the system bus (package dbus); it is tried again";
const NEXT_POLICY: &str = "let root own the name: install tcmu-dif's D-Bus policy (dist/dbus/) into /usr/share/dbus-1/system.d, and reload the bus; it is tried again";
const NEXT_OWNER: &str = "see who has the name: busctl status org.kernel.TCMUService1; it is tried again";

/// A connection and what we are on it.
struct Bus {
    connection: Connection,
    dbus: DBusProxy<'static>,
    standing: Standing,
}

impl Bus {
    async fn connect(offer: &Offer) -> Result<Bus, Trouble> {
        let builder = match &offer.address {
            Some(address) => Builder::address(address.as_str()),
            None => Builder::system(),
        };
        let failed = |e: zbus::Error| Trouble::new("the system bus cannot be reached", e, NEXT_BUS);
        let connection = builder.method_timeout(PATIENCE).build().await.map_err(failed)?;
        let dbus = DBusProxy::new(&connection).await.map_err(failed)?;
        Ok(Bus { connection, dbus, standing: Standing::Nowhere })
    }

    /// Looks how things are, and puts them right.
    async fn turn(&mut self, offer: &Offer) -> Result<(), Trouble> {
        match &self.standing {
            Standing::Nowhere => {}
            Standing::Owner => {
                if !self.others_wait().await? {
                    return Ok(());
                }
                self.dbus.release_name(service()).await.map_err(lost)?;
                self.leave(offer).await?;
                tracing::info!("another service waits for {SERVICE} on D-Bus, and gets it");
            }
            Standing::Registered(with) => {
                let owner = self.dbus.get_name_owner(BusName::WellKnown(service())).await.ok();
                if owner.as_ref() == Some(with) {
                    return Ok(());
                }
                self.leave(offer).await?;
            }
        }
        self.appear(offer).await
    }

    /// Takes the name, or registers with the one who has it.
    async fn appear(&mut self, offer: &Offer) -> Result<(), Trouble> {
        // The objects first: whoever sees the name sees them.
        self.export(&child(ROOT, offer), offer, true).await?;
        let flags = RequestNameFlags::DO_NOT_QUEUE;
        let reply = self.dbus.request_name(service(), flags).await;
        let reply =
            reply.map_err(|e| Trouble::new("the name on D-Bus is not ours to own", e, NEXT_POLICY))?;
        if matches!(reply, RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner) {
            if self.standing != Standing::Owner {
                tracing::info!("targetcli sees user:{} ({SERVICE} on D-Bus)", offer.subtype);
            }
            self.standing = Standing::Owner;
            return Ok(());
        }
        self.leave(offer).await?;
        self.register(offer).await
    }

    /// Registers with the owner of the name.
    async fn register(&mut self, offer: &Offer) -> Result<(), Trouble> {
        let next = NEXT_OWNER;
        let failed = |e: zbus::Error| Trouble::new("the name's owner takes no registration", e, next);
        let owner = self.dbus.get_name_owner(BusName::WellKnown(service())).await;
        let owner = owner.map_err(|e| Trouble::new("the name's owner is gone again", e, next))?;
        self.export(&child(MANAGER, offer), offer, false).await?;
        let name = format!("{SERVICE}.HandlerManager1.{}", offer.subtype);
        let ours = WellKnownName::try_from(name).map_err(|e| Trouble::new("no name for D-Bus", e, next))?;
        let reply = self.dbus.request_name(ours, RequestNameFlags::DO_NOT_QUEUE).await;
        match reply.map_err(|e| Trouble::new("the name of our handler is not ours to own", e, NEXT_POLICY))? {
            RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner => {}
            _ => return Err(Trouble::new("our handler's name", "another daemon has it", next)),
        }
        let words = (offer.subtype.as_str(), offer.description.as_str());
        let answer = self
            .connection
            .call_method(Some(owner.as_ref()), MANAGER, Some(MANAGER_INTERFACE), "RegisterHandler", &words)
            .await
            .map_err(failed)?;
        let (done, why): (bool, String) = answer.body().deserialize().map_err(failed)?;
        if !done {
            return Err(Trouble::new("the name's owner refuses the registration", why, next));
        }
        tracing::info!(owner = %owner, "targetcli sees user:{} (registered with the owner of {SERVICE})", offer.subtype);
        self.standing = Standing::Registered(owner);
        Ok(())
    }

    /// Whether somebody else waits for the name that we have.
    async fn others_wait(&self) -> Result<bool, Trouble> {
        let waiting = self.dbus.list_queued_owners(service()).await.map_err(lost)?;
        Ok(waiting.iter().any(|w| Some(w) != self.connection.unique_name()))
    }

    async fn export(&self, path: &ObjectPath<'_>, offer: &Offer, managed: bool) -> Result<(), Trouble> {
        let failed = |e| Trouble::new("the object on D-Bus", e, "restart the daemon");
        let server = self.connection.object_server();
        if managed {
            server.at(ROOT, ObjectManager).await.map_err(failed)?;
        }
        let handler = Handler { description: offer.description.clone(), check: offer.check.clone() };
        server.at(path, handler).await.map_err(failed)?;
        Ok(())
    }

    /// Takes back what was offered. What was not there is no failure.
    async fn leave(&mut self, offer: &Offer) -> Result<(), Trouble> {
        let server = self.connection.object_server();
        for path in [child(ROOT, offer), child(MANAGER, offer)] {
            let _ = server.remove::<Handler, _>(&path).await;
        }
        let _ = server.remove::<ObjectManager, _>(ROOT).await;
        self.standing = Standing::Nowhere;
        Ok(())
    }
}

fn lost(e: zbus::fdo::Error) -> Trouble {
    Trouble::new("the system bus is gone", e, NEXT_BUS)
}

fn service() -> WellKnownName<'static> {
    WellKnownName::from_static_str_unchecked(SERVICE)
}

fn child(parent: &str, offer: &Offer) -> ObjectPath<'static> {
    ObjectPath::from_string_unchecked(format!("{parent}/{}", offer.subtype))
}
