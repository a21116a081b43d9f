//! The ring against the embedded kernel: what the ABI promises, and what must not be believed.

use super::*;
use crate::{
    peer::kernel::{Data, Kernel, Options},
    sys::pool::Pooled,
};

fn pair(options: Options) -> (Kernel, Ring) {
    let kernel = Kernel::new(options).unwrap();
    let ring = Ring::attach(kernel.device().unwrap()).unwrap();
    (kernel, ring)
}

fn small() -> Options {
    Options { cmdr_size: 1024, data_size: 64 << 10, ..Options::default() }
}

fn take(ring: &mut Ring) -> (Pooled<Command>, Reply) {
    match ring.take_entry().unwrap() {
        Some((Entry::Command(command), Some(reply))) => (command, reply),
        other => panic!("{:?}", other.map(|(e, _)| e)),
    }
}

const TUR: [u8; 6] = [0; 6];
const WRITE10: [u8; 10] = [0x2a, 0, 0, 0, 0, 1, 0, 0, 9, 0];
const READ10: [u8; 10] = [0x28, 0, 0, 0, 0, 1, 0, 0, 9, 0];

#[test]
fn a_command_arrives_with_its_cdb_and_data_and_its_answer_goes_back() {
    for cut in [None, Some(7), Some(99)] {
        let (mut kernel, mut ring) = pair(Options { cut, ..Options::default() });
        let bytes: Vec<u8> = (0..9 * 512).map(|i| i as u8).collect();
        let id = kernel.submit(&WRITE10, Data::Out(&bytes)).unwrap();
        let (command, reply) = take(&mut ring);
        assert_eq!((command.id, &command.cdb[..], command.data.to_vec()), (id, &WRITE10[..], bytes.clone()));
        reply.answer(Completion::status(0));
        assert_eq!(kernel.ended().unwrap(), []);
        assert_eq!(ring.publish().unwrap(), 1);
        assert_eq!(kernel.ended().unwrap()[0].status, 0);

        let id = kernel.submit(&READ10, Data::In(9 * 512)).unwrap();
        let (command, reply) = take(&mut ring);
        command.data.copy_in(0, &bytes);
        reply.answer(Completion::status(0));
        ring.publish().unwrap();
        let ended = kernel.ended().unwrap().remove(0);
        assert_eq!((ended.id, ended.data), (id, bytes));
    }
}

#[test]
fn both_directions_of_a_bidirectional_command_are_kept_apart() {
    let (mut kernel, mut ring) = pair(Options::default());
    kernel.submit(&TUR, Data::Bidi(&[5; 700], 300)).unwrap();
    let (command, reply) = take(&mut ring);
    assert_eq!((command.data.to_vec(), command.bidi.len()), (vec![5; 700], 300));
    command.bidi.fill(0, 300, 9);
    reply.answer(Completion::status(0));
    ring.publish().unwrap();
    assert_eq!(kernel.ended().unwrap()[0].data, [9; 300]);
}

/// What the patched kernel sets.
const WITH_DIF: u16 = 0xf | tcmu_sys::TCMU_MAILBOX_FLAG_CAP_DIF as u16;

#[test]
fn protection_information_travels_beside_the_data_in_both_directions() {
    for cut in [None, Some(3), Some(12345)] {
        let (mut kernel, mut ring) = pair(Options { cut, flags: WITH_DIF, ..Options::default() });
        assert!(ring.capabilities().dif);
        let data: Vec<u8> = (0..9000 * 8).map(|i| (i * 7) as u8).collect();
        let dif: Vec<u8> = (0..9000).map(|i| (i * 13) as u8).collect();
        kernel.submit(&WRITE10, Data::OutDif(&data, &dif)).unwrap();
        let (command, reply) = take(&mut ring);
        assert_eq!(
            (command.data.to_vec(), command.dif.to_vec(), command.bidi.len()),
            (data.clone(), dif.clone(), 0)
        );
        reply.answer(Completion::status(0));
        ring.publish().unwrap();
        assert!(kernel.ended().unwrap()[0].dif.is_empty());

        kernel.submit(&READ10, Data::InDif(data.len(), dif.len())).unwrap();
        let (command, reply) = take(&mut ring);
        assert_eq!((command.data.len(), command.dif.len()), (data.len(), dif.len()));
        command.data.copy_in(0, &data);
        command.dif.copy_in(0, &dif);
        reply.answer(Completion::status(0));
        ring.publish().unwrap();
        let ended = kernel.ended().unwrap().remove(0);
        assert_eq!((ended.data, ended.dif), (data, dif));

        kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
        let (command, reply) = take(&mut ring);
        assert!(command.dif.is_empty(), "a command without protection information has none");
        reply.answer(Completion::status(0));
    }
}

