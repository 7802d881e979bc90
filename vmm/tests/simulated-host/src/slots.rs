//! Memslots, guest_memfd files and memory attributes of a TD, with KVM's checks.
//!
//! Sources: Linux, virt/kvm/kvm_main.c (`kvm_set_memory_region`, `check_memory_region_flags`,
//! `kvm_vm_ioctl_set_mem_attributes`), virt/kvm/guest_memfd.c (`kvm_gmem_create`, `kvm_gmem_bind`,
//! `kvm_gmem_fallocate`), arch/x86/kvm/x86.c (`kvm_arch_prepare_memory_region`).

use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2,
};
use mapgpa_abi::PAGE_SIZE;

use crate::log::refuse;
use crate::memory::{Memfd, Slot};
use crate::profile;
use crate::raw::{self, Mapping, OwnFd, Sys};
use crate::registry::{self, Handle};
use crate::td::{State, Td, lock};

/// KVM_USER_MEM_SLOTS.
const MOST_SLOTS: u32 = 32764;

const fn aligned(value: u64) -> bool {
    value.is_multiple_of(PAGE_SIZE)
}

/// KVM_CREATE_GUEST_MEMFD; gives the program's descriptor and what is behind it.
pub(crate) fn create_memfd(td: &Arc<Td>, arg: u64) -> Sys<(i32, Arc<Memfd>)> {
    let what = "KVM_CREATE_GUEST_MEMFD";
    if profile::get().host_is("guest-memfd") {
        return refuse(libc::ENOMEM, what);
    }
    let args: kvm_create_guest_memfd = raw::get(arg)?;
    if args.flags != 0 {
        return refuse(libc::EINVAL, &format!("{what}: flags"));
    }
    if args.size == 0 || args.size > i64::MAX as u64 || !aligned(args.size) {
        return refuse(libc::EINVAL, &format!("{what}: size {:#x}", args.size));
    }
    let memory = Mapping::new(args.size, None)?;
    raw::madvise(memory.at, memory.size, libc::MADV_NOHUGEPAGE)?;
    td.uffd.register(memory.at, memory.size, false)?;
    let file = raw::memfd(c"guest_memfd", 0)?;
    let fd = file.0;
    // The program closes it.
    std::mem::forget(file);
    Ok((fd, Arc::new(Memfd { memory, owner: Arc::as_ptr(td).addr() })))
}

/// fallocate(2) on a guest_memfd.
pub(crate) fn fallocate(memfd: &Arc<Memfd>, mode: i32, offset: i64, len: i64) -> Sys {
    let what = "fallocate of a guest_memfd";
    let known = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    if mode & libc::FALLOC_FL_KEEP_SIZE == 0 || mode & !known != 0 {
        return refuse(libc::EOPNOTSUPP, &format!("{what}: mode {mode:#x}"));
    }
    let (Ok(offset), Ok(len)) = (u64::try_from(offset), u64::try_from(len)) else {
        return refuse(libc::EINVAL, &format!("{what}: offset or length"));
    };
    if len == 0 || !aligned(offset) || !aligned(len) {
        return refuse(libc::EINVAL, &format!("{what}: alignment"));
    }
    if mode & libc::FALLOC_FL_PUNCH_HOLE == 0 {
        return Ok(0);
    }
    let len = len.min(memfd.memory.size.saturating_sub(offset));
    let Some(td) = registry::td_at(memfd.owner) else { return Ok(0) };
    let mut state = lock(&td.state);
    state.memory.punch(memfd, offset, len).map(|()| 0)
}

