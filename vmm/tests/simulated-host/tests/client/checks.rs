//! Tests that run no guest code.

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_MAX_VCPUS, KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_SYNC_REGS, KVM_CAP_VM_TYPES, kvm_debugregs, kvm_fpu,
    kvm_lapic_state, kvm_regs, kvm_sregs, kvm_userspace_memory_region2, kvm_xcrs,
};
use libc::{EBADF, EEXIST, EINVAL, EIO, EOPNOTSUPP};

use super::td::{RAM, Td};
use super::uapi::{TdxInitMemRegion, cmd, ioctl};
use super::{Needs, Test};

const OLD: &[(&str, &str)] = &[("MAPGPA_SIM_KERNEL", "6.16")];

pub const TESTS: &[Test] = &[
    ("a TD is made", Needs::Host, &[], a_td_is_made),
    ("a TD is made on 6.16", Needs::Host, OLD, a_td_is_made),
    ("capabilities", Needs::Host, &[], capabilities),
    ("registers are hidden", Needs::Host, &[], registers_are_hidden),
    ("order", Needs::Host, &[], order),
    ("memory slots", Needs::Host, &[], memory_slots),
    ("guest_memfd", Needs::Host, &[], guest_memfd),
    ("initial memory", Needs::Host, &[], initial_memory),
    ("terminate", Needs::Host, &[], terminate),
    ("6.16 cannot terminate", Needs::Host, OLD, cannot_terminate),
    ("the release of the kernel", Needs::Host, OLD, release),
];

/// What the machine needs for a TD.
pub fn can_make_a_td() {
    if let Err((call, errno)) = Td::build(&[]).map(Td::close) {
        let error = std::io::Error::from_raw_os_error(errno);
        eprintln!("missing: this KVM cannot carry a simulated TD: {call}: {error}");
        std::process::exit(1);
    }
}

fn a_td_is_made() {
    Td::build(&[]).expect("a TD").close();
}

fn capabilities() {
    let td = Td::create().expect("a TD");
    assert_eq!(td.extension(KVM_CAP_VM_TYPES).expect("types") & 0x21, 0x21);
    assert_eq!(td.extension(KVM_CAP_GUEST_MEMFD), Ok(1));
    assert_eq!(td.extension(KVM_CAP_MEMORY_ATTRIBUTES), Ok(8));
    assert_eq!(td.extension(KVM_CAP_EXIT_HYPERCALL), Ok(1 << 12));
    assert_eq!(td.extension(KVM_CAP_SPLIT_IRQCHIP), Ok(1));
    assert_eq!(td.extension(KVM_CAP_SYNC_REGS), Ok(0));
    assert_eq!(td.enable(KVM_CAP_EXIT_HYPERCALL, 1 << 11), Err(EINVAL));
    assert_eq!(td.enable(KVM_CAP_MAX_VCPUS, 1), Err(EINVAL), "can be asked for only");
    let caps = td.capabilities().expect("capabilities");
    assert_eq!(caps.head.supported_attrs, 1 << 28);
    assert_eq!(caps.head.supported_xfam & 3, 3);
    assert!(caps.entries.iter().any(|entry| entry.function == 0x8000_0008));
    td.close();
}

fn registers_are_hidden() {
    let td = Td::build(&[]).expect("a TD");
    for request in [ioctl::GET_REGS, ioctl::SET_REGS] {
        assert_eq!(td.vcpu_ioctl::<kvm_regs>(request), Err(EINVAL));
    }
    for request in [ioctl::GET_SREGS, ioctl::SET_SREGS] {
        assert_eq!(td.vcpu_ioctl::<kvm_sregs>(request), Err(EINVAL));
    }
    for request in [ioctl::GET_FPU, ioctl::SET_FPU] {
        assert_eq!(td.vcpu_ioctl::<kvm_fpu>(request), Err(EINVAL));
    }
    for request in [ioctl::GET_LAPIC, ioctl::SET_LAPIC] {
        assert_eq!(td.vcpu_ioctl::<kvm_lapic_state>(request), Err(EINVAL));
    }
    assert_eq!(td.vcpu_ioctl::<kvm_debugregs>(ioctl::GET_DEBUGREGS), Err(EINVAL));
    assert_eq!(td.vcpu_ioctl::<kvm_xcrs>(ioctl::GET_XCRS), Err(EINVAL));
    // Nor by way of the shared page.
    // SAFETY: mapped; the vCPU is not running.
    unsafe { (*td.run).kvm_valid_regs = 1 };
    assert_eq!(td.enter(), Err(EINVAL));
    td.close();
}

