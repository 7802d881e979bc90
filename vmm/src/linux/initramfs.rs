//! The initramfs of our own: the init of guest-tests/linux-init, what it is to do, and the modules
//! that it loads, as a cpio archive of the form "newc" (Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use super::compression::Compression;

/// The init, a static program.
const INIT: &[u8] = include_bytes!(env!("MAPGPA_IMAGE_LINUX_INIT"));
/// The most bytes of a module.
const MODULE_MAX: usize = 64 << 20;

/// A kernel module to be loaded, and unloaded again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its file's name, without what compression adds: `tdx-guest.ko`.
    file: String,
    /// The ELF file, not compressed.
    bytes: Vec<u8>,
}

/// What is wrong with a module.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Its name is not that of a module.
    #[error("expected a kernel module, a file NAME.ko, or that with .gz, .xz or .zst")]
    Name,
    /// It cannot be decompressed.
    #[error("cannot be decompressed ({0})")]
    Corrupt(&'static str, #[source] std::io::Error),
    /// It is no ELF file.
    #[error("not a kernel module: no ELF file")]
    NotElf,
}

impl Module {
    /// The module in the bytes of the file named `name`.
    ///
    /// # Errors
    /// It is not one.
    pub fn new(name: &str, bytes: &[u8]) -> Result<Self, ModuleError> {
        let (stem, _) = name.rsplit_once(".ko").ok_or(ModuleError::Name)?;
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if stem.is_empty() || stem.len() > 200 || !stem.bytes().all(good) {
            return Err(ModuleError::Name);
        }
        let bytes = match Compression::of(bytes) {
            Some(compression) => compression
                .decompress(bytes, MODULE_MAX)
                .map_err(|source| ModuleError::Corrupt(compression.name(), source))?,
            None => bytes.to_vec(),
        };
        if !bytes.starts_with(b"\x7fELF") {
            return Err(ModuleError::NotElf);
        }
        Ok(Self { file: format!("{stem}.ko"), bytes })
    }

    /// The name by which the kernel knows it.
    fn name(&self) -> String {
        self.file.trim_end_matches(".ko").replace('-', "_")
    }
}

/// The archive: the init loads `modules` in order and unloads them in reverse, then walks all shared
/// memory back by a kexec if wanted, then resets the machine.
#[must_use]
pub fn archive(modules: &[Module], kexec: bool) -> Vec<u8> {
    let mut plan = String::new();
    for module in modules {
        plan += &format!("load {}\n", module.file);
    }
    for module in modules.iter().rev() {
        plan += &format!("unload {}\n", module.name());
    }
    if kexec {
        plan += "kexec\n";
    }
    let mut cpio = Cpio::default();
    for directory in ["dev", "proc", "sys", "modules"] {
        cpio.add(directory, DIRECTORY, (0, 0), &[]);
    }
    cpio.add("dev/console", CONSOLE, (5, 1), &[]);
    cpio.add("init", PROGRAM, (0, 0), INIT);
    cpio.add("plan", FILE, (0, 0), plan.as_bytes());
    for module in modules {
        cpio.add(&format!("modules/{}", module.file), FILE, (0, 0), &module.bytes);
    }
    cpio.end()
}

/// Modes: type and permissions, as in stat(2).
const DIRECTORY: u32 = 0o040_755;
const CONSOLE: u32 = 0o020_600;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// An archive being written.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    files: u32,
}

impl Cpio {
    /// Adds a file; `device` is the major and minor number of a device file.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.files += 1;
        let (inode, size, name_size) = (self.files, content.len(), name.len() + 1);
        let links = 1;
        // Magic; inode, mode, owner, group, links, time, size; the file system's device (2); the
        // file's device (2); size of the name, checksum (none).
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}{0:08x}{0:08x}\
             {1:08x}{2:08x}{name_size:08x}{0:08x}",
            0, device.0, device.1
        );
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and contents of an archive, read back by its headers.
    fn read(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        let mut at = 0;
        loop {
            let field = |number: usize| {
                let from = at + 6 + 8 * number;
                let text = std::str::from_utf8(&archive[from..from + 8]).expect("ASCII");
                usize::from_str_radix(text, 16).expect("hexadecimal")
            };
            assert_eq!(&archive[at..at + 6], b"070701");
            let (size, name_size) = (field(6), field(11));
            let name_at = at + 110;
            let name = String::from_utf8_lossy(&archive[name_at..name_at + name_size - 1]);
            let content_at = (name_at + name_size).next_multiple_of(4);
            let last = name == "TRAILER!!!";
            files.push((name.into_owned(), archive[content_at..content_at + size].to_vec()));
            at = (content_at + size).next_multiple_of(4);
            if last {
                return files;
            }
        }
    }

    #[test]
    fn an_archive_has_the_init_its_plan_and_the_modules() {
        let modules = [
            Module::new("tsm.ko", b"\x7fELF a").expect("a module"),
            Module::new("tdx-guest.ko", b"\x7fELF bc").expect("a module"),
        ];
        let files = read(&archive(&modules, true));
        let find = |name: &str| &files.iter().find(|file| file.0 == name).expect(name).1;
        assert_eq!(find("init"), INIT);
        assert_eq!(find("modules/tdx-guest.ko"), b"\x7fELF bc");
        let plan = "load tsm.ko\nload tdx-guest.ko\nunload tdx_guest\nunload tsm\nkexec\n";
        assert_eq!(find("plan"), plan.as_bytes());
    }

    #[test]
    fn what_is_no_module_is_refused() {
        assert!(matches!(Module::new("a.txt", b"\x7fELF"), Err(ModuleError::Name)));
        assert!(matches!(Module::new("a b.ko", b"\x7fELF"), Err(ModuleError::Name)));
        assert!(matches!(Module::new("a.ko", b"text"), Err(ModuleError::NotElf)));
        let broken = [0xfd, b'7', b'z', b'X', b'Z', 0, 1, 2];
        assert!(matches!(Module::new("a.ko.xz", &broken), Err(ModuleError::Corrupt("xz", _))));
    }
}
