//! CPUID of a TD: which bits user space may configure, and what the guest then sees.
//!
//! The table is that of the TDX module 1.5 as `intel/tdx-module` has it
//! (include/auto_gen_1_5/cpuid_configurations.c: `config_direct` and `allow_direct`), less what KVM
//! keeps back (`tdx_clear_unsupported_cpuid` in arch/x86/kvm/vmx/tdx.c: TSX and WAITPKG).

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};

use crate::raw::{self, Sys};
use crate::uapi::ioctl;

/// Index of a leaf without sub-leaves in the module's table.
const NONE: u32 = u32::MAX;
/// Leaf, sub-leaf, and the configurable bits of EAX, EBX, ECX, EDX.
const CONFIGURABLE: [(u32, u32, [u32; 4]); 28] = [
    (0x1, NONE, [0x0fff_3fff, 0x00ff_0000, 0x3104_4d88, 0xb844_5080]),
    (0x4, 0, [0xffff_c3ff, 0xffff_f000, 0xffff_ffff, 0x7]),
    (0x4, 1, [0xffff_c3ff, 0xffff_f000, 0xffff_ffff, 0x7]),
    (0x4, 2, [0xffff_c3ff, 0xffff_f000, 0xffff_ffff, 0x7]),
    (0x4, 3, [0xffff_c3ff, 0xffff_f000, 0xffff_ffff, 0x7]),
    (0x7, 0, [0, 0xdc2b_9b18 & !TSX, 0x0241_7f65 & !WAITPKG, 0x4005_411c]),
    (0x7, 1, [0x0488_1db0, 0, 0, 0x0002_4430]),
    (0xa, NONE, [0; 4]),
    (0x1c, NONE, [0xff, 0, 0, 0]),
    // KVM takes the GPAW through bits 23:16, which the module does not configure.
    (0x8000_0008, NONE, [0x00ff_00ff, 0x200, 0, 0]),
    (0x7, 2, [0, 0, 0, 0x28]),
    (0x23, 0, [0xf, 0, 0, 0]),
    (0x1f, 0, [0x1f, 0xffff, 0xffff, 0]),
    (0x1f, 1, [0x1f, 0xffff, 0xffff, 0]),
    (0x1f, 2, [0x1f, 0xffff, 0xffff, 0]),
    (0x1f, 3, [0x1f, 0xffff, 0xffff, 0]),
    (0x1f, 4, [0x1f, 0xffff, 0xffff, 0]),
    (0x1f, 5, [0x1f, 0xffff, 0xffff, 0]),
    (0x19, NONE, [0; 4]),
    (0x18, 0, [0, 0, 0, 0x03ff_c000]),
    (0x18, 1, [0, 0, 0, 0x03ff_c000]),
    (0x18, 2, [0, 0, 0, 0x03ff_c000]),
    (0x18, 3, [0, 0, 0, 0x03ff_c000]),
    (0x18, 4, [0, 0, 0, 0x03ff_c000]),
    (0x18, 5, [0, 0, 0, 0x03ff_c000]),
    (0x18, 6, [0, 0, 0, 0x03ff_c000]),
    (0x18, 7, [0, 0, 0, 0x03ff_c000]),
    (0x18, 8, [0, 0, 0, 0x03ff_c000]),
];
/// HLE and RTM in leaf 7's EBX.
const TSX: u32 = 1 << 4 | 1 << 11;
/// WAITPKG in leaf 7's ECX.
const WAITPKG: u32 = 1 << 5;
/// The leaf whose EAX has address widths.
pub(crate) const ADDRESS_LEAF: u32 = 0x8000_0008;
/// x2APIC in leaf 1's ECX.
pub(crate) const X2APIC: u32 = 1 << 21;

/// What KVM_TDX_CAPABILITIES says: masks of the configurable bits. The module's index for "no
/// sub-leaf" is 0 here (`td_init_cpuid_entry2`).
pub(crate) fn configurable() -> Vec<kvm_cpuid_entry2> {
    let entry = |(function, index, [eax, ebx, ecx, edx]): (u32, u32, [u32; 4])| kvm_cpuid_entry2 {
        function,
        index: if index == NONE { 0 } else { index },
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    };
    CONFIGURABLE.into_iter().map(entry).collect()
}

