//! An unmodified TDX firmware (EDK2's TDVF) as an emulated TD: its image, its boot, its machine.
//!
//! [`tdvf`] and [`volumes`] read the image, [`image`] rewrites it, [`hob`] says what it finds of
//! memory, [`fw_cfg`] and [`acpi`] what it boots with, [`kernel`] and [`program`] what it boots.
//! [`machine`] and [`pci`] answer it while it runs, [`console`] understands what it says. What is the
//! same for kernels is theirs ([`crate::linux`]). The backend (`backend::emulated`) has the KVM.

pub mod acpi;
pub mod case;
pub mod console;
pub mod fw_cfg;
pub mod hob;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod pci;
pub mod program;
pub mod tdvf;
pub mod volumes;
