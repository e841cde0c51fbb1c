//! Conversions of adopted memory from and to the `Uffd` of the `userfaultfd` crate, behind the
//! feature `userfaultfd`.

use super::adopted_memory::AdoptedMemory;
use crate::error::Error;
use pagestitch_kernel::Uffd;
use pagestitch_kernel::uffd::OwnMemory;

/// As [`AdoptedMemory::new`]: memory of another process.
impl TryFrom<userfaultfd::Uffd> for AdoptedMemory {
    type Error = Error;

    fn try_from(uffd: userfaultfd::Uffd) -> Result<Self, Error> {
        Self::of(Uffd::try_from(uffd))
    }
}

/// As [`AdoptedMemory::of_this_process`]: memory of any process, also of this one.
impl TryFrom<(userfaultfd::Uffd, OwnMemory)> for AdoptedMemory {
    type Error = Error;

    fn try_from(uffd: (userfaultfd::Uffd, OwnMemory)) -> Result<Self, Error> {
        Self::of(Uffd::try_from(uffd))
    }
}

/// Takes the userfaultfd back, for a handler that is made of the `userfaultfd` crate.
impl From<AdoptedMemory> for userfaultfd::Uffd {
    fn from(memory: AdoptedMemory) -> Self {
        memory.uffd.into()
    }
}