fn order() {
    let mut td = Td::create().expect("a TD");
    td.enable_both().expect("capabilities");
    assert_eq!(td.create_vcpu(), Err(EIO), "before INIT_VM");
    assert_eq!(td.finalize().0, Err(EINVAL), "before INIT_VM");
    let params = td.params();
    assert_eq!(td.init_vm(params).0, Ok(0));
    td.create_vcpu().expect("a vCPU");
    assert_eq!(td.init_vcpu(), Err(EINVAL), "x2APIC is not in its CPUID yet");
    td.cpuid().expect("CPUID");
    td.slots().expect("memory");
    td.all_private().expect("attributes");
    assert_eq!(td.add_guest(&[]), Err(EINVAL), "before INIT_VCPU");
    td.init_vcpu().expect("INIT_VCPU");
    assert_eq!(td.op(td.vcpu, cmd::FINALIZE_VM, 0, std::ptr::null_mut::<u8>()).0, Err(EINVAL));
    assert_eq!(td.op(td.vm, cmd::INIT_VCPU, 0, std::ptr::null_mut::<u8>()).0, Err(EINVAL));
    assert_eq!(td.enter(), Err(EINVAL), "before FINALIZE_VM");
    td.add_guest(&[]).expect("memory");
    assert_eq!(td.finalize().0, Ok(0));
    assert_eq!(td.add_guest(&[]), Err(EINVAL), "after FINALIZE_VM");
    assert_eq!(td.cpuid(), Err(EINVAL), "after FINALIZE_VM");
    td.close();

    let td = Td::create().expect("a TD");
    let mut params = td.params();
    params.entries[0].edx = 1;
    let (result, hw_error) = td.init_vm(params);
    assert_eq!(result, Err(EINVAL));
    assert_eq!(hw_error >> 32, 0xc000_0100, "TDX_OPERAND_INVALID");
    td.close();
}

fn memory_slots() {
    let mut td = Td::create().expect("a TD");
    let params = td.params();
    td.init_vm(params).0.expect("INIT_VM");
    td.create_memfd().expect("guest_memfd");
    let good = td.slot(0);
    let with = |change: fn(&mut kvm_userspace_memory_region2)| {
        let mut region = good;
        change(&mut region);
        td.region(region)
    };
    assert_eq!(with(|r| r.flags |= 2), Err(EINVAL), "read-only");
    assert_eq!(with(|r| r.flags |= 1), Err(EINVAL), "private memory is not logged");
    assert_eq!(with(|r| r.guest_phys_addr = 1), Err(EINVAL));
    assert_eq!(with(|r| r.memory_size += 1), Err(EINVAL));
    assert_eq!(with(|r| r.userspace_addr += 1), Err(EINVAL));
    assert_eq!(with(|r| r.guest_memfd_offset = 1), Err(EINVAL));
    assert_eq!(with(|r| r.guest_memfd_offset = 1 << 20), Err(EINVAL), "beyond the end");
    assert_eq!(with(|r| r.guest_phys_addr = 1 << 47), Err(EINVAL), "the shared alias");
    assert_eq!(with(|r| r.guest_memfd = u32::MAX), Err(EBADF));
    assert_eq!(with(|r| r.guest_memfd = 0), Err(EINVAL), "no guest_memfd");
    assert_eq!(with(|r| r.memory_size = 0), Err(EINVAL), "nothing to delete");
    assert_eq!(td.region(good), Ok(0));
    assert_eq!(td.region(good), Err(EINVAL), "it cannot be changed");
    assert_eq!(with(|r| r.slot = 2), Err(EEXIST), "it overlaps");
    let mut elsewhere = good;
    (elsewhere.slot, elsewhere.guest_phys_addr) = (2, 1 << 30);
    assert_eq!(td.region(elsewhere), Err(EEXIST), "bound already");
    assert_eq!(with(|r| r.memory_size = 0), Ok(0));
    assert_eq!(td.region(good), Ok(0));
    td.close();
}