#[test]
fn whether_protection_information_is_delivered_is_known_before_a_ring_is_attached() {
    for (flags, expected) in [(WITH_DIF, true), (0xf, false), (0x10, true), (0xffef, false)] {
        let kernel = Kernel::new(Options { flags, ..small() }).unwrap();
        assert_eq!(kernel.device().unwrap().carries_dif().unwrap(), expected, "{flags:#x}");
    }
}

#[test]
fn answers_out_of_order_reach_their_own_commands_around_the_ring_with_one_kick_a_batch() {
    let (mut kernel, mut ring) = pair(small());
    let mut random = 88172645463325252u64;
    let mut open: Vec<Reply> = Vec::new();
    let (mut sent, mut done) = (0u32, 0u32);
    kernel.kicks();
    while done < 5000 {
        while sent - done < 6 {
            // Lengths differ, so that pads of every size come up.
            let data = vec![0u8; (random % 5) as usize * 4096];
            match kernel.queue(&WRITE10, Data::Out(&data)) {
                Ok(_) => sent += 1,
                Err(_) => break,
            }
        }
        while let Some((_, reply)) = ring.take_entry().unwrap() {
            open.extend(reply);
        }
        let batch = (random >> 8) as usize % (open.len() + 1);
        for _ in 0..batch {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let reply = open.swap_remove((random >> 33) as usize % open.len());
            let status = reply.id() as u8 & 0xfe;
            reply.answer(Completion::status(status));
        }
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        assert_eq!(ring.publish().unwrap(), batch);
        assert!(kernel.kicks() <= 1);
        for ended in kernel.ended().unwrap() {
            assert_eq!(ended.status, ended.id as u8 & 0xfe);
            done += 1;
        }
    }
    assert_eq!(ring.unanswered(), open.len());
    ring.close();
}

#[test]
fn read_len_is_told_only_where_the_kernel_understands_it() {
    for (flags, expected) in [(0xf, 10), (0x1, 100)] {
        let (mut kernel, mut ring) = pair(Options { flags, ..small() });
        kernel.submit(&READ10, Data::In(100)).unwrap();
        let (_, reply) = take(&mut ring);
        reply.answer(Completion { read_len: Some(10), ..Completion::status(0) });
        ring.publish().unwrap();
        assert_eq!(kernel.ended().unwrap()[0].data.len(), expected);
    }
}

#[test]
fn sense_data_arrive_whole() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(&TUR, Data::None).unwrap();
    let (_, reply) = take(&mut ring);
    let sense: Vec<u8> = (1..=200).collect();
    reply.answer(Completion::check_condition(&sense));
    ring.publish().unwrap();
    let ended = kernel.ended().unwrap().remove(0);
    assert_eq!((ended.status, &ended.sense[..]), (2, &sense[..96]));
}

#[test]
fn task_management_is_announced_and_takes_no_answer() {
    let (mut kernel, mut ring) = pair(small());
    let id = kernel.submit(&TUR, Data::None).unwrap();
    kernel.submit_tmr(5, &[id, 77]).unwrap();
    let (_, reply) = take(&mut ring);
    match ring.take_entry().unwrap() {
        Some((Entry::Tmr(tmr), None)) => assert_eq!(tmr, Tmr { kind: 5, ids: vec![id, 77] }),
        other => panic!("{:?}", other.map(|(e, _)| e)),
    }
    reply.answer(Completion::status(0));
    ring.publish().unwrap();
    assert_eq!(kernel.ended().unwrap().len(), 1);
}

#[test]
fn an_unknown_operation_is_answered_as_such_and_the_next_command_is_served() {
    let (mut kernel, mut ring) = pair(small());
    let mut entry = vec![0u8; 16];
    entry[..4].copy_from_slice(&(16u32 | 5).to_le_bytes());
    entry[4..6].copy_from_slice(&4242u16.to_le_bytes());
    kernel.submit_raw(&entry, Some(4242)).unwrap();
    kernel.submit(&TUR, Data::None).unwrap();
    match ring.take_entry().unwrap() {
        Some((Entry::Unknown { id: 4242, op: 5 }, Some(reply))) => reply.answer(Completion::unknown_op()),
        other => panic!("{:?}", other.map(|(e, _)| e)),
    }
    take(&mut ring).1.answer(Completion::status(0));
    ring.publish().unwrap();
    let ended = kernel.ended().unwrap();
    assert_eq!((ended[0].unknown_op, ended[1].unknown_op, ended[1].status), (true, false, 0));
}

