//! Commands at random, mostly valid: nothing panics, nothing outside the volume is touched (the volume itself checks that), and what
//! comes back is consistent.

use proptest::prelude::*;
use tcmu_dif::{
    sys::mem::{Buffer, Sg},
    units::BlockSize,
};

use crate::memory::*;

/// A CDB of a supported command with random, mostly plausible fields, or plain noise.
fn any_cdb() -> impl Strategy<Value = Vec<u8>> {
    let plausible = (0..table().len(), any::<[u8; 16]>(), any::<[u8; 16]>(), 0u64..1100, 0u64..40, 0..4u8)
        .prop_map(|(row, noise, sparse, lba, blocks, noisy)| {
            let op = table()[row];
            let mut c = cdb(op.opcode, 0, lba, blocks);
            c.resize(op.usage.len(), 0);
            if op.opcode == 0x89 {
                c[10..14].copy_from_slice(&[0, 0, 0, blocks as u8]);
            }
            // A few random bits where the command looks at them; sometimes anywhere.
            for (i, byte) in c.iter_mut().enumerate().skip(1) {
                match noisy {
                    0 => {}
                    1 => *byte ^= noise[i] & sparse[i] & sparse[15 - i] & op.usage[i],
                    2 => *byte = noise[i] & op.usage[i],
                    _ => *byte ^= noise[i] & sparse[i] & sparse[15 - i],
                }
            }
            if let Some(action) = op.service_action {
                c[1] = c[1] & 0xe0 | action as u8;
            }
            c
        });
    prop_oneof![12 => plausible, 1 => proptest::collection::vec(any::<u8>(), 0..20)]
}

/// A buffer: zeros, a parameter list with small numbers in it, or noise; sometimes scattered.
fn any_data() -> impl Strategy<Value = (Vec<u8>, usize)> {
    let bytes = prop_oneof![
        (0usize..24).prop_map(|n| vec![0; n * 512]),
        (0usize..5).prop_map(|n| vec![0x5a; n * 4096]),
        proptest::collection::vec(0u8..12, 0..70),
        proptest::collection::vec(any::<u8>(), 0..1100),
        Just(vec![0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 9, 0, 0, 0, 0]),
        Just([&[0, 0, 0, 0, 0x08, 0x12, 0x04][..], &[0; 17]].concat()),
    ];
    (bytes, 1usize..3000)
}

fn scattered(bytes: &[u8], piece: usize) -> Sg {
    let mut sg = Sg::new();
    for part in bytes.chunks(piece) {
        sg.append(&Buffer::from_slice(part).sg());
    }
    sg
}

proptest! {
    #![proptest_config(ProptestConfig { cases: scale(400) as u32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_command_panics_or_leaves_the_volume(
        large in any::<bool>(),
        commands in proptest::collection::vec((any_cdb(), any_data(), 0usize..6), 1..60),
    ) {
        let b = Bench::new(if large { BlockSize::B4096 } else { BlockSize::B512 });
        b.volume().yields.set(1);
        let target = b.target.clone();
        b.exec.spawn(async move { target.background().await });
        let mut answers = vec![];
        for (cdb, (bytes, piece), turns) in &commands {
            let data = scattered(bytes, *piece);
            answers.push((b.spawn(cdb, &data), data.len(), cdb));
            for _ in 0..*turns {
                b.exec.run_ready();
            }
        }
        b.settle();
        for (answer, len, cdb) in answers {
            let a = answer.take().ok_or_else(|| TestCaseError::fail(format!("no answer to {cdb:x?}")))?;
            prop_assert!(a.data.len() <= len);
            prop_assert_eq!(a.status == 2, a.response.sense.is_some());
            prop_assert!(a.response.gives_data || a.data.is_empty());
            prop_assert!(a.status == 0 || !a.response.gives_data);
            let sense = a.response.sense_bytes();
            prop_assert!(sense.len() <= 96 && (a.status != 2 || [0x70, 0xf0, 0x72].contains(&sense[0])));
        }
        // Whatever happened, the unit still tells what it is.
        prop_assert_eq!(b.get(&[0x12, 0, 0, 0, 96, 0], 96).sense, GOOD);
    }
}
