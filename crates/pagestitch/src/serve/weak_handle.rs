//! The handle that a server keeps of a region. It keeps no source alive, and does not delay the end
//! of the region.

use crate::reclaim::EnterRegion;
use crate::space::Mapping;
use pagestitch_kernel::cache;
use pagestitch_kernel::gate::{Gate, GateGuard, OwnedGateGuard};
use pagestitch_kernel::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Weak};

/// A weak handle to a region. A queue may hold it for any time.
#[derive(Debug)]
pub(crate) struct RegionHandle<R> {
    gate: Arc<Gate>,
    region: Weak<R>,
    /// The number of the region's faults that `SlowAdmission` has admitted; it changes under the
    /// lock of that type.
    pub(crate) admitted: AtomicUsize,
    /// True if a fault of the region was read after its gate was closed.
    has_stray: AtomicBool,
}

/// A region while a thread works for it, inside its gate.
#[derive(Debug)]
pub(crate) struct RegionGuard<'d, R> {
    /// Dropped before the guard, so that the thread that closes the gate is the last to hold the
    /// region.
    region: Arc<R>,
    _guard: GateGuard<'d>,
}

/// The way into a region without its handle. A table that holds it saves the look at the handle, which is
/// in no cache if the region is one of many.
#[derive(Debug)]
pub(super) struct Entrance<R> {
    gate: Arc<Gate>,
    region: Weak<R>,
}

/// As [`RegionGuard`], without a borrow.
#[derive(Debug)]
pub(super) struct OwnedRegionGuard<R> {
    /// Dropped before the guard.
    region: Arc<R>,
    _guard: OwnedGateGuard,
}

impl<R> RegionHandle<R> {
    pub(crate) fn new(gate: &Arc<Gate>, region: &Arc<R>) -> Self {
        Self {
            gate: Arc::clone(gate),
            region: Arc::downgrade(region),
            admitted: AtomicUsize::new(0),
            has_stray: AtomicBool::new(false),
        }
    }

    /// A handle to no region.
    #[cfg(test)]
    pub(crate) fn dangling() -> Arc<Self> {
        Arc::new(Self {
            gate: Arc::default(),
            region: Weak::new(),
            admitted: AtomicUsize::new(0),
            has_stray: AtomicBool::new(false),
        })
    }

    /// Enters the region's gate until the guard is dropped. `None` if the region is being dropped.
    pub(crate) fn enter(&self) -> Option<RegionGuard<'_, R>> {
        let guard = self.gate.enter()?;
        Some(RegionGuard { region: self.region.upgrade()?, _guard: guard })
    }

    /// Another way into the region.
    pub(super) fn entrance(&self) -> Entrance<R> {
        Entrance { gate: Arc::clone(&self.gate), region: Weak::clone(&self.region) }
    }

    /// Notes that a thread waits in the region, which is being dropped: its fault came too late.
    pub(crate) fn note_stray(&self) {
        self.has_stray.store(true, Ordering::SeqCst);
    }

    pub(crate) fn has_stray(&self) -> bool {
        self.has_stray.load(Ordering::SeqCst)
    }

    /// True if this handle refers to `region`.
    pub(crate) fn is_of(&self, region: &R) -> bool {
        std::ptr::eq(self.region.as_ptr(), region)
    }
}

impl<R: Deref<Target = Mapping> + fmt::Debug + Send + Sync> EnterRegion for RegionHandle<R> {
    fn enter_region(&self, work: &mut dyn FnMut(&Mapping)) -> bool {
        // Without closures, because a signal handler has a small stack.
        match self.enter() {
            Some(region) => {
                work(&region);
                true
            }
            None => false,
        }
    }
}

impl<R> Entrance<R> {
    /// As [`RegionHandle::enter`].
    pub(super) fn enter(&self) -> Option<OwnedRegionGuard<R>> {
        // The gate and the region are in different places, and come from memory at the same time.
        cache::prefetch_at(self.region.as_ptr());
        let guard = self.gate.enter_owned()?;
        Some(OwnedRegionGuard { region: self.region.upgrade()?, _guard: guard })
    }
}

impl<R> Deref for OwnedRegionGuard<R> {
    type Target = Arc<R>;

    fn deref(&self) -> &Arc<R> {
        &self.region
    }
}

impl<R> Deref for RegionGuard<'_, R> {
    type Target = Arc<R>;

    fn deref(&self) -> &Arc<R> {
        &self.region
    }
}
