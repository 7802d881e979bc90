//! /dev/kvm and VMs of a TDX host: capabilities, KVM_CREATE_VM, and the ioctls of a TD.
//!
//! Sources: Linux, arch/x86/kvm/x86.c (`kvm_vm_ioctl_check_extension`, `kvm_vm_ioctl_enable_cap`,
//! `kvm_arch_vm_ioctl`), virt/kvm/kvm_main.c.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_MAX_VCPUS, KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_MEMORY_FAULT_INFO, KVM_CAP_READONLY_MEM, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_SYNC_REGS,
    KVM_CAP_USER_MEMORY2, KVM_CAP_VM_TYPES, KVM_CAP_X2APIC_API, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    kvm_enable_cap, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};

use crate::log::refuse;
use crate::raw::{self, Sys};
use crate::registry::{self, Handle};
use crate::td::{State, Td, lock};
use crate::uapi::{HC_MAP_GPA_RANGE, VM_TYPE_TDX, ioctl};
use crate::vcpu::Vcpu;
use crate::{log, profile, slots, tdx};

/// An ioctl of /dev/kvm; nothing if it is the kernel's to answer.
pub(crate) fn of_kvm(fd: i32, request: u64, arg: u64) -> Option<Sys<i32>> {
    match request {
        ioctl::CREATE_VM if arg == VM_TYPE_TDX => Some(create_td(fd)),
        ioctl::CHECK_EXTENSION => {
            extension(u32::try_from(arg).unwrap_or(u32::MAX), fd, None).map(Ok)
        }
        _ => None,
    }
}

fn create_td(kvm: i32) -> Sys<i32> {
    let profile = profile::get();
    if profile.host_is("no-tdx") {
        return refuse(libc::EINVAL, "KVM_CREATE_VM: type 5");
    }
    if profile.host_is("create-vm") {
        return refuse(libc::ENOMEM, "KVM_CREATE_VM");
    }
    // SAFETY: KVM_CREATE_VM takes a number.
    let fd = unsafe { raw::ioctl(kvm, ioctl::CREATE_VM, 0) }?;
    match Td::new(kvm, fd) {
        Ok(td) => {
            registry::add(fd, Handle::Vm(td));
            log::VMS.take();
            Ok(fd)
        }
        Err(errno) => {
            let _ = raw::close(fd);
            log::line("this machine's KVM or userfaultfd cannot carry a simulated TD");
            Err(errno)
        }
    }
}

/// The most vCPUs of a TD: `tdx_vm_init`, the number of CPUs present.
fn most_vcpus() -> i32 {
    if profile::get().host_is("one-vcpu") {
        return 1;
    }
    // SAFETY: takes a number, gives one.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
    i32::try_from(cpus).unwrap_or(1)
}

/// KVM_CHECK_EXTENSION; nothing for what is as on any host.
fn extension(cap: u32, fd: i32, td: Option<&Td>) -> Option<i32> {
    let profile = profile::get();
    let on = |fault: &str, value| Some(if profile.host_is(fault) { 0 } else { value });
    match cap {
        KVM_CAP_VM_TYPES => {
            // SAFETY: KVM_CHECK_EXTENSION takes a number.
            let others = unsafe { raw::ioctl(fd, ioctl::CHECK_EXTENSION, u64::from(cap)) };
            let others = others.unwrap_or(0) & !(1 << VM_TYPE_TDX) | 1;
            Some(others | if profile.host_is("no-tdx") { 0 } else { 1 << VM_TYPE_TDX })
        }
        KVM_CAP_GUEST_MEMFD => on("no-guest-memfd", 1),
        KVM_CAP_USER_MEMORY2 | KVM_CAP_MEMORY_FAULT_INFO | KVM_CAP_X2APIC_API => None,
        KVM_CAP_MEMORY_ATTRIBUTES => {
            on("no-attributes", KVM_MEMORY_ATTRIBUTE_PRIVATE.cast_signed())
        }
        KVM_CAP_EXIT_HYPERCALL => on("no-exit-hypercall", 1 << HC_MAP_GPA_RANGE),
        KVM_CAP_SPLIT_IRQCHIP => on("no-split-irqchip", 1),
        // The registers of a TD are its own, its memory is all writable.
        KVM_CAP_SYNC_REGS | KVM_CAP_READONLY_MEM if td.is_some() => Some(0),
        KVM_CAP_MAX_VCPUS if td.is_some() => Some(most_vcpus()),
        _ => None,
    }
}

