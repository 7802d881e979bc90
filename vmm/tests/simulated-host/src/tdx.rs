//! KVM_MEMORY_ENCRYPT_OP of a TD and of its vCPUs: order, sizes, reserved fields and flags as KVM checks
//! them, and what the TDX module checks behind it.
//!
//! Source: Linux, arch/x86/kvm/vmx/tdx.c, 6.16 to 7.2 (`tdx_vm_ioctl`, `tdx_vcpu_ioctl` and what they
//! call).

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use mapgpa_abi::PAGE_SIZE;
use mapgpa_abi::tdcall::{ATTR_SEPT_VE_DISABLE, INSTRUCTION, TRAP, module};
use mapgpa_kvm_model::Kernel;

use crate::log::refuse;
use crate::memory::Sept;
use crate::raw::{self, Sys};
use crate::td::{Stage, State, Td};
use crate::uapi::{Cpuid2, MEASURE, TdxCapabilities, TdxCmd, TdxInitMemRegion, TdxInitVm, cmd};
use crate::vcpu::Vcpu;
use crate::{cpuid, profile};

/// x87, SSE, AVX, AVX-512, PKU and AMX: XFAM of a TD, as far as this host goes.
const XFAM: u64 = 0x6_02e7;
/// Operand number of the CPUID configuration in the details of TDX_OPERAND_INVALID.
const OPERAND_CPUID_CONFIG: u64 = 68;
/// Whether a signal has interrupted KVM_TDX_INIT_MEM_REGION, which it does once.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// A TDX module error that a broken host gives: TDX_SYS_BUSY.
const BROKEN: u64 = 0xc000_0202_0000_0000;

/// The name of a sub-command in the list of mistakes.
fn key(id: u32) -> &'static str {
    match id {
        cmd::CAPABILITIES => "capabilities",
        cmd::INIT_VM => "init-vm",
        cmd::INIT_VCPU => "init-vcpu",
        cmd::INIT_MEM_REGION => "init-mem-region",
        cmd::FINALIZE_VM => "finalize",
        _ => "",
    }
}

/// Runs a sub-command with the mistakes that the environment wants; `kept` are those that KVM copies
/// back to the caller.
fn op(arg: u64, run: impl FnMut(&mut TdxCmd) -> Sys<()>, copies_back: bool) -> Sys<i32> {
    let mut run = run;
    let profile = profile::get();
    let mut command: TdxCmd = raw::get(arg)?;
    let name = cmd::name(command.id);
    let makes = |what| profile.makes(key(command.id), what);
    if makes("skip") {
        return Ok(0);
    }
    let (flags, hw_error, id, twice, pointer) =
        (makes("flags"), makes("hw-error"), makes("id"), makes("twice"), makes("pointer"));
    if flags {
        command.flags = 1 << 31;
    }
    if hw_error {
        command.hw_error = 1;
    }
    if pointer {
        command.data = 8;
    }
    if command.hw_error != 0 {
        return refuse(libc::EINVAL, &format!("{name}: hw_error is not 0"));
    }
    if id {
        command.id = 99;
    }
    let known = command.id <= cmd::TERMINATE_VM;
    let mut result = run(&mut command);
    if twice && result.is_ok() {
        result = run(&mut command);
    }
    // An error code of the TDX module's goes back with the errno.
    if copies_back && known {
        raw::put(arg, &command)?;
    }
    result.map(|()| 0)
}

/// KVM_MEMORY_ENCRYPT_OP of a TD.
pub(crate) fn vm_op(td: &Td, state: &mut State, arg: u64) -> Sys<i32> {
    op(
        arg,
        |command| match command.id {
            cmd::CAPABILITIES => capabilities(command),
            cmd::INIT_VM => init_vm(td, state, command),
            cmd::FINALIZE_VM => finalize(state, command),
            cmd::TERMINATE_VM if profile::get().kernel != Kernel::V6_16 => {
                state.dead = true;
                Ok(())
            }
            id => refuse(libc::EINVAL, &format!("{} of a VM", cmd::name(id))),
        },
        true,
    )
}