fn guest_memfd() {
    let mut td = Td::create().expect("a TD");
    td.create_memfd().expect("guest_memfd");
    // SAFETY: calls on a descriptor.
    let hole = |mode, at, len| unsafe {
        if libc::fallocate(td.memfd, mode, at, len) == 0 { Ok(()) } else { Err(super::td::errno()) }
    };
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(hole(punch, 0, 4096), Ok(()));
    assert_eq!(hole(punch, 1, 4096), Err(EINVAL));
    assert_eq!(hole(punch, 0, 4095), Err(EINVAL));
    assert_eq!(hole(0, 0, 4096), Err(EOPNOTSUPP));
    // SAFETY: the kernel's answer is all that is wanted.
    let mapped = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, td.memfd, 0)
    };
    assert_eq!(mapped, libc::MAP_FAILED);
    td.close();
}

fn initial_memory() {
    let mut td = Td::create().expect("a TD");
    td.enable_both().expect("capabilities");
    let params = td.params();
    td.init_vm(params).0.expect("INIT_VM");
    td.create_vcpu().expect("a vCPU");
    td.cpuid().expect("CPUID");
    td.slots().expect("memory");
    td.init_vcpu().expect("INIT_VCPU");
    let source = td.ram.expose_provenance() as u64;
    let page = |gpa| TdxInitMemRegion { source_addr: source, gpa, nr_pages: 1 };
    assert_eq!(td.add(&mut page(0)), Err(EINVAL), "not private by attributes");
    td.all_private().expect("attributes");
    assert_eq!(td.add(&mut page(RAM)), Err(EINVAL), "no memory there");
    let mut first = page(0);
    assert_eq!(td.add(&mut first), Ok(0));
    assert_eq!((first.gpa, first.nr_pages), (4096, 0), "KVM says how far it came");
    assert_eq!(td.add(&mut page(0)), Err(EEXIST), "added already");
    assert_eq!(td.attributes(0, 4096, false), Ok(0));
    assert_eq!(td.attributes(0, 4096, true), Ok(0));
    assert_eq!(td.add(&mut page(0)), Ok(0), "converted meanwhile, so that it is not there");
    for (address, size) in [(1, 4096), (0, 4095), (0, 0), (!0xfff, 0x2000)] {
        assert_eq!(td.attributes(address, size, true), Err(EINVAL), "{address:#x} {size:#x}");
    }
    td.close();
}

fn terminate() {
    let td = Td::build(&[]).expect("a TD");
    assert_eq!(td.terminate(), Ok(0));
    assert_eq!(td.terminate(), Err(EIO));
    assert_eq!(td.enter(), Err(EIO));
    td.close();
}

fn cannot_terminate() {
    let td = Td::build(&[]).expect("a TD");
    assert_eq!(td.terminate(), Err(EINVAL));
    td.close();
}

fn release() {
    // SAFETY: zeros are a valid structure, which the call fills.
    let release = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        assert_eq!(libc::uname(&raw mut name), 0);
        std::ffi::CStr::from_ptr(name.release.as_ptr()).to_owned()
    };
    assert!(release.to_bytes().starts_with(b"6.16."), "{release:?}");
}