/// The entry of a leaf, as `kvm_find_cpuid_entry2` finds it.
pub(crate) fn find(
    entries: &[kvm_cpuid_entry2],
    function: u32,
    index: u32,
) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|entry| {
        entry.function == function
            && (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || entry.index == index)
    })
}

/// The GPAW that a configuration asks for: `setup_tdparams_eptp_controls`.
pub(crate) fn gpaw(entries: &[kvm_cpuid_entry2]) -> Option<u32> {
    let bits = find(entries, ADDRESS_LEAF, 0)?.eax >> 16 & 0xff;
    matches!(bits, 48 | 52).then_some(bits)
}

/// Why a configuration is refused: by KVM's `setup_tdparams_cpuids` (false), or by the TDX module,
/// with an error code (true).
pub(crate) fn check(entries: &[kvm_cpuid_entry2]) -> Result<(), (bool, &'static str)> {
    let mut found = 0;
    for mask in configurable() {
        let Some(entry) = find(entries, mask.function, mask.index) else { continue };
        found += 1;
        if entry.function == 7
            && entry.index == 0
            && (entry.ebx & TSX != 0 || entry.ecx & WAITPKG != 0)
        {
            return Err((false, "TSX or WAITPKG in CPUID"));
        }
        let beyond = entry.eax & !mask.eax
            | entry.ebx & !mask.ebx
            | entry.ecx & !mask.ecx
            | entry.edx & !mask.edx;
        if beyond != 0 {
            return Err((true, "a CPUID bit that is not configurable"));
        }
    }
    if found == entries.len() {
        Ok(())
    } else {
        Err((false, "a CPUID leaf that is not configurable, or one twice"))
    }
}

/// What this machine's KVM offers guests.
fn native(kvm: i32) -> Sys<CpuId> {
    let mut cpuid = CpuId::new(KVM_MAX_CPUID_ENTRIES).map_err(|_| libc::ENOMEM)?;
    // SAFETY: the structure has room for as many entries as it says.
    unsafe {
        let at = cpuid.as_mut_fam_struct_ptr().expose_provenance() as u64;
        raw::ioctl(kvm, ioctl::GET_SUPPORTED_CPUID, at)?;
    }
    Ok(cpuid)
}

/// What a TD with this configuration sees: this machine's values, the configured bits, and leaf 0x21.
pub(crate) fn of_td(
    kvm: i32,
    config: &[kvm_cpuid_entry2],
    gpaw: u32,
) -> Sys<Vec<kvm_cpuid_entry2>> {
    let masks = configurable();
    let mut entries: Vec<_> = native(kvm)?
        .as_slice()
        .iter()
        .filter(|entry| {
            entry.function <= 0x23 || (0x8000_0000..=ADDRESS_LEAF).contains(&entry.function)
        })
        .filter(|entry| entry.function != 0x21)
        .copied()
        .collect();
    for entry in &mut entries {
        let mask = masks.iter().find(|m| (m.function, m.index) == (entry.function, entry.index));
        if let Some(mask) = mask {
            // A leaf that is not configured has none of the configurable bits.
            let wanted = find(config, entry.function, entry.index).copied().unwrap_or_default();
            entry.eax = entry.eax & !mask.eax | wanted.eax;
            entry.ebx = entry.ebx & !mask.ebx | wanted.ebx;
            entry.ecx = entry.ecx & !mask.ecx | wanted.ecx;
            entry.edx = entry.edx & !mask.edx | wanted.edx;
        }
        match entry.function {
            0 => entry.eax = 0x23,
            1 => entry.ecx |= 1 << 31 | X2APIC,
            ADDRESS_LEAF => entry.eax = entry.eax & !0x00ff_0000 | gpaw << 16,
            _ => {}
        }
    }
    let (ebx, ecx, edx) = (0x6574_6e49, 0x2020_2020, 0x5844_546c); // "Intel", "TDX", four blanks
    entries.push(kvm_cpuid_entry2 {
        function: 0x21,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    });
    Ok(entries)
}
