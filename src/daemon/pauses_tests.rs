//! LUNs that are taken out of service and back, on the devices that only count.

use super::*;

#[test]
fn a_lun_that_is_paused_stays_down_until_it_is_resumed_or_its_device_goes() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("answer Added 100 0");
    let pausing = b.devices.registry.pausing("vm1").unwrap();
    pausing.pause().unwrap();
    assert_eq!(pausing.pause(), Err("the LUN is not up".to_owned()));
    b.devices.look(false).unwrap();
    assert_eq!(b.state("vm1").unwrap().reason.as_deref(), Some("it is being handed over"));
    pausing.resume().unwrap();
    pausing.resume().unwrap();
    assert_eq!(b.world.log()[2..], ["stopping vm1", "stopped vm1", "start vm1"]);
    assert_eq!(b.state("vm1").unwrap().state, Phase::Online);
    // It cannot be started any more: whoever resumes hears why, and the daemon tries again.
    pausing.pause().unwrap();
    b.world.fail_start.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        assert_eq!(pausing.resume(), Err("the image is in use".to_owned()));
    }
    b.world.fail_start.store(false, Ordering::Relaxed);
    b.devices.look(false).unwrap();
    b.wait_until("online", |b| b.state("vm1").is_some_and(|s| s.state == Phase::Online));
    pausing.pause().unwrap();
    b.unplug(0);
    b.devices.look(false).unwrap();
    b.wait_until("gone", |b| b.state("vm1").is_none());
    assert!(b.devices.registry.pausing("vm1").is_none());
    assert_eq!(pausing.resume(), Err("the device is being removed".to_owned()));
}
