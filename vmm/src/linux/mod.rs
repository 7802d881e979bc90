//! An unmodified Linux as an emulated TD: its image, its boot, its machine.
//!
//! [`compression`] and [`image`] make an ELF file of what a distribution ships, [`crate::patch`]
//! rewrites its TDCALLs, [`boot`], [`acpi`] and [`cpuid`] say what it finds when it starts,
//! [`initramfs`] what it runs in user space. [`machine`], [`devices`] and [`module`] answer it while
//! it runs, [`console`] understands what it says. The backend (`backend::emulated`) has the KVM.

pub mod acpi;
pub mod boot;
pub mod case;
pub mod compression;
pub mod console;
pub mod cpuid;
pub mod devices;
pub mod image;
pub mod initramfs;
pub mod machine;
pub(crate) mod module;
