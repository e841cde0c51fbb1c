//! Regions: one buffer.

use crate::call::{is_of_this_call, without_interpreter};
use crate::chunks::Listed;
use crate::error::{Error, exception};
use crate::held::Held;
use crate::lent::release_given_up;
use crate::names::in_python;
use crate::numbers::{length, offset, optional_budget, optional_length};
use crate::server::{self, Chosen};
use pagestitch::{Access, Builder, ErrorKind, SharedRegion};
use pyo3::exceptions::{PyBufferError, PyIndexError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyIterator, PyList, PyMemoryView, PyString};
use pyo3::{PyTraverseError, PyVisit, ffi};
use std::ffi::{c_int, c_void};
use std::ops::{Deref, Range};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Chunks as one buffer. A page has its bytes from its first touch on.
///
/// A chunk is `bytes` or another read-only buffer, a path, an open file, a tuple `(path, offset, length)`, a `File`,
/// a `Hole`, or an object with `size` and `read_at(offset, length)`. A buffer that can be written is refused: pass
/// `memoryview(x).toreadonly()`, and leave its bytes alone.
///
/// `server` is a `Pool`; `"eager"`, which fills the region when it is built; or None, for a pool of the process, or
/// `"eager"` where the process may not use userfaultfd. `page_aligned` starts each chunk in a page of its own, at its
/// offset within a page of its file; `chunks()` tells where, and the bytes between chunks mean nothing. `budget` bounds
/// the bytes of memory of a region that is only read: pages beyond it leave, and come back when they are touched. A
/// child of `fork` (`multiprocessing`) has the region with `inherit_on_fork` or `"eager"` only.
#[pyclass(frozen, weakref, module = "pagestitch")]
#[derive(Debug)]
pub(crate) struct Region {
    /// None once the region is closed. A call in another thread may still have it.
    region: Mutex<Option<Arc<SharedRegion>>>,
    /// The objects that the open region keeps.
    held: Mutex<Vec<Held>>,
    writable: bool,
    /// The buffers that Python code holds: their addresses must stay.
    exports: AtomicUsize,
    /// The numbers of the chunks that only Python code can fill.
    in_python: Vec<usize>,
    /// True while pages of these chunks may be absent.
    needs_populate: AtomicBool,
    /// The process that has the addresses; None: its forked children have them, too.
    process: Option<u32>,
}

/// The arguments of a region that are no objects.
struct Arguments<'a> {
    name: &'a str,
    writable: bool,
    page_aligned: bool,
    inherit_on_fork: bool,
    budget: Option<u64>,
}

#[pymethods]
impl Region {
    #[new]
    #[pyo3(signature = (chunks, *, name="region", server=None, writable=false, page_aligned=false, inherit_on_fork=false, budget=None))]
    fn new(
        chunks: &Bound<'_, PyAny>,
        name: &str,
        server: Option<&Bound<'_, PyAny>>,
        writable: bool,
        page_aligned: bool,
        inherit_on_fork: bool,
        #[pyo3(from_py_with = optional_budget)] budget: Option<u64>,
    ) -> PyResult<Self> {
        release_given_up(chunks.py());
        let arguments = Arguments { name, writable, page_aligned, inherit_on_fork, budget };
        let server = server::of_argument(server)?;
        let built = Self::build(chunks, &arguments, server);
        // A build that fails gives all buffers up, and one that fills the region those that it has copied.
        release_given_up(chunks.py());
        built
    }

