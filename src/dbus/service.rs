//! The object that targetcli talks to: interface `org.kernel.TCMUService1`, as tcmu-runner's own handlers offer it.
//!
//! Only root's questions are looked at: to answer one an image is opened and locked.

use std::sync::Arc;

use zbus::{Connection, fdo, interface, message::Header, names::BusName};

/// Looks at a configuration string, subtype included. The error is for a person, in one line.
pub type Check = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// The subtype, as an object.
pub(super) struct Handler {
    pub(super) description: String,
    pub(super) check: Check,
}

/// What targetcli shows where the answer is a number of an error; it compares with 0 alone.
const NOT_SUPPORTED: i32 = -libc::EOPNOTSUPP;

#[interface(name = "org.kernel.TCMUService1")]
impl Handler {
    /// What a configuration string may hold, in words.
    #[zbus(property(emits_changed_signal = "const"), name = "ConfigDesc")]
    fn config_desc(&self) -> String {
        self.description.clone()
    }

    /// Whether a device could be made of the string (it begins with `dif/`), and why not.
    #[zbus(name = "CheckConfig")]
    async fn check_config(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
        cfgstring: &str,
    ) -> fdo::Result<(bool, String)> {
        if !is_root(connection, &header).await? {
            return Err(fdo::Error::AccessDenied("only root may ask what an image is like".to_owned()));
        }
        match (self.check)(cfgstring) {
            Ok(()) => Ok((true, "success".to_owned())),
            Err(why) => {
                tracing::warn!(cfgstring, "refused over D-Bus: {why}");
                Ok((false, why))
            }
        }
    }

    /// Another image for a device: refused, since initiators would read one disk's blocks as another's.
    #[zbus(name = "ChangeMedium")]
    fn change_medium(&self, name: &str, size: u64, cfgstring: &str) -> (i32, String) {
        let why = "the image of a LUN is not changed while it is up; next: delete the LUN, and create it of the other image";
        tracing::warn!(lun = name, size, cfgstring, "ChangeMedium refused over D-Bus");
        (NOT_SUPPORTED, why.to_owned())
    }
}

async fn is_root(connection: &Connection, header: &Header<'_>) -> fdo::Result<bool> {
    let sender =
        header.sender().ok_or_else(|| fdo::Error::AccessDenied("a call without a sender".to_owned()))?;
    let bus = fdo::DBusProxy::new(connection).await?;
    Ok(bus.get_connection_unix_user(BusName::Unique(sender.as_ref())).await? == 0)
}