/// `tdx_get_capabilities`.
fn capabilities(command: &TdxCmd) -> Sys<()> {
    let what = "KVM_TDX_CAPABILITIES";
    let profile = profile::get();
    if profile.host_is("capabilities") {
        return refuse(libc::EIO, what);
    }
    if command.flags != 0 {
        return refuse(libc::EINVAL, &format!("{what}: flags"));
    }
    let at = std::mem::offset_of!(TdxCapabilities, nent) as u64;
    let room: u32 = match raw::get(command.data.wrapping_add(at)) {
        Ok(room) => room,
        Err(errno) => return refuse(errno, &format!("{what}: data")),
    };
    let entries = cpuid::configurable();
    if room < len(&entries) || profile.makes("capabilities", "nent") {
        return refuse(libc::E2BIG, &format!("{what}: room for {room} CPUID entries"));
    }
    let caps = TdxCapabilities {
        supported_attrs: ATTR_SEPT_VE_DISABLE,
        supported_xfam: XFAM,
        // SetupEventNotifyInterrupt goes to user space.
        user_tdvmcallinfo_1_r11: 1 << 1,
        nent: len(&entries),
        ..TdxCapabilities::default()
    };
    raw::put(command.data, &caps)?;
    put_entries(command.data + size_of::<TdxCapabilities>() as u64, &entries)
}

fn len(entries: &[kvm_cpuid_entry2]) -> u32 {
    u32::try_from(entries.len()).unwrap_or(u32::MAX)
}

fn put_entries(at: u64, entries: &[kvm_cpuid_entry2]) -> Sys<()> {
    let size = size_of::<kvm_cpuid_entry2>() as u64;
    (0u64..).zip(entries).try_for_each(|(i, entry)| raw::put(at + i * size, entry))
}

/// The CPUID entries behind a header at `at`.
pub(crate) fn entries_at(at: u64, count: u32) -> Sys<Vec<kvm_cpuid_entry2>> {
    let size = size_of::<kvm_cpuid_entry2>() as u64;
    (0..u64::from(count)).map(|i| raw::get(at + i * size)).collect()
}

/// `tdx_td_init`.
fn init_vm(td: &Td, state: &mut State, command: &mut TdxCmd) -> Sys<()> {
    let what = "KVM_TDX_INIT_VM";
    let invalid = |why: &str| refuse(libc::EINVAL, &format!("{what}: {why}"));
    let profile = profile::get();
    if state.stage != Stage::Uninitialized {
        return invalid("done already");
    }
    if command.flags != 0 {
        return invalid("flags");
    }
    let mut init: TdxInitVm = match raw::get(command.data) {
        Ok(init) => init,
        Err(errno) => return refuse(errno, &format!("{what}: data")),
    };
    let makes = |mistake| profile.makes("init-vm", mistake);
    if makes("nent") {
        init.nent = KVM_MAX_CPUID_ENTRIES as u32 + 1;
    }
    if init.nent as usize > KVM_MAX_CPUID_ENTRIES {
        return refuse(libc::E2BIG, &format!("{what}: {} CPUID entries", init.nent));
    }
    let mut config = entries_at(command.data + size_of::<TdxInitVm>() as u64, init.nent)?;
    if makes("reserved") {
        init.reserved[11] = 1;
    }
    if makes("padding") {
        init.padding = 1;
    }
    if makes("attributes") {
        init.attributes |= 1;
    }
    if makes("xfam") {
        init.xfam |= 1 << 62;
    }
    if makes("gpaw") {
        config.retain(|entry| entry.function != cpuid::ADDRESS_LEAF);
    }
    if makes("cpuid-entry") {
        config.push(kvm_cpuid_entry2 { function: 0x16, ..kvm_cpuid_entry2::default() });
    }
    if makes("cpuid-bit")
        && let Some(entry) = config.iter_mut().find(|e| e.function == cpuid::ADDRESS_LEAF)
    {
        entry.edx = 1;
    }
    if init.reserved != [0; 12] {
        return invalid("reserved");
    }
    if init.padding != 0 {
        return invalid("padding of the CPUID configuration");
    }
    if init.attributes & !ATTR_SEPT_VE_DISABLE != 0 {
        return invalid("attributes");
    }
    if init.xfam & !XFAM != 0 {
        return invalid("xfam");
    }
    let Some(gpaw) = cpuid::gpaw(&config) else {
        return invalid("no GPAW of 48 or 52 in CPUID 0x80000008 EAX[23:16]");
    };
    let module = match cpuid::check(&config) {
        Ok(()) => Ok(()),
        Err((false, why)) => return invalid(why),
        Err((true, why)) => Err(why),
    };
    // Only now does KVM turn to the TDX module.
    if profile.host_is("no-key-id") {
        return refuse(libc::ENOSPC, &format!("{what}: no key ID is left"));
    }
    if profile.host_is("init-vm-entropy") {
        return refuse(libc::EAGAIN, &format!("{what}: TDX_RND_NO_ENTROPY"));
    }
    if profile.host_is("init-vm") {
        return refuse(libc::EIO, &format!("{what}: TDH.MNG.CREATE failed"));
    }
    if let Err(why) = module {
        command.hw_error = module::OPERAND_INVALID | OPERAND_CPUID_CONFIG;
        return invalid(why);
    }
    state.stage = Stage::Initialized;
    state.attributes = init.attributes;
    state.gpaw = gpaw;
    state.config = config;
    // The GPAs of the shared aliases are known now.
    let slots: Vec<u32> = state.memory.slots.keys().copied().collect();
    slots.into_iter().try_for_each(|slot| td.map(state, slot))
}

