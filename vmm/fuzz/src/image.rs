//! Any bytes as an image: a kernel (bzImage, vmlinux, in any compression), a kernel module, or the ELF
//! file of a guest test.

use mapgpa::backend::emulated;
use mapgpa::linux::boot::{self, Wanted};
use mapgpa::linux::image::Kernel;
use mapgpa::linux::initramfs::{self, Module};

/// Bytes of guest memory.
const MEMORY: u64 = 1 << 30;

/// Reads the image in `data`, a kind and the file's bytes.
pub fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind % 4 {
        0 => match Module::new("tdx-guest.ko", bytes) {
            Ok(module) => drop(initramfs::archive(&[module], true)),
            Err(error) => super::shown(&error),
        },
        1 => {
            if let Err(error) = emulated::check_image(bytes) {
                super::shown(&error);
            }
        }
        _ => match Kernel::of_file(bytes.to_vec()) {
            Ok(kernel) => load(kernel),
            Err(error) => super::shown(&error),
        },
    }
}

/// As a run does before there is a VM.
fn load(mut kernel: Kernel) {
    let patched = kernel.patch();
    assert!(patched.sites <= kernel.elf.len() as u64);
    let wanted =
        Wanted { kernel: &kernel, initrd: &[0; 100], cmdline: "quiet", memory: MEMORY, vcpus: 1 };
    match boot::plan(wanted) {
        Ok(boot) => {
            for segment in boot.segments {
                assert!(kernel.elf.get(segment.file.clone()).is_some());
                assert!(segment.address + segment.size <= MEMORY);
            }
            for (gpa, bytes) in &boot.writes {
                assert!(gpa + bytes.len() as u64 <= MEMORY);
            }
        }
        Err(error) => super::shown(&error),
    }
}