/// An ioctl of a TD's.
pub(crate) fn of_td(td: &Arc<Td>, request: u64, arg: u64) -> Sys<i32> {
    let mut state = lock(&td.state);
    if state.dead {
        return refuse(libc::EIO, "the TD is dead");
    }
    match request {
        ioctl::CHECK_EXTENSION => {
            let cap = u32::try_from(arg).unwrap_or(u32::MAX);
            match extension(cap, td.kvm.0, Some(td)) {
                Some(value) => Ok(value),
                None => below(td, request, arg),
            }
        }
        ioctl::ENABLE_CAP => enable(td, &mut state, arg),
        ioctl::CREATE_VCPU => create_vcpu(td, &mut state, arg),
        ioctl::SET_USER_MEMORY_REGION => {
            let old: kvm_userspace_memory_region = raw::get(arg)?;
            let region = kvm_userspace_memory_region2 {
                slot: old.slot,
                flags: old.flags,
                guest_phys_addr: old.guest_phys_addr,
                memory_size: old.memory_size,
                userspace_addr: old.userspace_addr,
                ..kvm_userspace_memory_region2::default()
            };
            slots::set_region(td, &mut state, &region)
        }
        ioctl::SET_USER_MEMORY_REGION2 => slots::set_region(td, &mut state, &raw::get(arg)?),
        ioctl::SET_MEMORY_ATTRIBUTES => slots::set_attributes(&mut state, arg),
        ioctl::CREATE_GUEST_MEMFD => {
            let (fd, memfd) = slots::create_memfd(td, arg)?;
            registry::add(fd, Handle::Memfd(memfd));
            log::MEMFDS.take();
            Ok(fd)
        }
        ioctl::MEMORY_ENCRYPT_OP => tdx::vm_op(td, &mut state, arg),
        ioctl::GET_API_VERSION
        | ioctl::SET_TSS_ADDR
        | ioctl::SET_IDENTITY_MAP_ADDR
        | ioctl::SET_BOOT_CPU_ID
        | ioctl::SET_TSC_KHZ
        | ioctl::GET_TSC_KHZ
        | ioctl::SET_GSI_ROUTING
        | ioctl::IRQFD
        | ioctl::IOEVENTFD
        | ioctl::SIGNAL_MSI => below(td, request, arg),
        ioctl::CREATE_IRQCHIP => refuse(libc::EINVAL, "KVM_CREATE_IRQCHIP: not for a TD"),
        other => refuse(libc::ENOTTY, &format!("ioctl {other:#x} of a TD is not modelled")),
    }
}

fn below(td: &Td, request: u64, arg: u64) -> Sys<i32> {
    // SAFETY: the program's own argument for the same request.
    unsafe { raw::ioctl(td.fd.0, request, arg) }
}

fn enable(td: &Td, state: &mut State, arg: u64) -> Sys<i32> {
    let profile = profile::get();
    let args: kvm_enable_cap = raw::get(arg)?;
    let what = format!("KVM_ENABLE_CAP {}", args.cap);
    if args.flags != 0 {
        return refuse(libc::EINVAL, &format!("{what}: flags"));
    }
    match args.cap {
        KVM_CAP_EXIT_HYPERCALL => {
            if profile.host_is("no-exit-hypercall") || args.args[0] & !(1 << HC_MAP_GPA_RANGE) != 0
            {
                return refuse(libc::EINVAL, &what);
            }
            if !profile.makes("exit-hypercall", "skip") {
                state.exits = args.args[0] != 0;
            }
            Ok(0)
        }
        KVM_CAP_SPLIT_IRQCHIP => {
            if profile.host_is("no-split-irqchip") {
                return refuse(libc::EINVAL, &what);
            }
            if profile.makes("split-irqchip", "skip") {
                return Ok(0);
            }
            below(td, ioctl::ENABLE_CAP, arg)?;
            state.split_irqchip = true;
            Ok(0)
        }
        KVM_CAP_X2APIC_API => below(td, ioctl::ENABLE_CAP, arg),
        // KVM_CAP_MAX_VCPUS among them: on x86 it can be asked for, not set.
        _ => refuse(libc::EINVAL, &format!("{what}: not a capability to enable for a TD")),
    }
}

/// KVM_CREATE_VCPU: `kvm_vm_ioctl_create_vcpu`, `tdx_vcpu_create`.
fn create_vcpu(td: &Arc<Td>, state: &mut State, id: u64) -> Sys<i32> {
    let what = format!("KVM_CREATE_VCPU {id}");
    let profile = profile::get();
    if profile.host_is("create-vcpu") {
        return refuse(libc::ENOMEM, &what);
    }
    if i64::from(state.created) >= i64::from(most_vcpus()) {
        return refuse(libc::EINVAL, &format!("{what}: more than KVM_CAP_MAX_VCPUS"));
    }
    if state.stage != crate::td::Stage::Initialized {
        return refuse(libc::EIO, &format!("{what}: not between INIT_VM and FINALIZE_VM"));
    }
    if !state.split_irqchip {
        return refuse(libc::EINVAL, &format!("{what}: no split irqchip"));
    }
    let fd = below(td, ioctl::CREATE_VCPU, id)?;
    match Vcpu::new(td, fd) {
        Ok(vcpu) => {
            lock(&td.runners).push(Arc::clone(&vcpu.runner));
            registry::add(fd, Handle::Vcpu(Arc::new(vcpu)));
            log::VCPUS.take();
            state.created += 1;
            Ok(fd)
        }
        Err(errno) => {
            let _ = raw::close(fd);
            Err(errno)
        }
    }
}
