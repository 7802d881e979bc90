//! What CPUID tells an emulated TD: what KVM can do, with a TDX guest's leaves, and without what
//! would lead a kernel astray.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// What the leaves depend on.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u32,
    /// vCPUs.
    pub vcpus: u8,
    /// Index of this one, which is its APIC id.
    pub index: u8,
    /// Guests can use XSAVE here. A KVM under emulation (QEMU's TCG) announces it and cannot do it,
    /// so a guest tries it beforehand (`backend::emulated::kernel_mode`).
    pub xsave: bool,
}

/// The highest basic leaf that a TDX guest needs: 0x21, TDX.
const TDX: u32 = 0x21;
/// Sapphire Rapids (family 6, model 0x8f, stepping 8), the first server processor with TDX. The
/// kernel asks the model only for errata.
const SIGNATURE: u32 = 0x0008_06f8;

/// Leaf 1, ECX: FMA, XSAVE, OSXSAVE, AVX, F16C.
const LEAF1_ECX_XSAVE: u32 = 1 << 12 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29;
/// Leaf 1, ECX: VMX, which a TD does not have.
const LEAF1_ECX_VMX: u32 = 1 << 5;
/// Leaf 1, ECX: x2APIC, TSC-deadline timer, hypervisor.
const LEAF1_ECX_ON: u32 = 1 << 21 | 1 << 24 | 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Leaf 7, EBX: AVX2, AVX-512 (F, DQ, IFMA, PF, ER, CD, BW, VL), MPX.
const LEAF7_EBX_XSAVE: u32 =
    1 << 5 | 1 << 14 | 1 << 16 | 1 << 17 | 1 << 21 | 0b1111 << 26 | 1 << 30 | 1 << 31;
/// Leaf 7, ECX: AVX-512 VBMI, PKU, OSPKE, VBMI2, CET_SS, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ.
const LEAF7_ECX_XSAVE: u32 =
    1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14;
/// Leaf 7, EDX: AVX-512 (4VNNIW, 4FMAPS, VP2INTERSECT, FP16), CET_IBT, AMX (BF16, TILE, INT8).
const LEAF7_EDX_XSAVE: u32 =
    1 << 2 | 1 << 3 | 1 << 8 | 1 << 20 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25;
/// Leaf 0x8000_0001, ECX: SVM, TOPOEXT, and the performance counters of AMD, as leaves that go with
/// them are left out.
const EXTENDED_ECX_OFF: u32 = 1 << 2 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 28;
/// Leaf 0x8000_0001, ECX: XOP, FMA4, which need XSAVE.
const EXTENDED_ECX_XSAVE: u32 = 1 << 11 | 1 << 16;

/// Of KVM's leaf 0x4000_0001, EAX: no delay is needed after port I/O. Not its clock, which would be a
/// page that the kernel shares, and so one more conversion that no TD makes.
const KVM_NOP_IO_DELAY: u32 = 1 << 1;
/// The extended destination id, without which no vCPU above 254 could be reached: as KVM has it.
const KVM_MSI_EXT_DEST_ID: u32 = 1 << 15;

