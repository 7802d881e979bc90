//! Firmware that cannot be run: one clear line that says what was found, and exit 2, before anything
//! about this host is asked. What a good image is taken for.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]
#![allow(clippy::cast_possible_truncation, reason = "images of 64 KiB")]

mod support;
#[path = "support/tdvf.rs"]
mod tdvf;

use std::fs;
use std::path::Path;

use mapgpa::firmware::image::Firmware;
use mapgpa::firmware::tdvf::Kind;
use mapgpa_abi::tdcall::{INSTRUCTION, TRAP};
use support::Scratch;
use support::command::{command, refused, with};
use tdvf::{LOAD_CR3, METADATA, SEC, SIZE, Section, Tdvf, VARIABLES};

fn run(firmware: &Path, more: &str) -> std::process::Command {
    let firmware = firmware.to_str().expect("UTF-8");
    let words = ["run", "--firmware", firmware].into_iter().chain(more.split_whitespace());
    with(&words.collect::<Vec<_>>())
}

fn count(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).filter(|window| *window == what).count()
}

#[test]
fn a_good_image_is_rewritten_where_it_runs_in_place() {
    let image = Tdvf::default().image();
    let mut firmware = Firmware::of_file(image.clone()).expect("a TDVF");
    assert_eq!((firmware.sec.sites, firmware.hooks, firmware.packed.sites), (2, 1, 3));
    let kinds: Vec<_> = firmware.sections.iter().map(|section| section.kind).collect();
    assert_eq!(kinds, [Kind::Bfv, Kind::Cfv, Kind::TdHob, Kind::TempMem]);
    let (before, sec) = firmware.image.split_at(SIZE - SEC);
    assert_eq!(before, &image[..SIZE - SEC], "what is compressed, and the variables");
    assert_eq!((count(sec, &INSTRUCTION), count(sec, &TRAP), count(sec, &LOAD_CR3)), (0, 2, 0));

    firmware.blank_variables().expect("variables");
    let store = &firmware.image[0x48..VARIABLES];
    assert_eq!((store[20], count(&store[..28], &[0x5a])), (0x5a, 8), "its header stays");
    assert!(store[28..0x1000].iter().all(|byte| *byte == 0xff));
    assert_eq!(
        firmware.image[VARIABLES..],
        *Firmware::of_file(image).expect("same").image.split_at(VARIABLES).1
    );
}

