//! Physical memory for an ordinary user.

use crate::{PAGE, RESERVED, dev_mem, pci_device, pci_resource};
use pagestitch::Access;
use pagestitch::source::Caching;
use pagestitch_kernel::physical::Refusal;

#[test]
#[ignore = "needs the guest, as an ordinary user"]
fn the_missing_right_is_named_to_an_ordinary_user() {
    let error = dev_mem(RESERVED, PAGE, Access::ReadOnly, Caching::Cached).unwrap_err();
    assert_eq!(error.refusal, Refusal::NoCapability("CAP_SYS_RAWIO"));
    let (path, ..) = pci_device("0x1af4", "0x1110", 2);
    let error = pci_resource(&path, Access::ReadOnly).unwrap_err();
    assert_eq!(error.refusal, Refusal::NoPermission(path.display().to_string()), "{error}");
}
