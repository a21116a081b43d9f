//! Protection information that initiators see: what the disk says of itself, what it refuses and how, what FORMAT UNIT and
//! the mode pages change. The tables themselves are in `pi_model`.

use std::os::unix::fs::FileExt;

use tcmu_dif::{
    pi::{PiType, Transfer},
    scsi::opcodes::{Kind, TABLE},
    sys::{self, mem::Sg},
    units::BlockSize,
};

use super::{
    memory::{Answer, GOOD, INVALID_FIELD, INVALID_PARAMETER, UNKNOWN, be, cdb, scale},
    pi_bench::{BLOCKS, Dice, Pi, long, tuples_for},
};

const B: BlockSize = BlockSize::B512;

async fn refused(pi: &Pi, c: &[u8], data: &[u8], tuples: &[u8], sense: (u8, u8, u8)) -> Answer {
    let before = pi.medium(0, BLOCKS).await;
    let answer = pi.send(c, data, tuples).await;
    assert_eq!((answer.status, answer.sense), (2, sense), "{c:x?}");
    assert!(pi.medium(0, BLOCKS).await == before, "something was written by {c:x?}");
    answer
}

async fn capacity(pi: &Pi) -> u8 {
    let answer = pi.get(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32).await;
    assert_eq!(answer.sense, GOOD);
    answer.data[12]
}

#[test]
fn the_disk_says_what_it_is_formatted_with() {
    sys::run(async |io| {
        for (kind, byte) in [(PiType::Type1, 1), (PiType::Type2, 3), (PiType::Type3, 5)] {
            let pi = Pi::new(&io, kind, B, Transfer::Separate).await;
            assert_eq!(capacity(&pi).await, byte);
            let inquiry = pi.get(&[0x12, 0, 0, 0, 96, 0], 96).await;
            assert_eq!(inquiry.data[5] & 1, 1, "PROTECT");
            let extended = pi.get(&[0x12, 1, 0x86, 0, 64, 0], 64).await;
            assert_eq!(extended.data[4], 0x3f, "SPT = 111b, GRD_CHK, APP_CHK, REF_CHK");
        }
    });
}

#[test]
fn a_guard_error_names_the_block_in_both_formats_of_sense_data() {
    sys::run(async |io| {
        let pi = Pi::new(&io, PiType::Type1, B, Transfer::Interleaved).await;
        let data = vec![7; 4 * 512];
        let sent = tuples_for(&data, B, 0x1234, 40);
        assert_eq!(pi.send(&cdb(0x2a, 0x20, 40, 4), &data, &sent).await.sense, GOOD);
        let file = std::fs::File::options().write(true).open(pi.image()).unwrap();
        file.write_all_at(&[8], 42 * 512 + 100).unwrap();
        for (field, fails) in [(0, true), (1, true), (2, false), (3, false), (4, true), (5, true)] {
            let got = pi.receive(&cdb(0x28, field << 5, 40, 4), 4, field > 0).await;
            if fails {
                assert_eq!((got.answer.sense, got.answer.information), ((0xb, 0x10, 1), Some(42)), "{field}");
                let bytes = got.answer.response.sense_bytes();
                assert_eq!(
                    (bytes[0], &bytes[3..7], &bytes[12..14]),
                    (0xf0, &[0, 0, 0, 42][..], &[0x10, 1][..])
                );
            } else {
                assert_eq!((got.answer.sense, got.tuples), (GOOD, sent.clone()), "{field}");
            }
        }
        // D_SENSE = 1.
        let list = [&[0, 0, 0, 0, 0x0a, 10, 0x04, 0x10, 0, 0xc0][..], &[0; 6]].concat();
        assert_eq!(pi.plain(&[0x15, 0x10, 0, 0, 16, 0], &list).await.sense, GOOD);
        let got = pi.get(&cdb(0x28, 0, 40, 4), 2048).await;
        let bytes = got.response.sense_bytes();
        assert_eq!(bytes[..4], [0x72, 0xb, 0x10, 1]);
        assert_eq!((bytes[8], bytes[9], be(&bytes[12..20])), (0, 10, 42));
        assert_eq!(pi.volume.counters().guard_errors, 5);
    });
}