/// `tdx_td_finalize`.
fn finalize(state: &mut State, command: &mut TdxCmd) -> Sys<()> {
    let what = "KVM_TDX_FINALIZE_VM";
    if state.stage != Stage::Initialized {
        return refuse(libc::EINVAL, &format!("{what}: before INIT_VM, or done already"));
    }
    let profile = profile::get();
    if profile.host_is("finalize") {
        command.hw_error = BROKEN;
        return refuse(libc::EIO, what);
    }
    if profile.host_is("finalize-busy") {
        command.hw_error = 0x8000_0200_0000_0000;
        return refuse(libc::EBUSY, &format!("{what}: TDX_OPERAND_BUSY"));
    }
    state.stage = Stage::Runnable;
    Ok(())
}

/// KVM_MEMORY_ENCRYPT_OP of a vCPU.
pub(crate) fn vcpu_op(vcpu: &Vcpu, state: &mut State, arg: u64) -> Sys<i32> {
    if state.stage != Stage::Initialized {
        let name = raw::get(arg).map_or("a sub-command", |command: TdxCmd| cmd::name(command.id));
        return refuse(libc::EINVAL, &format!("{name}: not between INIT_VM and FINALIZE_VM"));
    }
    op(
        arg,
        |command| match command.id {
            cmd::INIT_VCPU => vcpu.init(state, command),
            cmd::INIT_MEM_REGION => init_mem_region(vcpu, state, command),
            cmd::GET_CPUID => get_cpuid(vcpu, state, command),
            id => refuse(libc::EINVAL, &format!("{} of a vCPU", cmd::name(id))),
        },
        false,
    )
}

/// `tdx_vcpu_get_cpuid`.
fn get_cpuid(vcpu: &Vcpu, state: &State, command: &TdxCmd) -> Sys<()> {
    let mut header: Cpuid2 = raw::get(command.data)?;
    let entries = cpuid::of_td(vcpu.td.kvm.0, &state.config, state.gpaw)?;
    let room = std::mem::replace(&mut header.nent, len(&entries));
    raw::put(command.data, &header)?;
    if room < header.nent {
        return refuse(libc::E2BIG, &format!("KVM_TDX_GET_CPUID: room for {room} entries"));
    }
    put_entries(command.data + size_of::<Cpuid2>() as u64, &entries)
}

