//! The canary of kernel mode: how fast this KVM runs code at CPL 0, and whether with SSE.
//!
//! Nested and paravirtual KVMs may interpret CPL 0, so that no capability bit tells; a few
//! instructions of it do.
#![allow(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION")]

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, VolatileMemory};

use super::EmulatedError;
use super::memory::{self, SetupError};
use super::tick::Tick;
use super::vm::{Host, failed, set_flat_segments};

/// What code at CPL 0 can do here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelMode {
    /// Instructions a second, in millions; 0 if the loop did not end.
    pub mips: f64,
    /// SSE arithmetic and POPCNT work.
    pub sse: bool,
    /// XSETBV and AVX work, and CPUID follows. A KVM on an emulated processor (QEMU's TCG) announces
    /// them, but is not told of the guest's XSETBV: the sizes in leaf 0xd stay, and kernels oops.
    pub xsave: bool,
}

impl KernelMode {
    /// Millions of instructions a second below which no kernel boots in reasonable time. Measured:
    /// 0.4 where CPL 0 is interpreted; 9.5 in the lab on a machine with a load of 7 on 2 processors.
    pub const FIT_MIPS: f64 = 3.0;

    /// Whether a kernel can be booted here in reasonable time.
    #[must_use]
    pub fn is_fit(&self) -> bool {
        self.sse && self.mips >= Self::FIT_MIPS
    }
}

/// Iterations of two instructions: a tenth of a second at 3 MIPS.
const ITERATIONS: u32 = 150_000;
/// Ports that tell how far the code has come.
const WARM: u16 = 0x0f;
const LOOPED: u16 = 0x10;
const SSE_DONE: u16 = 0x11;
const XSAVE_DONE: u16 = 0x12;
/// Where what lies in the canary's memory, in bytes.
const MEMORY: u64 = 64 << 10;
const CODE: u64 = 0x8000;
const PML4: u64 = 0x1000;
/// When it is given up.
const TIME_LIMIT: Duration = Duration::from_secs(3);

/// Runs the canary.
///
/// # Errors
/// The VM cannot be made. What its code cannot do is no error.
pub fn kernel_mode() -> Result<KernelMode, EmulatedError> {
    let host = Host::get()?;
    let region = memory::map(MEMORY)?;
    let write = |bytes: &[u8], gpa: u64| {
        let at = usize::try_from(gpa).unwrap_or(usize::MAX);
        region
            .as_volatile_slice()
            .write_slice(bytes, at)
            .map_err(|_| SetupError::Outside { gpa, size: bytes.len() })
    };
    // Tables that map the first 2 MiB to themselves.
    write(&((PML4 + 0x1000) | 3).to_le_bytes(), PML4)?;
    write(&((PML4 + 0x2000) | 3).to_le_bytes(), PML4 + 0x1000)?;
    write(&0x83u64.to_le_bytes(), PML4 + 0x2000)?;
    write(&code(), CODE)?;

    let vm = host.create_vm()?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: region.as_ptr().addr() as u64,
    };
    // SAFETY: the mapping is the guest's memory, and outlives VM and vCPU, which are dropped first.
    unsafe { vm.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(host.cpuid()).map_err(failed("KVM_SET_CPUID2"))?;
    set_up(&vcpu)?;
    let _tick = Tick::start().map_err(EmulatedError::Timer)?;
    Ok(measure(&mut vcpu))
}

/// Twice mov ecx, n; 1: dec ecx; jnz 1b; out, al: the first time so that the second is warm. Then
/// addsd xmm0, xmm0; popcnt eax, ecx; out SSE_DONE, al. Then OSXSAVE on: mov rax, cr4;
/// or eax, 1 << 18; mov cr4, rax. Then AVX on: xor ecx, ecx; xor edx, edx; mov eax, 7; xsetbv;
/// vzeroupper. Then whether KVM knows of it: mov eax, 0xd; xor ecx, ecx; cpuid; cmp ebx, 832 (the
/// size of the state with AVX); jb 2f; out XSAVE_DONE, al; 2: hlt.
fn code() -> Vec<u8> {
    let mut code = Vec::new();
    for (iterations, port) in [(ITERATIONS / 16, 0x0f), (ITERATIONS, 0x10)] {
        code.push(0xb9);
        code.extend(iterations.to_le_bytes());
        code.extend([0xff, 0xc9, 0x75, 0xfc, 0xe6, port]);
    }
    code.extend([0xf2, 0x0f, 0x58, 0xc0, 0xf3, 0x0f, 0xb8, 0xc1, 0xe6, 0x11]);
    code.extend([0x0f, 0x20, 0xe0, 0x0d, 0x00, 0x00, 0x04, 0x00, 0x0f, 0x22, 0xe0]);
    code.extend([0x31, 0xc9, 0x31, 0xd2, 0xb8, 0x07, 0x00, 0x00, 0x00, 0x0f, 0x01, 0xd1]);
    code.extend([0xc5, 0xf8, 0x77, 0xb8, 0x0d, 0x00, 0x00, 0x00, 0x31, 0xc9, 0x0f, 0xa2]);
    code.extend([0x81, 0xfb, 0x40, 0x03, 0x00, 0x00, 0x72, 0x02, 0xe6, 0x12, 0xf4]);
    code
}

/// 64-bit code at CPL 0 with SSE on; no IDT, so that any exception is a triple fault.
fn set_up(vcpu: &VcpuFd) -> Result<(), EmulatedError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    set_flat_segments(&mut sregs, 8, 16, 0);
    sregs.idt.limit = 0;
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
    sregs.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: CODE, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    Ok(())
}

fn measure(vcpu: &mut VcpuFd) -> KernelMode {
    let started = Instant::now();
    let mut warm = started;
    let mut found = KernelMode { mips: 0.0, sse: false, xsave: false };
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(WARM, _)) => warm = Instant::now(),
            Ok(VcpuExit::IoOut(LOOPED, _)) => {
                let seconds = warm.elapsed().as_secs_f64().max(1e-9);
                found.mips = 2.0 * f64::from(ITERATIONS) / seconds / 1e6;
            }
            Ok(VcpuExit::IoOut(SSE_DONE, _)) => found.sse = true,
            Ok(VcpuExit::IoOut(XSAVE_DONE, _)) => {
                found.xsave = true;
                return found;
            }
            Ok(VcpuExit::Intr) => {}
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            // Whatever else it is, the code did not get there.
            _ => return found,
        }
        if started.elapsed() > TIME_LIMIT {
            return found;
        }
    }
}