#[test]
fn a_bad_tuple_is_refused_with_its_block_and_nothing_is_written() {
    sys::run(async |io| {
        for transfer in [Transfer::Interleaved, Transfer::Separate] {
            let pi = Pi::new(&io, PiType::Type1, B, transfer).await;
            let data = vec![9; 8 * 512];
            let good = tuples_for(&data, B, 0, 16);
            for (byte, qualifier) in [(0, 1), (5, 3)] {
                let mut bad = good.clone();
                bad[6 * 8 + byte] ^= 1;
                let answer = refused(&pi, &cdb(0x8a, 0x20, 16, 8), &data, &bad, (0xb, 0x10, qualifier)).await;
                assert_eq!(answer.information, Some(22));
            }
            let seen = pi.target.pi_counters();
            assert_eq!((seen.guard_errors, seen.ref_errors, seen.verified), (1, 1, 0));
            assert_eq!(pi.send(&cdb(0x8a, 0x20, 16, 8), &data, &good).await.sense, GOOD);
            assert_eq!(pi.target.pi_counters().verified, 8);
            assert!(pi.medium(16, 8).await == (data, good));
        }
    });
}

#[test]
fn buffers_of_another_length_are_refused_and_so_is_a_kernel_that_lost_the_tuples() {
    sys::run(async |io| {
        let size = 512;
        let inter = Pi::new(&io, PiType::Type1, B, Transfer::Interleaved).await;
        for n in [0, 8, 512, 1024, 1039, 1041, 1560] {
            let answer = inter.plain(&cdb(0x2a, 0x20, 0, 2), &vec![0; n]).await;
            assert_eq!((answer.status, answer.sense), (2, INVALID_FIELD), "{n}");
            assert_eq!(inter.get(&cdb(0x28, 0x20, 0, 2), n).await.sense, INVALID_FIELD, "{n}");
        }
        let separate = Pi::new(&io, PiType::Type1, B, Transfer::Separate).await;
        for (data, dif) in [(2 * size, 0), (2 * size, 8), (2 * size, 24), (size, 16)] {
            let (data, dif) = (separate.scatter(&vec![0; data]), separate.scatter(&vec![0; dif]));
            for c in [cdb(0x2a, 0x20, 0, 2), cdb(0x28, 0x20, 0, 2)] {
                assert_eq!(separate.execute(&c, &data, &dif).await.sense, INVALID_FIELD, "{data:?} {dif:?}");
            }
        }
        assert_eq!(separate.medium(0, 2).await, (vec![0; 1024], vec![0xff; 16]));
        // A transport that separates is taken at its word, whatever the configuration says.
        let data = vec![1; 1024];
        let sent = tuples_for(&data, B, 0, 0);
        let (d, t) = (inter.scatter(&data), inter.scatter(&sent));
        assert_eq!(inter.execute(&cdb(0x2a, 0x20, 0, 2), &d, &t).await.sense, GOOD);
        assert_eq!(inter.medium(0, 2).await, (data, sent));
    });
}

async fn format(pi: &Pi, fmtpinfo: u8, usage: u8) -> Answer {
    pi.plain(&[0x04, fmtpinfo << 6 | 0x10, 0, 0, 0, 0], &[usage, 0, 0, 0]).await
}