#[test]
fn images() {
    let scratch = Scratch::new("firmware-images");
    let good = Tdvf::default().image();
    let with_byte = |at: usize, byte: u8| {
        let mut image = good.clone();
        image[at] = byte;
        image
    };
    let (metadata, table) = (SIZE - METADATA, SIZE - 0x20);
    let sections = |change: &dyn Fn(&mut Vec<Section>)| {
        let mut tdvf = Tdvf::default();
        change(&mut tdvf.sections);
        tdvf.image()
    };
    let sites = |sec, hooks, packed| Tdvf { sec, hooks, packed, ..Tdvf::default() }.image();
    let mut corrupt = good.clone();
    let lzma =
        corrupt.windows(4).position(|window| window == [0x98, 0x58, 0x4e, 0xee]).expect("it");
    corrupt[lzma + 40..lzma + 60].fill(0xff);
    for (name, bytes, words) in [
        ("empty", Vec::new(), "0 bytes: expected a multiple of 4096"),
        ("text", b"#!/bin/sh\n".to_vec(), "10 bytes: expected a multiple of 4096"),
        ("zeros", vec![0; SIZE], "no TDVF: there is no table of GUIDs"),
        ("cut-at-the-end", good[..SIZE - 0x1000].to_vec(), "no TDVF: there is no table of GUIDs"),
        ("cut-at-the-start", good[0x1000..].to_vec(), "truncated"),
        ("cut-short", good[..SIZE - 7].to_vec(), "expected a multiple of 4096"),
        (
            "no-offset",
            with_byte(table - 18 - 16, 0),
            "without TDX metadata: expected one built for TDX",
        ),
        ("entry-size", with_byte(table - 18 - 18, 0xff), "an entry has an impossible size"),
        ("offset", with_byte(table - 18 - 18 - 1, 0xff), "would lie before the image"),
        ("signature", with_byte(metadata, b'X'), "no signature TDVF at offset 0xf600"),
        ("version", with_byte(metadata + 8, 2), "version 2, expected 1"),
        ("no-sections", with_byte(metadata + 12, 0), "0 sections, expected 1 to 64"),
        ("type", sections(&|all| all[3].4 = 9), "section 3 is of type 9"),
        ("no-hob", sections(&|all| all[2].4 = 3), "0 sections for the TD HOB"),
        ("two-codes", sections(&|all| all[1].4 = 0), "expected one section of code"),
        ("overlap", sections(&|all| all[3].2 = 0x80_a000), "two sections overlap at 0x80a000"),
        ("unaligned", sections(&|all| all[3].2 = 1), "expected multiples of 4 KiB"),
        ("elsewhere", sections(&|all| all[0].2 += 4096), "expected 0xffff2000"),
        ("beyond", sections(&|all| all[3].2 = 0xffff_0000), "beyond what lies below the image"),
        ("raw-memory", sections(&|all| all[3].1 = 4096), "is memory, and has bytes in the image"),
        ("long", sections(&|all| all[0].1 += 4096), "the image has 0x10000: truncated"),
        ("no-volume", with_byte(VARIABLES + 0x28, 0), "no firmware volume (_FVH) at offset 0x2000"),
        ("long-volume", with_byte(SIZE - SEC + 0x22, 1), "has 0x14000 bytes, and 0x4000 are there"),
        ("not-compressed", with_byte(lzma, 0), "no LZMA-compressed section"),
        ("corrupt", corrupt, "its LZMA-compressed section is damaged"),
        (
            "no-sec-sites",
            sites(0, 1, 3),
            "found 0 TDCALLs and 1 loads of CR3 in its SEC volume, 3 TDCALLs",
        ),
        ("no-hooks", sites(2, 0, 3), "found 2 TDCALLs and 0 loads of CR3"),
        (
            "no-packed-sites",
            sites(2, 1, 0),
            "0 TDCALLs in the compressed volume: expected one or more",
        ),
    ] {
        let path = scratch.path(name);
        fs::write(&path, bytes).expect("written");
        refused(run(&path, "--policy chunk=64K"), &[words, name]);
    }
    refused(run(&scratch.path("none"), ""), &["--firmware", "cannot be read"]);
    refused(run(Path::new(env!("CARGO_BIN_EXE_mapgpa")), ""), &["--firmware"]);
}

#[test]
fn options() {
    let scratch = Scratch::new("firmware-options");
    let firmware = scratch.path("fd");
    fs::write(&firmware, Tdvf::default().image()).expect("written");
    for (more, words) in [
        ("--memory 64M", "--memory 64M: expected 128M to 2G with --firmware"),
        ("--memory 4G", "--memory 4G"),
        ("--vcpus 2", "--vcpus 2: expected 1 with --firmware"),
        ("--gpaw 30", "--gpaw 30: expected 34 to 52"),
        ("--until userspace", "--until userspace"),
        ("--until exit", "--until exit"),
        ("--scenario none", "large-dma, exit-boot-services"),
        ("--cmdline quiet", "they need --kernel"),
        ("--kexec", "they need --kernel"),
        ("--kernel /etc/hostname", "not a Linux kernel"),
        ("--backend hosted", "not with --backend hosted"),
        ("--policy chunk=3", "chunk"),
    ] {
        refused(run(&firmware, more), &[words]);
    }
    refused(command("run reference --firmware /dev/null"), &["cannot be used with"]);
    refused(command("run reference --scenario large-dma"), &["--firmware"]);
}