/// The leaves of a vCPU, given what KVM supports.
#[must_use]
pub fn leaves(supported: &[kvm_cpuid_entry2], wanted: Wanted) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<_> = supported
        .iter()
        .filter(|entry| !is_left_out(entry.function, wanted.xsave))
        .map(|entry| adapt(*entry, wanted))
        .collect();
    let text = |four: &[u8; 4]| u32::from_le_bytes(*four);
    let khz = u64::from(wanted.tsc_khz);
    // Crystal times EBX / EAX is the TSC: a crystal at half its speed, so that it fits in 32 bits.
    let crystal = u32::try_from(khz * 500).unwrap_or(u32::MAX);
    let mhz = wanted.tsc_khz / 1000;
    let mut add = |function, flags, [eax, ebx, ecx, edx]: [u32; 4]| {
        let entry = kvm_cpuid_entry2 { function, flags, eax, ebx, ecx, edx, ..Default::default() };
        leaves.push(entry);
    };
    add(0x15, 0, [1, 2, crystal, 0]);
    add(0x16, 0, [mhz, mhz, 100, 0]);
    add(TDX, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, [0, text(b"Inte"), text(b"    "), text(b"lTDX")]);
    // Linux trusts x2APIC without interrupt remapping on KVM only.
    add(0x4000_0000, 0, [0x4000_0001, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")]);
    add(0x4000_0001, 0, [KVM_NOP_IO_DELAY | KVM_MSI_EXT_DEST_ID, 0, 0, 0]);
    leaves
}

/// Leaves that describe the host's caches, topology, clocks, hypervisor and virtualization rather
/// than the guest's, and XSAVE's where it is hidden.
const fn is_left_out(leaf: u32, xsave: bool) -> bool {
    match leaf {
        2 | 4 | 0xb | 0x15 | 0x16 | 0x1f | TDX => true,
        0xd | 0x1d | 0x1e => !xsave,
        0x4000_0000..=0x4fff_ffff => true,
        0x8000_000a | 0x8000_001d..=0x8000_0026 => true,
        _ => false,
    }
}

fn adapt(mut entry: kvm_cpuid_entry2, wanted: Wanted) -> kvm_cpuid_entry2 {
    match (entry.function, entry.index) {
        (0, _) => {
            entry.eax = entry.eax.max(TDX);
            // "GenuineIntel" in EBX, EDX, ECX.
            (entry.ebx, entry.edx, entry.ecx) = (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
        }
        (1, _) => {
            entry.eax = SIGNATURE;
            entry.ecx = (entry.ecx | LEAF1_ECX_ON) & !LEAF1_ECX_VMX;
            // A cache line of 8 times 8 bytes, the number of vCPUs, the APIC id.
            entry.ebx = entry.ebx & 0xff
                | 8 << 8
                | u32::from(wanted.vcpus) << 16
                | u32::from(wanted.index) << 24;
            if wanted.vcpus > 1 {
                entry.edx |= LEAF1_EDX_HTT;
            }
            if !wanted.xsave {
                entry.ecx &= !LEAF1_ECX_XSAVE;
            }
        }
        (7, 0) if !wanted.xsave => {
            entry.ebx &= !LEAF7_EBX_XSAVE;
            entry.ecx &= !LEAF7_ECX_XSAVE;
            entry.edx &= !LEAF7_EDX_XSAVE;
        }
        // AVX-VNNI, AVX512-BF16 and what came after.
        (7, 1) if !wanted.xsave => (entry.eax, entry.edx) = (0, 0),
        (0x8000_0001, _) => {
            entry.ecx &= !EXTENDED_ECX_OFF;
            if !wanted.xsave {
                entry.ecx &= !EXTENDED_ECX_XSAVE;
            }
        }
        // No number of cores of AMD's.
        (0x8000_0008, _) => entry.ecx = 0,
        _ => {}
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        [0, 1, 4, 7, 0xd, 0x4000_0000, 0x8000_0001, 0x8000_000a]
            .map(|function| kvm_cpuid_entry2 {
                function,
                eax: if function == 0 { 0x10 } else { u32::MAX },
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..Default::default()
            })
            .to_vec()
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32) -> Option<&kvm_cpuid_entry2> {
        let mut found = leaves.iter().filter(|entry| entry.function == function);
        let first = found.next();
        assert!(found.next().is_none(), "leaf {function:#x} is there twice");
        first
    }

    const WANTED: Wanted = Wanted { tsc_khz: 5_000_001, vcpus: 2, index: 1, xsave: false };

    #[test]
    fn a_tdx_guest_recognises_itself() {
        let leaves = leaves(&supported(), WANTED);
        let tdx = find(&leaves, TDX).expect("leaf 0x21");
        let text: Vec<u8> =
            [tdx.ebx, tdx.edx, tdx.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(text, b"IntelTDX    ");
        assert!(find(&leaves, 0).expect("leaf 0").eax >= TDX);
        let clock = find(&leaves, 0x15).expect("leaf 0x15");
        let hz = u64::from(clock.ecx) * u64::from(clock.ebx) / u64::from(clock.eax);
        assert_eq!(hz, 5_000_001_000);
        assert!(find(&leaves, 4).is_none() && find(&leaves, 0x8000_000a).is_none());
    }

    #[test]
    fn xsave_is_hidden_with_all_that_needs_it_only_where_it_does_not_work() {
        let hidden = leaves(&supported(), WANTED);
        let shown = leaves(&supported(), Wanted { xsave: true, ..WANTED });
        assert!(find(&hidden, 0xd).is_none() && find(&shown, 0xd).is_some());
        let ecx = |leaves: &[_], leaf| find(leaves, leaf).expect("the leaf").ecx;
        assert_eq!(ecx(&hidden, 1) & LEAF1_ECX_XSAVE, 0);
        assert_eq!(ecx(&shown, 1) & LEAF1_ECX_XSAVE, LEAF1_ECX_XSAVE);
        assert_eq!(ecx(&hidden, 7) & LEAF7_ECX_XSAVE, 0);
        assert_eq!(ecx(&shown, 0x8000_0001) & EXTENDED_ECX_OFF, 0);
    }
}
