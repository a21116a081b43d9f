//! What `create` decides before it touches anything.

use std::{ffi::OsString, fs};

use super::*;
use crate::{
    admin::create::{differences, look_at_image},
    cli::args::{self, Command},
    kernel::{backstore::Backstore, fabric::Export},
    pi::store::default_path,
};

fn parse(words: &str) -> Order {
    let words = ["tcmu-dif", "create"].into_iter().chain(words.split_whitespace()).map(OsString::from);
    match args::parse(words).unwrap().command {
        Command::Create(args) => args.order(),
        other => panic!("{other:?}"),
    }
}

fn there() -> (Backstore, Vec<Export>) {
    let store = Backstore {
        path: "target/core/user_0/vm1".into(),
        hba: 0,
        name: "vm1".into(),
        dev_config: "dif//a.raw;pi=type1".into(),
        capacity: 1 << 20,
        block_size: 512,
        serial: "s1".into(),
        write_cache: true,
        enabled: true,
        wants_answers: false,
    };
    let export = |fabric: &str, target: &str| Export {
        fabric: fabric.into(),
        target: target.into(),
        tpg: "tpgt_1".into(),
        lun: "lun_0".into(),
        link: "vm1".into(),
    };
    (store, vec![export("loopback", "naa.5001405000000001"), export("vhost", "naa.5001405000000002")])
}

fn compare(words: &str) -> Vec<String> {
    let args = parse(words);
    let config = args.config().unwrap();
    let (store, exports) = there();
    differences(&args, &config, &store, &exports)
}

#[test]
fn the_same_words_differ_in_nothing() {
    for words in [
        "vm1 --image /a.raw --pi type1 --export loopback --export vhost",
        "vm1 --image /a.raw --pi type1 --export vhost --export loopback",
        "vm1 --image /a.raw --pi type1 --export loopback:naa.5001405000000001 --export vhost",
        "vm1 --image /a.raw --pi type1 --sidecar /a.raw.pi --size 1M --serial s1 --export loopback --export vhost",
    ] {
        assert_eq!(compare(words), [""; 0], "{words}");
    }
}

#[test]
fn every_word_that_differs_is_named() {
    let base = "vm1 --export loopback --export vhost";
    for (words, difference) in [
        ("--image /b.raw --pi type1", "image /a.raw and not /b.raw"),
        ("--image /a.raw", "--pi type1 and not off"),
        ("--image /a.raw --pi type1 --exposure initiator", "--exposure target and not initiator"),
        ("--image /a.raw --pi type1 --sidecar /s", "--sidecar /a.raw.pi and not /s"),
        ("--image /a.raw --pi type1 --read-only", "access writable and not read-only"),
        ("--image /a.raw --pi type1 --block-size 4096", "--block-size 512 and not 4096"),
        ("--image /a.raw --pi type1 --size 2M", "--size 1048576 and not 2097152"),
        ("--image /a.raw --pi type1 --serial s2", "--serial s1 and not s2"),
        (
            "--image /a.raw --pi type1 --export vhost:naa.5001405000000009",
            "no export vhost:naa.5001405000000009",
        ),
    ] {
        assert_eq!(
            compare(&format!("{base} {words}")).first().map(String::as_str),
            Some(difference),
            "{words}"
        );
    }
    assert_eq!(
        compare("vm1 --image /a.raw --pi type1 --export loopback"),
        ["an export vhost:naa.5001405000000002 more"]
    );
}

#[test]
fn words_that_contradict_each_other_are_usage_errors_with_a_next_step() {
    for (words, what) in [
        ("vm1 --image /a --size 1000", "--size"),
        ("vm1 --image /a --size 1536 --block-size 4096", "--size"),
        ("vm1 --image /a --sidecar /s", "--sidecar"),
        ("vm1 --image /a --exposure initiator", "--exposure"),
        ("vm1 --image /a --pi type1 --pi-transfer interleaved", "--pi-transfer"),
        ("vm1 --image /a --size 1M --read-only", "--read-only"),
        ("vm1 --image /a --export vhost --export vhost", "--export"),
    ] {
        let e = parse(words).config().unwrap_err();
        assert_eq!((e.what.as_str(), e.usage, e.next.is_some()), (what, true, true), "{words}");
    }
    let long = format!("vm1 --image /{}", "x".repeat(260));
    assert_eq!(parse(&long).config().unwrap_err().what, "--image");
}

#[test]
fn a_relative_image_becomes_absolute() {
    let config = parse("vm1 --image a.raw").config().unwrap();
    assert_eq!(config.image, std::env::current_dir().unwrap().join("a.raw"));
}

#[test]
fn a_new_image_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    fs::write(&image, "precious").unwrap();
    let args = parse(&format!("vm1 --image {} --size 1M", image.display()));
    let e = look_at_image(&args, &args.config().unwrap()).unwrap_err();
    assert!(e.reason.contains("there already"), "{e}");
    fs::remove_file(&image).unwrap();
    fs::write(default_path(&image), "precious").unwrap();
    let e = look_at_image(&args, &args.config().unwrap()).unwrap_err();
    assert!(e.reason.contains("protection information is there"), "{e}");
}

#[test]
fn an_image_with_protection_is_not_written_without() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    fs::write(&image, [0; 4096]).unwrap();
    fs::write(default_path(&image), "tuples").unwrap();
    let look = |words: &str| {
        let args = parse(&format!("vm1 --image {} {words}", image.display()));
        look_at_image(&args, &args.config().unwrap())
    };
    assert!(look("").unwrap_err().reason.contains("protection information"));
    assert!(look("--pi type1").unwrap().is_some());
    assert!(look("--read-only").unwrap().is_some());
}
