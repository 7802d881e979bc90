//! Which descriptors of the program's are the host's.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use crate::memory::Memfd;
use crate::td::{Td, lock};
use crate::vcpu::Vcpu;

/// What a descriptor is.
#[derive(Debug, Clone)]
pub(crate) enum Handle {
    /// /dev/kvm.
    Kvm,
    /// A TD.
    Vm(Arc<Td>),
    /// One of its vCPUs.
    Vcpu(Arc<Vcpu>),
    /// A guest_memfd.
    Memfd(Arc<Memfd>),
}

static HANDLES: LazyLock<Mutex<HashMap<i32, Handle>>> = LazyLock::new(Mutex::default);

/// What `fd` is, if it is the host's.
pub(crate) fn get(fd: i32) -> Option<Handle> {
    lock(&HANDLES).get(&fd).cloned()
}

/// From now on `fd` is this.
pub(crate) fn add(fd: i32, handle: Handle) {
    lock(&HANDLES).insert(fd, handle);
}

/// `fd` is closed. What it was is dropped by the caller, when the table is no longer locked.
pub(crate) fn remove(fd: i32) -> Option<Handle> {
    lock(&HANDLES).remove(&fd)
}

/// The TD at this address.
pub(crate) fn td_at(address: usize) -> Option<Arc<Td>> {
    let handles = lock(&HANDLES);
    let tds = handles.values().filter_map(|handle| match handle {
        Handle::Vm(td) => Some(td),
        Handle::Vcpu(vcpu) => Some(&vcpu.td),
        Handle::Kvm | Handle::Memfd(_) => None,
    });
    let mut tds = tds.filter(|td| Arc::as_ptr(td).addr() == address);
    tds.next().cloned()
}

/// All TDs whose descriptors are open.
pub(crate) fn tds() -> Vec<Arc<Td>> {
    let handles = lock(&HANDLES);
    let tds = handles.values().filter_map(|handle| match handle {
        Handle::Vm(td) => Some(td),
        Handle::Kvm | Handle::Vcpu(_) | Handle::Memfd(_) => None,
    });
    tds.cloned().collect()
}