#[test]
fn a_handler_that_goes_and_comes_finds_what_is_unanswered() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(&TUR, Data::None).unwrap();
    let second = kernel.submit(&TUR, Data::None).unwrap();
    take(&mut ring).1.answer(Completion::status(0));
    ring.publish().unwrap();
    assert!(!kernel.device().unwrap().is_resumable().unwrap());
    drop(ring);
    let mut ring = Ring::attach(kernel.device().unwrap()).unwrap();
    let (command, reply) = take(&mut ring);
    assert_eq!(command.id, second);
    reply.answer(Completion::status(0));
    ring.publish().unwrap();
    assert!(kernel.device().unwrap().is_resumable().unwrap());
}

#[test]
fn a_mailbox_that_is_none_of_ours_is_refused() {
    for (offset, bytes, says) in [
        (0u64, vec![1u8, 0], "mailbox version 1"),
        (4, vec![4, 0, 0, 0], "cmdr_off is 4"),
        (8, vec![0, 0, 0, 0], "cmdr_size is 0"),
        (8, vec![0xf8, 0xff, 0xff, 0xff], "cmdr_size is 4294967288"),
        (64, vec![0, 0, 1, 0], "cmd_tail is 65536"),
        (64, vec![3, 0, 0, 0], "cmd_tail is 3"),
    ] {
        let mut kernel = Kernel::new(small()).unwrap();
        kernel.poke(offset, &bytes);
        let error = Ring::attach(kernel.device().unwrap()).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// A valid WRITE(10) entry of the small ring with one iovec, for breaking.
fn valid_entry() -> Vec<u8> {
    let mut bytes = vec![0u8; 128];
    bytes[..4].copy_from_slice(&(128u32 | 1).to_le_bytes());
    bytes[4] = 1;
    bytes[8] = 1;
    bytes[24..32].copy_from_slice(&(128u64 + 112).to_le_bytes());
    bytes[48..56].copy_from_slice(&(128u64 + 1024).to_le_bytes());
    bytes[56..64].copy_from_slice(&512u64.to_le_bytes());
    bytes[112..122].copy_from_slice(&WRITE10);
    bytes
}

#[test]
fn entries_that_make_no_sense_are_errors_and_never_more() {
    let cases: &[(&str, usize, &[u8], &str)] = &[
        ("length 0", 0, &[1, 0, 0, 0], "its length is 0"),
        ("length beyond the head", 0, &[0x01, 0x10, 0, 0], "its length is 4096"),
        ("too short for an answer", 0, &[64 | 1, 0, 0, 0], "a command's length is 64"),
        ("too many iovecs", 8, &[0xff, 0xff, 0xff, 0xff], "the number of iovecs is 4294967295"),
        ("six iovecs", 12, &[5], "the number of iovecs is 6"),
        ("bidi and dif count too", 16, &[9, 0, 0, 0], "the number of iovecs is 10"),
        ("CDB in the data area", 24, &[0, 8], "the CDB lies outside its entry"),
        ("CDB before its entry", 24, &[0, 0], "the CDB lies outside its entry"),
        ("CDB that ends outside", 24, &[255, 0], "the CDB lies outside its entry"),
        ("variable CDB that ends outside", 112, &[0x7f, 0, 0, 0, 0, 0, 0, 0xff], "the CDB lies outside"),
        ("iovec in the mailbox", 48, &[0, 0], "an iovec lies before the data area"),
        ("iovec in the ring", 48, &[128, 0], "an iovec lies before the data area"),
        ("iovec past the end", 48, &[0, 0, 1, 0, 1], "an iovec leaves the region"),
        ("iovec that wraps", 56, &[0xff; 8], "an iovec leaves the region"),
    ];
    for (name, at, bytes, says) in cases {
        let (mut kernel, mut ring) = pair(small());
        let mut entry = valid_entry();
        entry[*at..*at + bytes.len()].copy_from_slice(bytes);
        kernel.submit_raw(&entry, None).unwrap();
        let error = ring.take_entry().map(|_| ()).expect_err(name);
        assert!(error.to_string().contains(says), "{name}: {error}");
    }
    let (mut kernel, mut ring) = pair(small());
    kernel.submit_raw(&valid_entry(), None).unwrap();
    let (_, _reply) = take(&mut ring);
    ring.close();
}

#[test]
fn iovecs_of_protection_information_are_believed_no_more_than_those_of_data() {
    let base = 128u64 + 1024;
    for (count, iovec, says) in [
        (1u32, (base, 64u64), Ok(64)),
        (1, (base + (64 << 10) - 8, 8), Ok(8)),
        (1, (base + (64 << 10) - 8, 16), Err("an iovec leaves the region")),
        (1, (0, 64), Err("an iovec lies before the data area")),
        (1, (128, 64), Err("an iovec lies before the data area")),
        (1, (base - 8, 64), Err("an iovec lies before the data area")),
        (1, (u64::MAX - 7, 8), Err("an iovec leaves the region")),
        (1, (base, u64::MAX), Err("an iovec leaves the region")),
        (5, (base, 64), Err("the number of iovecs is 6")),
        (u32::MAX, (base, 64), Err("the number of iovecs is 4294967296")),
    ] {
        let (mut kernel, mut ring) = pair(Options { flags: WITH_DIF, ..small() });
        let mut entry = valid_entry();
        entry[16..20].copy_from_slice(&count.to_le_bytes());
        entry[64..72].copy_from_slice(&iovec.0.to_le_bytes());
        entry[72..80].copy_from_slice(&iovec.1.to_le_bytes());
        kernel.submit_raw(&entry, None).unwrap();
        match (ring.take_entry(), says) {
            (Ok(Some((Entry::Command(command), _reply))), Ok(len)) => {
                assert_eq!((command.data.len(), command.dif.len()), (512, len));
                ring.close();
            }
            (Err(error), Err(says)) => assert!(error.to_string().contains(says), "{iovec:?}: {error}"),
            (other, _) => panic!("{count} of {iovec:?}: {:?}", other.map(|e| e.map(|(e, _)| e))),
        }
    }
}

#[test]
fn a_head_outside_the_ring_is_an_error() {
    for head in [1024u32, 4, u32::MAX] {
        let (mut kernel, mut ring) = pair(small());
        kernel.poke(12, &head.to_le_bytes());
        assert!(ring.has_entries());
        let error = ring.take_entry().map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(&format!("cmd_head is {head}")), "{error}");
    }
}

#[test]
fn a_task_management_entry_with_more_ids_than_bytes_is_an_error() {
    let (mut kernel, mut ring) = pair(small());
    let mut entry = vec![0u8; 40];
    entry[..4].copy_from_slice(&(40u32 | 2).to_le_bytes());
    entry[12] = 5;
    kernel.submit_raw(&entry, None).unwrap();
    assert!(ring.take_entry().map(|_| ()).unwrap_err().to_string().contains("aborted commands is 5"));
}

proptest::proptest! {
    /// Whatever stands in the ring: an error, or a command inside its entry. Never a panic, a hang or a byte outside.
    #[test]
    fn rubbish_in_an_entry_never_panics(changes in proptest::collection::vec((0usize..128, proptest::num::u8::ANY), 1..12)) {
        let (mut kernel, mut ring) = pair(small());
        let mut entry = valid_entry();
        for (at, byte) in changes {
            entry[at] = byte;
        }
        kernel.submit_raw(&entry, None).unwrap();
        for _ in 0..64 {
            match ring.take_entry() {
                Ok(Some((entry, reply))) => {
                    if let Entry::Command(c) = entry {
                        c.data.fill(0, c.data.len(), 1);
                    }
                    if let Some(reply) = reply {
                        reply.answer(Completion::status(0));
                    }
                }
                Ok(None) | Err(_) => break,
            }
        }
        ring.publish().unwrap();
    }
}

#[test]
#[cfg(debug_assertions)]
fn a_command_dropped_without_an_answer_is_a_panic_in_tests() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(&TUR, Data::None).unwrap();
    let (_, reply) = take(&mut ring);
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(reply)));
    assert!(dropped.is_err());
    // The initiator is answered all the same.
    ring.publish().unwrap();
    assert_eq!(kernel.ended().unwrap()[0].key_asc_ascq(), (0x0b, 0, 0));
}
