//! Kernels that cannot be run: one clear line and exit 2, before anything about this host is asked.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod support;

use std::fs;
use std::path::Path;

use mapgpa_abi::tdcall::INSTRUCTION;
use support::Scratch;
use support::command::{code, command, refused, stderr, with};

/// A vmlinux that has nothing but a banner and `code`.
fn vmlinux(code: &[u8]) -> Vec<u8> {
    let mut body = [0x48, 0x89, 0xc8, 0xc3, 0xcc, 0x90].repeat(20);
    body.extend(code);
    body.extend(b"\xc3Linux version 6.1.0-none (a@b)\0");
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let (start, size) = (16u64 << 20, body.len() as u64);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [start, 64, 0] {
        elf.extend(u64::to_le_bytes(word));
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [120, start, start, size, size, 4096] {
        elf.extend(u64::to_le_bytes(word));
    }
    elf.extend(body);
    elf
}

fn run(kernel: &Path, more: &str) -> std::process::Command {
    let kernel = kernel.to_str().expect("UTF-8");
    let words = ["run", "--kernel", kernel].into_iter().chain(more.split_whitespace());
    with(&words.collect::<Vec<_>>())
}

#[test]
fn images() {
    let scratch = Scratch::new("linux-images");
    let good = vmlinux(&INSTRUCTION);
    let mut elf32 = good.clone();
    elf32[4] = 1;
    let mut arm64 = vec![0; 4096];
    arm64[56..60].copy_from_slice(b"ARM\x64");
    let mut bzimage = vec![0; 4096];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
    bzimage[0x236] = 1;
    bzimage[0x24c..0x250].copy_from_slice(&100u32.to_le_bytes());
    let corrupt = |payload: &[u8]| {
        let mut image = bzimage.clone();
        image[5 * 512..5 * 512 + payload.len()].copy_from_slice(payload);
        image
    };
    let mut cut = bzimage.clone();
    cut[0x24c..0x250].copy_from_slice(&1_000_000u32.to_le_bytes());
    for (name, bytes, words) in [
        ("no-sites", vmlinux(&[0x90]), "no TDCALL site: built without CONFIG_INTEL_TDX_GUEST"),
        ("text", b"#!/bin/sh\n".to_vec(), "not a Linux kernel"),
        ("empty", Vec::new(), "not a Linux kernel"),
        ("elf32", elf32, "a 32-bit kernel"),
        ("arm64", arm64, "a kernel for arm64"),
        ("cut-elf", good[..good.len() - 9].to_vec(), "truncated"),
        ("cut-bzimage", cut, "truncated: its headers announce"),
        ("corrupt-gzip", corrupt(&[0x1f, 0x8b, 8, 0, 1, 2, 3]), "its gzip payload"),
        ("corrupt-zstd", corrupt(&[0x28, 0xb5, 0x2f, 0xfd, 0xff]), "its zstd payload"),
        ("corrupt-xz", corrupt(&[0xfd, b'7', b'z', b'X', b'Z', 0, 9]), "its xz payload"),
        ("no-compression", corrupt(b"garbage"), "no compression that kernels use"),
    ] {
        let path = scratch.path(name);
        fs::write(&path, bytes).expect("written");
        refused(run(&path, "--policy chunk=64K"), &[words, name]);
    }
    let program = Path::new(env!("CARGO_BIN_EXE_mapgpa"));
    refused(run(program, ""), &["not a Linux kernel"]);
    refused(run(&scratch.path("none"), ""), &["--kernel", "cannot be read"]);
}

#[test]
fn options() {
    let scratch = Scratch::new("linux-options");
    let kernel = scratch.path("vmlinux");
    fs::write(&kernel, vmlinux(&INSTRUCTION)).expect("written");
    let large = scratch.path("initrd");
    fs::File::create(&large).and_then(|file| file.set_len(600 << 20)).expect("a sparse file");
    let text = scratch.path("a.ko");
    fs::write(&text, b"text").expect("written");
    let (large, text) = (large.display(), text.display());
    for (more, words) in [
        (format!("--initrd {large}"), "the initrd (600 MiB) need --memory"),
        ("--memory 16M".to_owned(), "--memory 16M"),
        ("--memory 2T".to_owned(), "--memory 2T"),
        ("--vcpus 0".to_owned(), "--vcpus 0: expected 1 to 64"),
        ("--vcpus 1000".to_owned(), "--vcpus 1000"),
        ("--gpaw 20".to_owned(), "--gpaw 20"),
        ("--swiotlb 1G".to_owned(), "--swiotlb 1G"),
        (format!("--cmdline {}", "x".repeat(3000)), "--cmdline"),
        (format!("--module {text}"), "not a kernel module"),
        ("--module /etc/hostname".to_owned(), "NAME.ko"),
        ("--initrd /none".to_owned(), "--initrd /none: cannot be read"),
        (format!("--initrd {large} --kexec"), "--kexec"),
        ("--backend hosted".to_owned(), "not with --backend hosted"),
        ("--until never".to_owned(), "userspace, conversions, exit"),
        ("--policy chunk=3".to_owned(), "chunk"),
    ] {
        refused(run(&kernel, &more), &[words]);
    }
    refused(command("run reference --kernel /dev/null"), &["cannot be used with"]);
    refused(command("run"), &["<GUEST>"]);
    refused(command("run reference --initrd /dev/null"), &["--kernel"]);
}

#[test]
fn git_bisect_skips_what_cannot_be_tested() {
    let scratch = Scratch::new("linux-bisect");
    let kernel = scratch.path("vmlinux");
    fs::write(&kernel, vmlinux(&[0x90])).expect("written");
    let output = run(&kernel, "--git-bisect").output().expect("the binary runs");
    assert_eq!(code(&output), 125, "{}", stderr(&output));
    assert!(stderr(&output).contains("no TDCALL site"));
    let guest = "run linux-5.19 --backend hosted --git-bisect --policy";
    assert_eq!(code(&command(&format!("{guest} chunk=64K")).output().expect("runs")), 1);
    assert_eq!(code(&command(&format!("{guest} complete")).output().expect("runs")), 0);
    assert_eq!(code(&command(&format!("{guest} qemu-tdx")).output().expect("runs")), 125);
}
