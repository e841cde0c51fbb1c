//! A kernel that is locked down, as under Secure Boot.

use crate::{PAGE, RESERVED, dev_mem, pci_device, pci_resource};
use pagestitch::Access;
use pagestitch::source::Caching;
use pagestitch_kernel::physical::Refusal;

#[test]
#[ignore = "needs the guest that is locked down"]
fn lockdown_is_named_to_root() {
    let error = dev_mem(RESERVED, PAGE, Access::ReadOnly, Caching::Cached).unwrap_err();
    assert_eq!(error.refusal, Refusal::Lockdown, "{error}");
    let (path, ..) = pci_device("0x1af4", "0x1110", 2);
    let error = pci_resource(&path, Access::ReadOnly).unwrap_err();
    assert_eq!(error.refusal, Refusal::Lockdown, "{error}");
}