    /// The bytes from `offset` on. Bytes that cannot be had are an exception, and not SIGBUS.
    fn read_at<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = offset)] offset: u64,
        #[pyo3(from_py_with = length)] length: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let region = self.open()?;
        // Before so many bytes are allocated.
        let range = inside(&region, offset, length)?;
        PyBytes::new_with(py, (range.end - range.start) as usize, |into| {
            without_interpreter(py, || with_retry(&region, &range, || region.read_at(offset, into)))
        })
    }

    /// Writes bytes from `offset` on, if the region is writable.
    fn write_at(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = offset)] offset: u64,
        data: &[u8],
    ) -> PyResult<()> {
        let region = self.open()?;
        if !self.writable {
            return Err(Error::new_err(format!(
                "region {} is read-only: build it with writable=True to write to it",
                region.name()
            )));
        }
        let range = inside(&region, offset, data.len() as u64)?;
        without_interpreter(py, || with_retry(&region, &range, || region.write_at(offset, data)))
    }

    /// Fills the absent pages of a range, and releases the interpreter meanwhile.
    ///
    /// Pages whose source has failed before are tried again.
    #[pyo3(signature = (offset=0, length=None))]
    fn populate(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = offset)] offset: u64,
        #[pyo3(from_py_with = optional_length)] length: Option<u64>,
    ) -> PyResult<()> {
        let region = self.open()?;
        let range = range(&region, offset, length)?;
        for start in range.clone().step_by(POPULATED_AT_ONCE) {
            let part = start..range.end.min(start.saturating_add(POPULATED_AT_ONCE as u64));
            without_interpreter(py, || with_retry(&region, &part, || region.populate(part.clone())))?;
            py.check_signals()?;
        }
        if range == (0..region.len() as u64) {
            self.needs_populate.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Asks the server to fill the absent pages of a range, and does not wait.
    #[pyo3(signature = (offset=0, length=None))]
    fn prefetch(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = offset)] offset: u64,
        #[pyo3(from_py_with = optional_length)] length: Option<u64>,
    ) -> PyResult<()> {
        let region = self.open()?;
        let range = range(&region, offset, length)?;
        if self.needs_populate.load(Ordering::Acquire) && self.meets_python(&region, &range) {
            return Err(PyValueError::new_err(
                "a chunk of the range is read by Python code, which cannot run in a thread of the server: call populate()",
            ));
        }
        let job = without_interpreter(py, || region.prefetch(range))?;
        job.detach();
        Ok(())
    }

    /// How the pages of each chunk come, and why: text.
    fn plan(&self) -> PyResult<String> {
        Ok(in_python(&self.open()?.plan().to_string()))
    }

    /// The counters by name.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metrics = PyDict::new(py);
        self.open()?.metrics().all().try_for_each(|(name, value)| metrics.set_item(name, value))?;
        Ok(metrics)
    }

    /// The (offset, length) of each chunk.
    fn chunks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.open()?.chunk_ranges().map(|range| (range.start, range.end - range.start)))
    }

    /// Gives the addresses up. A BufferError, while a memoryview or an array shows them.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let mut region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let exports = self.exports.load(Ordering::Acquire);
        if exports > 0 && region.is_some() {
            return Err(PyBufferError::new_err(format!(
                "{exports} buffers show the region: release or delete the memoryviews and arrays first"
            )));
        }
        let given_up = region.take();
        drop(region);
        self.give_up(py, given_up);
        Ok(())
    }

    /// True once the region is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.region.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.open()?.len())
    }

    fn __repr__(&self) -> String {
        match self.open() {
            Ok(region) => format!("<pagestitch.Region {:?} of {} bytes>", region.name(), region.len()),
            Err(_) => String::from("<pagestitch.Region, closed>"),
        }
    }

    /// `region[i]` is a byte, and `region[a:b]` a memoryview, without a copy.
    fn __getitem__<'py>(slf: &Bound<'py, Self>, key: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        PyMemoryView::from(slf.as_any())?.get_item(key)
    }

    /// Pickling, by which `multiprocessing` sends objects, is refused.
    fn __reduce__(&self) -> PyResult<()> {
        Err(PyTypeError::new_err(
            "a region has addresses of this process, and cannot be sent to another one: send the paths, and build it there",
        ))
    }

    /// Tells the garbage collector of the objects that the region keeps: a source may hold its region.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // The collector takes an object of which it is not told for one in use.
        let Ok(held) = self.held.try_lock() else { return Ok(()) };
        held.iter().try_for_each(|held| held.visit(&visit))
    }

    /// Closes a region that only a cycle of objects keeps. A memoryview in that cycle keeps the addresses: it
    /// gives them up itself.
    fn __clear__(&self) {
        let _ = Python::try_attach(|py| self.close(py));
    }

    const fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }

    /// # Safety
    ///
    /// - Python calls it with a view to fill, as the buffer protocol says.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let region = this.shown()?;
        let (start, bytes) = (region.as_ptr().as_ptr().cast::<c_void>(), region.len());
        let read_only = c_int::from(!this.writable);
        // SAFETY: Python passes a view to fill. The object stays while the view is held, and `close`
        // keeps the addresses until its release.
        let answer =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, bytes as isize, read_only, flags) };
        if answer != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        this.exports.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// # Safety
    ///
    /// - Python calls it once for each view that it has.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Region {
    fn build(chunks: &Bound<'_, PyAny>, arguments: &Arguments<'_>, chosen: Chosen) -> PyResult<Self> {
        let py = chunks.py();
        let access = if arguments.writable { Access::Writable } else { Access::ReadOnly };
        let (mut builder, mut held, mut in_python) = (arguments.builder()?, Vec::new(), Vec::new());
        for (number, object) in listed(chunks)?.enumerate() {
            let listed = Listed::of(&object?, access).map_err(|error| inside_chunk(py, &error, number))?;
            builder = builder.chunk(listed.chunk);
            held.extend(listed.held);
            in_python.extend(listed.in_python.then_some(number));
        }
        if !in_python.is_empty() {
            arguments.check_in_python(chosen.eager)?;
            // A helper of this thread could not tell itself from a thread that a touch waits for.
            builder = builder.populate_threads(1);
        }
        let region = without_interpreter(py, || builder.build_shared(chosen.server))?;
        // A build that fills the region gives most objects up.
        held.retain(Held::is_kept);
        Ok(Self {
            region: Mutex::new(Some(Arc::new(region))),
            held: Mutex::new(held),
            writable: arguments.writable,
            exports: AtomicUsize::new(0),
            needs_populate: AtomicBool::new(!in_python.is_empty() && !chosen.eager),
            in_python,
            process: (!arguments.inherit_on_fork && !chosen.eager).then(process::id),
        })
    }

    /// Drops the region, and gives up the objects that it has kept.
    fn give_up(&self, py: Python<'_>, region: Option<Arc<SharedRegion>>) {
        let held = std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner));
        py.detach(|| drop(region));
        drop(held);
        release_given_up(py);
    }

    /// True if pages of the range have bytes that only Python code can read.
    fn meets_python(&self, region: &SharedRegion, range: &Range<u64>) -> bool {
        let page = PAGE_MAX;
        let (first, end) = (range.start / page * page, range.end.next_multiple_of(page));
        let chunks: Vec<_> = region.chunk_ranges().collect();
        self.in_python.iter().any(|&number| chunks[number].start < end && first < chunks[number].end)
    }

    fn open(&self) -> PyResult<InUse> {
        let region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let region = region.clone().ok_or_else(|| PyValueError::new_err("the region is closed"))?;
        Ok(InUse(Some(region)))
    }

    /// The region, if its addresses may be touched with the interpreter's lock held.
    fn shown(&self) -> PyResult<InUse> {
        let region = self.open().map_err(|_| PyBufferError::new_err("the region is closed"))?;
        if self.process.is_some_and(|process| process != process::id()) {
            return Err(PyBufferError::new_err(
                "a forked child has no addresses of its parent's region: build it in the child, or with inherit_on_fork=True or server=\"eager\"",
            ));
        }
        if self.needs_populate.load(Ordering::Acquire) {
            return Err(PyBufferError::new_err(
                "a chunk is read by Python code, which cannot run behind a touch of a page: call populate() first, or use read_at()",
            ));
        }
        Ok(region)
    }
}

