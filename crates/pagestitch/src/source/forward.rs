//! The methods that wrappers of sources, and pointers to sources, pass on.

/// Passes methods of a [`Source`](super::Source) or a [`Fetch`](super::Fetch) on:
/// `forward!(self => self.inner; size, name)`. Without a line here, a new method of these traits has
/// its default in each wrapper.
macro_rules! forward {
    ($this:ident => $inner:expr; $($method:ident),+) => {
        $(forward!(@$method $this $inner);)+
    };
    (@size $this:ident $inner:expr) => {
        fn size(&$this) -> u64 {
            $inner.size()
        }
    };
    (@name $this:ident $inner:expr) => {
        fn name(&$this) -> String {
            $inner.name()
        }
    };
    (@granularity $this:ident $inner:expr) => {
        fn granularity(&$this) -> u64 {
            $inner.granularity()
        }
    };
    (@direct $this:ident $inner:expr) => {
        fn direct(&$this) -> Option<&dyn Any> {
            $inner.direct()
        }
    };
}