#[test]
fn format_unit_changes_the_type_for_good_and_all_data_are_gone() {
    sys::run(async |io| {
        let mut pi = Pi::new(&io, PiType::Type1, B, Transfer::Interleaved).await;
        for (info, usage, byte) in [(3, 1, 5), (3, 0, 3), (0, 0, 0), (2, 0, 1), (3, 1, 5)] {
            assert_eq!(pi.plain(&cdb(0x2a, 0, 5, 1), &[3; 512]).await.sense, GOOD);
            assert_eq!(format(&pi, info, usage).await.sense, GOOD);
            assert_eq!(pi.attention().await, (6, 0x2a, 9), "the capacity data have changed");
            assert_eq!(capacity(&pi).await, byte);
            assert!(pi.medium(0, BLOCKS).await == (vec![0; 512 * 256], vec![0xff; 8 * 256]));
            assert_eq!(pi.plain(&cdb(0x2a, 0, 6, 1), &[4; 512]).await.sense, GOOD);
            pi = pi.reopen(PiType::Type1).await;
            assert_eq!(capacity(&pi).await, byte, "after a restart");
            assert_eq!(pi.get(&cdb(0x28, 0, 6, 1), 512).await.data, [4; 512]);
            let long_form = pi.get(&long(0x09, 0, 6, 1, (6, 0, 0)), 512).await;
            assert_eq!(long_form.sense, if byte == 3 { GOOD } else { UNKNOWN });
            let protected = pi.receive(&cdb(0x28, 0x20, 6, 1), 1, true).await.answer.sense;
            assert_eq!(protected, [INVALID_FIELD, GOOD, UNKNOWN, GOOD][usize::from(byte.div_ceil(2))]);
        }
    });
}

#[test]
fn format_unit_refuses_the_combinations_that_sbc_4_calls_illegal() {
    sys::run(async |io| {
        let pi = Pi::new(&io, PiType::Type1, B, Transfer::Interleaved).await;
        assert_eq!(pi.plain(&cdb(0x2a, 0, 5, 1), &[3; 512]).await.sense, GOOD);
        for info in 0..4 {
            for usage in 0..8 {
                let illegal = match (info, usage) {
                    (1, _) => INVALID_FIELD,
                    (0 | 2, 0) | (3, 0 | 1) => continue,
                    _ => INVALID_PARAMETER,
                };
                assert_eq!(format(&pi, info, usage).await.sense, illegal, "{info} {usage}");
            }
        }
        let exponent = [0x04, 0xb0, 0, 0, 0, 0];
        assert_eq!(pi.plain(&exponent, &[0, 0, 0, 1, 0, 0, 0, 0]).await.sense, INVALID_PARAMETER);
        assert_eq!(pi.medium(5, 1).await.0, [3; 512]);
    });
}

#[test]
fn without_data_and_after_unmap_blocks_have_the_escape() {
    sys::run(async |io| {
        for kind in [PiType::Type1, PiType::Type3] {
            let pi = Pi::new(&io, kind, BlockSize::B4096, Transfer::Separate).await;
            let got = pi.receive(&cdb(0x28, 0x20, 0, 4), 4, true).await;
            assert_eq!((got.answer.sense, got.tuples), (GOOD, vec![0xff; 32]));
            assert_eq!(pi.plain(&cdb(0x2a, 0, 0, 16), &vec![5; 16 * 4096]).await.sense, GOOD);
            // WRITE SAME with NDOB, then with UNMAP, leave none; UNMAP too.
            assert_eq!(pi.plain(&cdb(0x93, 0x01, 0, 2), &[]).await.sense, GOOD);
            assert_eq!(pi.plain(&cdb(0x93, 0x08, 2, 2), &[0; 4096]).await.sense, GOOD);
            let list =
                [&[0, 22, 0, 16, 0, 0, 0, 0][..], &4u64.to_be_bytes(), &[0, 0, 0, 8, 0, 0, 0, 0]].concat();
            assert_eq!(pi.plain(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list).await.sense, GOOD);
            let got = pi.receive(&cdb(0x28, 0x20, 0, 12), 12, true).await;
            assert!(got.data.iter().all(|b| *b == 0) && got.tuples == [0xff; 96]);
            // Zeros that were sent are data like any other.
            assert_eq!(pi.plain(&cdb(0x93, 0x00, 0, 2), &[0; 4096]).await.sense, GOOD);
            assert_ne!(pi.medium(0, 2).await.1, [0xff; 16]);
            // Nothing can be sent with no data-out buffer.
            assert_eq!(pi.plain(&cdb(0x93, 0x21, 0, 2), &[]).await.sense, INVALID_FIELD);
            let status = pi.get(&[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 24, 0, 0], 24).await;
            assert_eq!((status.sense, be(&status.data[8..16]), status.data[20]), (GOOD, 2, 1));
        }
    });
}

