//! Messages as the kernel's `genlmsg_put` and `nla_put` lay them out, byte for byte.

use super::*;

const FAMILY_ID: u16 = 0x23;

fn nla(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(((payload.len() + 4) as u16).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(payload);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn message(kind: u16, cmd: u8, attrs: &[Vec<u8>]) -> Vec<u8> {
    let attrs = attrs.concat();
    let mut out = Vec::new();
    out.extend(((16 + 4 + attrs.len()) as u32).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(0u16.to_ne_bytes());
    out.extend([0; 8]);
    out.extend([cmd, 2, 0, 0]);
    out.extend(attrs);
    out
}

fn device(name: &str) -> Vec<Vec<u8>> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    vec![nla(1, &text), nla(2, &3u32.to_ne_bytes()), nla(8, &77u32.to_ne_bytes())]
}

fn one(bytes: &[u8]) -> Event {
    let mut events = parse(bytes, FAMILY_ID).unwrap();
    assert_eq!(events.len(), 1);
    events.remove(0)
}

#[test]
fn an_added_device_is_read_with_its_name_and_numbers() {
    let event = one(&message(FAMILY_ID, 1, &device("tcm-user/0/vm1/dif//images/vm1.qcow2;pi=type1")));
    assert_eq!((event.kind, event.minor, event.device_id, event.change), (Kind::Added, 3, 77, None));
    let name = event.device.unwrap();
    assert_eq!((name.hba, name.name.as_str(), name.subtype.as_str()), (0, "vm1", "dif"));
    assert_eq!(name.config, "/images/vm1.qcow2;pi=type1");
}

#[test]
fn a_reconfiguration_says_what_changes() {
    let with = |attr| [device("tcm-user/0/vm1/dif//a"), vec![attr]].concat();
    for (attr, change) in [
        (nla(5, &(1u64 << 40).to_ne_bytes()), Change::Size(1 << 40)),
        (nla(6, &[1]), Change::WriteCache(true)),
        (nla(6, &[0]), Change::WriteCache(false)),
        (nla(4, b"dif//b\0"), Change::Config("dif//b".into())),
        (nla(3, &[]), Change::Unknown),
    ] {
        assert_eq!(one(&message(FAMILY_ID, 3, &with(attr))).change, Some(change));
    }
}

#[test]
fn the_64_bit_size_is_found_behind_its_padding() {
    let attrs = [device("tcm-user/0/vm1/dif//a"), vec![nla(3, &[]), nla(5, &4096u64.to_ne_bytes())]].concat();
    assert_eq!(one(&message(FAMILY_ID, 3, &attrs)).change, Some(Change::Size(4096)));
}

#[test]
fn several_messages_in_one_receive_keep_their_order() {
    let bytes: Vec<u8> =
        [1u8, 2].iter().flat_map(|cmd| message(FAMILY_ID, *cmd, &device("tcm-user/0/a/dif//a"))).collect();
    let kinds: Vec<_> = parse(&bytes, FAMILY_ID).unwrap().iter().map(|e| e.kind).collect();
    assert_eq!(kinds, [Kind::Added, Kind::Removed]);
}

#[test]
fn other_families_and_commands_are_left_out() {
    assert_eq!(parse(&message(0x99, 1, &device("tcm-user/0/a/dif//a")), FAMILY_ID).unwrap(), []);
    assert_eq!(parse(&message(FAMILY_ID, 7, &[]), FAMILY_ID).unwrap(), []);
}

#[test]
fn an_event_without_its_device_id_is_an_error_and_not_an_answer_to_device_0() {
    let attrs = &device("tcm-user/0/a/dif//a")[..2];
    assert!(matches!(parse(&message(FAMILY_ID, 1, attrs), FAMILY_ID), Err(NetlinkError::Protocol(_))));
}

#[test]
fn cut_off_messages_are_errors_or_nothing_and_never_panic() {
    let whole = message(FAMILY_ID, 1, &device("tcm-user/0/vm1/dif//images/vm1.qcow2"));
    for len in 0..whole.len() {
        if let Ok(events) = parse(&whole[..len], FAMILY_ID) {
            assert_eq!(events, [], "{len}");
        }
        // Lengths that promise more than there is.
        for at in [0, 20] {
            let mut bad = whole[..len].to_vec();
            if let Some(b) = bad.get_mut(at) {
                *b = 255;
            }
            let _ = parse(&bad, FAMILY_ID);
        }
    }
}

#[test]
fn a_name_that_is_not_target_core_users_is_nobodys_device() {
    for name in ["", "uio_pci_generic", "tcm-user/x/a/dif/b", "tcm-user/0/a"] {
        assert_eq!(one(&message(FAMILY_ID, 1, &device(name))).device, None, "{name}");
    }
}

#[test]
fn an_answer_has_status_and_device_in_the_kernels_layout() {
    let attrs = vec![attr(Attr::CmdStatus, -22i32).unwrap(), attr(Attr::DeviceId, 77u32).unwrap()];
    let message = request(FAMILY_ID, 5, Command::AddedDone, attrs).unwrap();
    let mut out = Cursor::new(Vec::new());
    neli::ToBytes::to_bytes(&message, &mut out).unwrap();
    let mut expected = Vec::new();
    expected.extend(36u32.to_ne_bytes());
    expected.extend(FAMILY_ID.to_ne_bytes());
    expected.extend(5u16.to_ne_bytes()); // NLM_F_REQUEST | NLM_F_ACK
    expected.extend(5u32.to_ne_bytes());
    expected.extend(0u32.to_ne_bytes());
    expected.extend([4, 2, 0, 0]);
    expected.extend(nla(7, &(-22i32).to_ne_bytes()));
    expected.extend(nla(8, &77u32.to_ne_bytes()));
    assert_eq!(out.into_inner(), expected);
}

#[derive(Default)]
struct Log(Mutex<Vec<(Kind, u32, i32)>>);

impl Answers for Log {
    fn done(&self, kind: Kind, device_id: u32, status: i32) -> Result<(), NetlinkError> {
        self.0.lock().unwrap().push((kind, device_id, status));
        Ok(())
    }
}

#[test]
fn an_event_is_answered_once_and_with_an_error_when_forgotten() {
    let log = Arc::new(Log::default());
    let pending = Pending::new(log.clone(), Kind::Added, 1);
    let other = pending.clone();
    pending.answer(0);
    other.answer(-5);
    drop((pending, other));
    drop(Pending::new(log.clone(), Kind::Removed, 2));
    assert_eq!(*log.0.lock().unwrap(), [(Kind::Added, 1, 0), (Kind::Removed, 2, -libc::EIO)]);
}

#[test]
fn those_who_hear_the_group_are_counted_by_its_bit() {
    let table = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
        0000000000000000 0   4100       00000551 0        0        0     2        0        1\n\
        0000000000000000 16  4195       00000010 0        0        0     2        0        2\n\
        0000000000000000 16  812        00000030 0        0        0     2        0        3\n\
        0000000000000000 16  0          00000000 0        0        0     2        0        4\n";
    assert_eq!(listeners_in(table, 5), Some(2));
    assert_eq!(listeners_in(table, 6), Some(1));
    assert_eq!(listeners_in(table, 1), Some(0), "routing's sockets are of another protocol");
    assert_eq!(listeners_in(table, 33), None, "the table has no room for it");
    assert_eq!(listeners_in(table, 0), None);
}