/// A region in use by a call. If it has been closed meanwhile, it ends with the call.
struct InUse(Option<Arc<SharedRegion>>);

impl Deref for InUse {
    type Target = SharedRegion;

    fn deref(&self) -> &SharedRegion {
        self.0.as_ref().expect("it is present until the drop")
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let Some(region) = self.0.take().and_then(Arc::into_inner) else { return };
        let _ = Python::try_attach(|py| {
            py.detach(|| drop(region));
            release_given_up(py);
        });
    }
}

impl Arguments<'_> {
    fn builder(&self) -> PyResult<Builder> {
        let mut builder = SharedRegion::builder().name(self.name);
        for (set, option) in [
            (self.writable, Builder::writable as fn(Builder) -> Builder),
            (self.page_aligned, Builder::page_aligned),
            (self.inherit_on_fork, Builder::inherit_on_fork),
        ] {
            builder = if set { option(builder) } else { builder };
        }
        let Some(bytes) = self.budget else { return Ok(builder) };
        if self.writable {
            return Err(PyValueError::new_err(
                "a written page would be lost when it leaves, because nothing writes it back: leave out writable or budget",
            ));
        }
        let budget = pagestitch::Budget::bytes(bytes).map_err(|error| exception(&error))?;
        Ok(builder.budget(&budget))
    }

    /// Refuses what a region cannot have whose pages come from Python code.
    fn check_in_python(&self, eager: bool) -> PyResult<()> {
        let refused = |what: &str| {
            Err(PyValueError::new_err(format!("a chunk is read by Python code, which cannot run {what}")))
        };
        match () {
            () if self.budget.is_some() => {
                refused("behind the touch of a page that has left: leave out budget")
            }
            () if self.inherit_on_fork && !eager => refused(
                "in the parent for a forked child: leave out inherit_on_fork, or build with server=\"eager\"",
            ),
            () => Ok(()),
        }
    }
}