/// `tdx_vcpu_init_mem_region`.
fn init_mem_region(vcpu: &Vcpu, state: &mut State, command: &TdxCmd) -> Sys<()> {
    let what = "KVM_TDX_INIT_MEM_REGION";
    let invalid = |why: &str| refuse(libc::EINVAL, &format!("{what}: {why}"));
    let profile = profile::get();
    if !vcpu.is_initialized() {
        return invalid("before INIT_VCPU");
    }
    if command.flags & !MEASURE != 0 {
        return invalid("flags");
    }
    let mut region: TdxInitMemRegion = match raw::get(command.data) {
        Ok(region) => region,
        Err(errno) => return refuse(errno, &format!("{what}: data")),
    };
    let makes = |mistake| profile.makes("init-mem-region", mistake);
    if makes("gpa") {
        region.gpa += 1;
    }
    if makes("source") {
        region.source_addr += 1;
    }
    if makes("pages") {
        region.nr_pages = 0;
    }
    if makes("shared") {
        region.gpa |= state.shared_bit();
    }
    let size = region.nr_pages.wrapping_mul(PAGE_SIZE);
    let end = region.gpa.wrapping_add(size);
    let private = |gpa: u64| gpa & state.shared_bit() == 0;
    if !region.source_addr.is_multiple_of(PAGE_SIZE)
        || (region.source_addr == 0 && profile.kernel != Kernel::V6_16)
        || !region.gpa.is_multiple_of(PAGE_SIZE)
        || region.nr_pages == 0
        || end <= region.gpa
        || !private(region.gpa)
        || !private(end - 1)
    {
        return invalid(&format!("{region:x?}"));
    }
    if profile.host_is("init-mem-region") {
        return refuse(libc::EIO, &format!("{what}: TDH.MEM.PAGE.ADD failed"));
    }
    if profile.host_is("init-mem-region-busy") {
        return refuse(libc::EBUSY, &format!("{what}: TDX_OPERAND_BUSY"));
    }
    let result = add_pages(vcpu, state, &mut region);
    raw::put(command.data, &region)?;
    result
}

/// Adds pages one by one, `region` following; TDCALL in them becomes what this library can see.
fn add_pages(vcpu: &Vcpu, state: &mut State, region: &mut TdxInitMemRegion) -> Sys<()> {
    let what = "KVM_TDX_INIT_MEM_REGION";
    let bytes =
        usize::try_from(region.nr_pages.saturating_mul(PAGE_SIZE)).map_err(|_| libc::EINVAL)?;
    // A source that is there in part is added in part, so it is read page by page.
    let mut source = Vec::new();
    let mut page = vec![0; PAGE_SIZE as usize];
    while source.len() < bytes
        && raw::copy_in(region.source_addr + source.len() as u64, &mut page).is_ok()
    {
        source.extend_from_slice(&page);
    }
    let sites: Vec<usize> = memchr::memmem::find_iter(&source, &INSTRUCTION).collect();
    for site in sites {
        source[site..site + TRAP.len()].copy_from_slice(&TRAP);
    }
    let mut interrupts = profile::get().host_is("init-mem-region-interrupted")
        && !INTERRUPTED.swap(true, Ordering::Relaxed);
    for page in source.chunks_exact(PAGE_SIZE as usize) {
        let gpa = region.gpa;
        if state.memory.slot(gpa).is_none_or(|slot| slot.private.is_none()) {
            return refuse(libc::EINVAL, &format!("{what}: no guest_memfd at {gpa:#x}"));
        }
        if !state.memory.is_private(gpa) {
            return refuse(libc::EINVAL, &format!("{what}: {gpa:#x} is not private by attributes"));
        }
        if state.memory.sept(gpa) != Sept::Free {
            return refuse(libc::EEXIST, &format!("{what}: {gpa:#x} is added already"));
        }
        state.memory.add_page(&vcpu.td.uffd, gpa, page)?;
        region.source_addr += PAGE_SIZE;
        region.gpa += PAGE_SIZE;
        region.nr_pages -= 1;
        if std::mem::take(&mut interrupts) && region.nr_pages > 0 {
            return refuse(libc::EINTR, &format!("{what}: a signal"));
        }
    }
    if region.nr_pages == 0 {
        Ok(())
    } else {
        refuse(libc::EFAULT, &format!("{what}: source_addr {:#x}", region.source_addr))
    }
}