/// KVM_SET_MEMORY_ATTRIBUTES.
pub(crate) fn set_attributes(state: &mut State, arg: u64) -> Sys<i32> {
    let what = "KVM_SET_MEMORY_ATTRIBUTES";
    let profile = profile::get();
    if profile.host_is("no-attributes") {
        return refuse(libc::ENOTTY, what);
    }
    if profile.host_is("set-attributes") {
        return refuse(libc::ENOMEM, what);
    }
    if profile.makes("set-attributes", "skip") {
        return Ok(0);
    }
    let mut args: kvm_memory_attributes = raw::get(arg)?;
    if profile.makes("set-attributes", "flags") {
        args.flags = 1;
    }
    if args.flags != 0 {
        return refuse(libc::EINVAL, &format!("{what}: flags"));
    }
    if args.attributes & !u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0 {
        return refuse(libc::EINVAL, &format!("{what}: attributes {:#x}", args.attributes));
    }
    if args.size == 0 || args.address.checked_add(args.size).is_none() {
        return refuse(libc::EINVAL, &format!("{what}: size {:#x}", args.size));
    }
    if !aligned(args.address) || !aligned(args.size) {
        return refuse(libc::EINVAL, &format!("{what}: alignment"));
    }
    state.memory.set_attributes(args.address, args.size, args.attributes != 0).map(|()| 0)
}

/// KVM_SET_USER_MEMORY_REGION and KVM_SET_USER_MEMORY_REGION2.
pub(crate) fn set_region(
    td: &Arc<Td>,
    state: &mut State,
    region: &kvm_userspace_memory_region2,
) -> Sys<i32> {
    let what = "KVM_SET_USER_MEMORY_REGION2";
    if profile::get().host_is("memory-region") {
        return refuse(libc::EINVAL, what);
    }
    let private = region.flags & KVM_MEM_GUEST_MEMFD != 0;
    // Private memory cannot be logged; read-only memory is not for a TD.
    let known = if private { KVM_MEM_GUEST_MEMFD } else { KVM_MEM_LOG_DIRTY_PAGES };
    if region.flags & !known != 0 {
        return refuse(libc::EINVAL, &format!("{what}: flags {:#x}", region.flags));
    }
    let (gpa, size, user) = (region.guest_phys_addr, region.memory_size, region.userspace_addr);
    if !aligned(gpa) || !aligned(size) || !aligned(user) {
        return refuse(libc::EINVAL, &format!("{what}: alignment"));
    }
    let offset = region.guest_memfd_offset;
    if private && (!aligned(offset) || offset.checked_add(size).is_none()) {
        return refuse(libc::EINVAL, &format!("{what}: guest_memfd_offset"));
    }
    if region.slot >= MOST_SLOTS {
        return refuse(libc::EINVAL, &format!("{what}: slot {}", region.slot));
    }
    let end = match gpa.checked_add(size) {
        Some(end)
            if gpa & state.shared_bit() == 0 && (state.gpaw == 0 || end <= state.shared_bit()) =>
        {
            end
        }
        _ => return refuse(libc::EINVAL, &format!("{what}: GPA {gpa:#x}, {size:#x} bytes")),
    };
    if size == 0 {
        return match td.unmap(state, region.slot) {
            Some(_) => Ok(0),
            None => refuse(libc::EINVAL, &format!("{what}: no slot {} to delete", region.slot)),
        };
    }
    if state.memory.slots.contains_key(&region.slot) {
        return refuse(libc::EINVAL, &format!("{what}: slot {} is there", region.slot));
    }
    let overlaps = |slot: &Slot| slot.gpa < end && gpa < slot.gpa + slot.size;
    if state.memory.slots.values().any(overlaps) {
        return refuse(libc::EEXIST, &format!("{what}: {gpa:#x} overlaps"));
    }
    let private = if private {
        Some((bind(td, state, region.guest_memfd, offset, size)?, offset))
    } else {
        None
    };
    let (shared, file) = view(user, size)?;
    raw::madvise(shared.at, shared.size, libc::MADV_NOHUGEPAGE)?;
    td.uffd.register(shared.at, shared.size, true)?;
    let slot = Slot::new((gpa, size, user), shared, file, private);
    state.memory.slots.insert(region.slot, slot);
    let mapped = td.map(state, region.slot);
    if mapped.is_err() {
        td.unmap(state, region.slot);
    }
    mapped.map(|()| 0)
}