/// The objects in an argument that lists the chunks.
fn listed<'py>(chunks: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyIterator>> {
    // The elements of an array, a `mmap` or `bytes` are numbers, and not chunks.
    if PyMemoryView::from(chunks).is_ok() || chunks.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("the chunks are a list, also if there is one: pass [x]"));
    }
    chunks.try_iter()
}

/// The last reference has gone, in a thread that holds the interpreter's lock: a source in Python may be at work.
impl Drop for Region {
    fn drop(&mut self) {
        let region = self.region.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let _ = Python::try_attach(|py| self.give_up(py, region));
    }
}

/// Runs `act`, and once more after a retry of pages that have failed in an earlier call. Without an
/// exception of a source in this call, the failure may be one that the region has kept.
fn with_retry<T>(
    region: &SharedRegion,
    range: &Range<u64>,
    mut act: impl FnMut() -> Result<T, pagestitch::Error>,
) -> Result<T, pagestitch::Error> {
    let first = act();
    match &first {
        Err(error) if error.kind() == ErrorKind::SourceFailed && !is_of_this_call(error) => {}
        _ => return first,
    }
    match region.retry_failed(range.clone()) {
        Ok(()) => act(),
        Err(error) if is_of_this_call(&error) => Err(error),
        // The kernel is too old for it, or the process is a forked child.
        Err(_) => first,
    }
}

fn range(region: &SharedRegion, offset: u64, length: Option<u64>) -> PyResult<Range<u64>> {
    let rest = || (region.len() as u64).saturating_sub(offset);
    inside(region, offset, length.unwrap_or_else(rest))
}

/// The range, if it lies in the region.
fn inside(region: &SharedRegion, offset: u64, length: u64) -> PyResult<Range<u64>> {
    let end = u128::from(offset) + u128::from(length);
    if end > region.len() as u128 {
        return Err(PyIndexError::new_err(format!(
            "bytes {offset}..{end} are not inside region {} of {} bytes",
            region.name(),
            region.len()
        )));
    }
    Ok(offset..offset + length)
}

/// The same exception, which names the chunk.
fn inside_chunk(py: Python<'_>, error: &PyErr, number: usize) -> PyErr {
    let text = format!("chunk {number}");
    let _ = error.value(py).call_method1("add_note", (text,));
    error.clone_ref(py)
}

/// The bytes that `populate` fills before it looks for signals, as Ctrl-C.
const POPULATED_AT_ONCE: usize = 256 << 20;
/// A multiple of the size of a page.
const PAGE_MAX: u64 = 64 << 10;