async fn control(pi: &Pi, byte_5: u8) {
    let list = [&[0, 0, 0, 0, 0x0a, 10, 0, 0x10, 0, byte_5][..], &[0; 6]].concat();
    assert_eq!(pi.plain(&[0x15, 0x10, 0, 0, 16, 0], &list).await.sense, GOOD);
}

#[test]
fn the_application_tag_page_says_what_tags_are_checked_against_and_what_ours_are() {
    sys::run(async |io| {
        let pi = Pi::new(&io, PiType::Type1, B, Transfer::Interleaved).await;
        // Blocks 0 to 99 have 1111h, the others 2222h.
        let mut page = vec![0x4a, 2, 0, 108, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (last, tag, first, blocks) in [(0, 0x11, 0u64, 100u64), (0x80, 0x22, 100, BLOCKS - 100)] {
            page.extend([last, 0, 0, 0, 0, 0, tag, tag]);
            page.extend(first.to_be_bytes());
            page.extend(blocks.to_be_bytes());
        }
        page.resize(112, 0);
        let list = [&[0, 0, 0, 0][..], &page].concat();
        assert_eq!(pi.plain(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list).await.sense, GOOD);
        let read = pi.get(&[0x1a, 0x08, 0x0a, 2, 255, 0], 255).await;
        assert_eq!(read.data[4..], page);

        let data = vec![6; 4 * 512];
        let wrong = tuples_for(&data, B, 0x1111, 98);
        // Nobody knows the tags until ATMPE is set, and nobody with ATO = 0.
        for byte_5 in [0xc0, 0x60] {
            control(&pi, byte_5).await;
            assert_eq!(pi.send(&cdb(0x2a, 0x20, 98, 4), &data, &wrong).await.sense, GOOD);
        }
        control(&pi, 0xe0).await;
        let answer = refused(&pi, &cdb(0x2a, 0x20, 98, 4), &data, &wrong, (0xb, 0x10, 2)).await;
        assert_eq!(answer.information, Some(100));
        let got = pi.get(&cdb(0x28, 0, 98, 4), 2048).await;
        assert_eq!((got.sense, got.information), ((0xb, 0x10, 2), Some(100)));
        assert_eq!(
            pi.send(&cdb(0x2a, 0x80, 98, 4), &data, &wrong).await.sense,
            GOOD,
            "100b checks the guard alone"
        );
        // What is written without tuples gets the tags that are expected.
        assert_eq!(pi.plain(&cdb(0x2a, 0, 98, 4), &data).await.sense, GOOD);
        let got = pi.receive(&cdb(0x28, 0x20, 98, 4), 4, true).await;
        let tags: Vec<_> = got.tuples.chunks(8).map(|t| be(&t[2..4])).collect();
        assert_eq!((got.answer.sense, tags), (GOOD, vec![0x1111, 0x1111, 0x2222, 0x2222]));
        assert_eq!(pi.target.pi_counters().generated, 4);
    });
}

#[test]
fn rwwp_refuses_every_write_without_tuples_and_no_other() {
    sys::run(async |io| {
        let pi = Pi::new(&io, PiType::Type1, B, Transfer::Separate).await;
        control(&pi, 0xd0).await;
        let block = vec![1; 512];
        let mut caw = cdb(0x89, 0, 0, 0);
        caw[13] = 1;
        for c in [
            cdb(0x0a, 0, 0, 1),
            cdb(0x2a, 0, 0, 1),
            cdb(0xaa, 0, 0, 1),
            cdb(0x8a, 0, 0, 1),
            cdb(0x2e, 0, 0, 1),
            cdb(0x8b, 0, 0, 1),
            cdb(0x41, 0, 0, 1),
            cdb(0x93, 0, 0, 1),
        ] {
            refused(&pi, &c, &block, &[], INVALID_FIELD).await;
        }
        refused(&pi, &caw, &[0; 1024], &[], INVALID_FIELD).await;
        let sent = tuples_for(&block, B, 0, 0);
        assert_eq!(pi.send(&cdb(0x2a, 0x20, 0, 1), &block, &sent).await.sense, GOOD);
        assert_eq!(pi.get(&cdb(0x28, 0, 0, 1), 512).await.data, block);
    });
}

#[test]
fn write_and_verify_and_a_repeated_block_are_checked_like_the_rest() {
    sys::run(async |io| {
        for kind in PiType::ALL {
            let pi = Pi::new(&io, kind, B, Transfer::Interleaved).await;
            let data = [vec![1; 512], vec![2; 512]].concat();
            let sent = tuples_for(&data, B, 5, 8);
            let form = |short: u8, action: u8, flags: u8, n: u64| match kind {
                PiType::Type2 => long(action, flags, 8, n, (8, 5, 0xffff)),
                _ => cdb(short, flags, 8, n),
            };
            // BYTCHK = 01b.
            assert_eq!(pi.send(&form(0x8e, 0x0c, 0x22, 2), &data, &sent).await.sense, GOOD, "{kind}");
            assert!(pi.medium(8, 2).await == (data.clone(), sent.clone()));
            let mut bad = sent.clone();
            bad[8] ^= 1;
            let answer = refused(&pi, &form(0x8e, 0x0c, 0x22, 2), &data, &bad, (0xb, 0x10, 1)).await;
            assert_eq!(answer.information, Some(9));
            // WRITE SAME, then VERIFY with BYTCHK = 11b: one block, whose reference tag counts up as it is repeated.
            let (one, tuple) = (&data[..512], &sent[..8]);
            assert_eq!(pi.send(&form(0x93, 0x0d, 0x20, 6), one, tuple).await.sense, GOOD);
            let tags: Vec<_> = pi.medium(8, 6).await.1.chunks(8).map(|t| be(&t[4..])).collect();
            let step = u64::from(kind != PiType::Type3);
            assert_eq!(tags, (0..6).map(|i| 8 + i * step).collect::<Vec<_>>(), "{kind}");
            assert_eq!(pi.send(&form(0x8f, 0x0a, 0x26, 6), one, tuple).await.sense, GOOD, "{kind}");
            assert_eq!(pi.send(&form(0x93, 0x0d, 0x20, 5), one, tuple).await.sense, GOOD);
            let mut other = tuple.to_vec();
            other[3] ^= 1;
            // The reference tag that differs is compared too, but for type 3 with ATO = 0: then it is nobody's.
            let mut moved = tuple.to_vec();
            moved[7] ^= 1;
            for (byte_5, compared) in [(0x40, kind != PiType::Type3), (0xc0, true)] {
                control(&pi, byte_5).await;
                let answer = pi.send(&form(0x8f, 0x0a, 0x66, 6), one, &moved).await;
                assert_eq!(answer.sense, if compared { (0xe, 0x10, 3) } else { GOOD }, "{kind} {byte_5:#x}");
            }
            // 011b checks nothing, and compares everything.
            let answer = pi.send(&form(0x8f, 0x0a, 0x66, 6), one, &other).await;
            assert_eq!((answer.sense, answer.information), ((0xe, 0x10, 2), Some(8)), "{kind}");
        }
    });
}

#[test]
fn long_commands_that_make_no_sense_are_refused_where_they_are_wrong() {
    sys::run(async |io| {
        let pi = Pi::new(&io, PiType::Type2, B, Transfer::Interleaved).await;
        let field = |answer: Answer| (answer.sense, answer.response.sense_bytes()[15..18].to_vec());
        let mut c = long(0x09, 0x20, 0, 1, (0, 0, 0));
        c[7] = 0x10;
        assert_eq!(field(pi.get(&c, 520).await), (INVALID_FIELD, vec![0xcf, 0, 7]));
        assert_eq!(
            field(pi.get(&long(0x0e, 0, 0, 1, (0, 0, 0)), 520).await),
            (INVALID_FIELD, vec![0xcf, 0, 8])
        );
        assert_eq!(
            field(pi.get(&long(0x09, 0xc0, 0, 1, (0, 0, 0)), 520).await),
            (INVALID_FIELD, vec![0xcf, 0, 10])
        );
        let beyond = pi.get(&long(0x09, 0x20, BLOCKS, 1, (0, 0, 0)), 520).await;
        assert_eq!((beyond.sense, beyond.information), ((5, 0x21, 0), Some(BLOCKS)));
        let short = pi.execute(&c[..20], &Sg::new(), &Sg::new()).await;
        assert_eq!(short.sense, INVALID_FIELD);
        // Ten bytes may not ask for protection information here.
        for c in [cdb(0x28, 0x20, 0, 1), cdb(0x2f, 0x20, 0, 1), cdb(0xa8, 0x60, 0, 1), cdb(0x8b, 0x20, 0, 1)]
        {
            assert_eq!(pi.get(&c, 520).await.sense, UNKNOWN, "{c:x?}");
        }
    });
}

/// Any command with any fields over buffers of any length: it is answered, nothing panics, data-in fits its buffer, and a
/// command that is refused has written nothing.
#[test]
fn noise_in_every_field_is_answered_and_what_is_refused_has_written_nothing() {
    sys::run(async |io| {
        for kind in PiType::ALL {
            for transfer in [Transfer::Interleaved, Transfer::Separate] {
                let pi = Pi::new(&io, kind, B, transfer).await;
                let mut dice = Dice(u64::from(kind.number()) << 8 | transfer as u64);
                let mut good = 0;
                for step in 0..scale(300) {
                    // Not those that rewrite the whole medium, nor what would turn the rest of the test off.
                    let rows: Vec<_> =
                        TABLE.iter().filter(|o| !o.long && !matches!(o.kind, Kind::ModeSelect)).collect();
                    let op = rows[dice.below(rows.len() as u64) as usize];
                    let noise = dice.bytes(op.usage.len());
                    let mut c: Vec<u8> = op.usage.iter().zip(&noise).map(|(u, n)| u & n).collect();
                    c[0] = op.opcode;
                    let blocks = dice.below(6);
                    let lba = if dice.one_in(8) { dice.next() } else { dice.below(BLOCKS + 2) };
                    match (c.len(), op.service_action) {
                        (32, Some(action)) => {
                            c[7] = if dice.one_in(20) { noise[7] } else { 0x18 };
                            c[8..10].copy_from_slice(&action.to_be_bytes());
                            c[10] |= noise[11] & 0xe0;
                            c[12..20].copy_from_slice(&lba.to_be_bytes());
                            c[28..].copy_from_slice(&(blocks as u32).to_be_bytes());
                        }
                        (_, Some(action)) => c[1] = c[1] & 0xe0 | action as u8,
                        (_, None) if op.protects => {
                            let flags = c[1] | noise[2] & 0xe0;
                            c = cdb(op.opcode, flags, lba, blocks);
                            if op.kind == Kind::CompareAndWrite {
                                c[13] = blocks as u8;
                            }
                        }
                        (_, None) => {}
                    }
                    let each = [512, 520, 8, 1040][dice.below(4) as usize];
                    let len = (blocks * each + dice.below(2) * dice.below(9)) as usize;
                    let data = pi.scatter(&dice.bytes(len));
                    let tuples = (blocks * 8 * dice.below(3)) as usize;
                    let dif = pi.scatter(&dice.bytes(tuples));
                    let before = pi.medium(0, BLOCKS).await;
                    let answer = pi.execute(&c, &data, &dif).await;
                    assert!(answer.data.len() <= len);
                    good += usize::from(answer.status == 0);
                    // A miscompare after WRITE AND VERIFY has written.
                    if answer.status != 0 && answer.sense.0 != 0xe {
                        assert!(
                            pi.medium(0, BLOCKS).await == before,
                            "{kind} step {step}: {c:x?} {answer:?}"
                        );
                    }
                }
                assert!(good > scale(300) / 10, "{good} commands of {} were good", scale(300));
            }
        }
    });
}