/// `kvm_gmem_bind`.
fn bind(td: &Arc<Td>, state: &State, fd: u32, offset: u64, size: u64) -> Sys<Arc<Memfd>> {
    let what = "KVM_SET_USER_MEMORY_REGION2: guest_memfd";
    let fd = i32::try_from(fd).unwrap_or(-1);
    let Some(Handle::Memfd(memfd)) = registry::get(fd) else {
        let errno = if raw::dup(fd).is_ok() { libc::EINVAL } else { libc::EBADF };
        return refuse(errno, &format!("{what}: {fd} is none"));
    };
    if memfd.owner != Arc::as_ptr(td).addr() {
        return refuse(libc::EINVAL, &format!("{what}: another VM's"));
    }
    if offset + size > memfd.memory.size {
        return refuse(libc::EINVAL, &format!("{what}: beyond its end"));
    }
    let bound = state.memory.slots.values().any(|slot| {
        let other = slot.private.as_ref();
        other.is_some_and(|(other, from)| {
            Arc::ptr_eq(other, &memfd) && *from < offset + size && offset < from + slot.size
        })
    });
    if bound { refuse(libc::EEXIST, &format!("{what}: bound already")) } else { Ok(memfd) }
}

/// A second mapping of the program's memory, so that the guest's touches can be told from the
/// program's. Memory that cannot be mapped twice is replaced, in place, by a file with its contents.
fn view(user: u64, size: u64) -> Sys<(Mapping, Option<OwnFd>)> {
    // SAFETY: with an old size of 0 the old mapping stays as it is (mremap(2)).
    let again = unsafe {
        let old = std::ptr::with_exposed_provenance_mut(user as usize);
        libc::mremap(old, 0, size as usize, libc::MREMAP_MAYMOVE)
    };
    if again != libc::MAP_FAILED {
        return Ok((Mapping { at: again.expose_provenance() as u64, size }, None));
    }
    let file = raw::memfd(c"shared", size)?;
    let view = Mapping::new(size, Some(&file))?;
    let pages = usize::try_from(size / PAGE_SIZE).map_err(|_| libc::EINVAL)?;
    let mut present = vec![0u8; pages];
    // SAFETY: a byte for each page; the kernel refuses what is not mapped.
    let result = unsafe {
        let start = std::ptr::with_exposed_provenance_mut(user as usize);
        libc::mincore(start, size as usize, present.as_mut_ptr())
    };
    if result < 0 {
        return Err(libc::EFAULT);
    }
    let mut page = vec![0; PAGE_SIZE as usize];
    for (index, _) in present.iter().enumerate().filter(|(_, byte)| **byte & 1 != 0) {
        let at = index as u64 * PAGE_SIZE;
        raw::copy_in(user + at, &mut page)?;
        if page.iter().any(|byte| *byte != 0) {
            raw::put_bytes(view.at + at, &page)?;
        }
    }
    // The copies are in the file; the guest's view of them begins empty.
    raw::madvise(view.at, size, libc::MADV_DONTNEED)?;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    raw::mmap(user, size, libc::PROT_READ | libc::PROT_WRITE, flags, file.0, 0)?;
    Ok((view, Some(file)))
}

/// The program discards its shared memory, which is in a file of this library's where it was not in a
/// file already.
pub(crate) fn discard_shared(user: u64, size: u64) {
    for td in registry::tds() {
        let state = lock(&td.state);
        for slot in state.memory.slots.values() {
            let (start, end) = (user.max(slot.user), (user + size).min(slot.user + slot.size));
            let Some(file) = slot.file.as_ref().filter(|_| start < end) else { continue };
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let (at, len) = ((start - slot.user).cast_signed(), (end - start).cast_signed());
            // A file in memory has no reason to refuse.
            let _ = raw::fallocate(file.0, mode, at, len);
        }
    }
}
