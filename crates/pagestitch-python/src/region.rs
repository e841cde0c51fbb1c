//! Regions: one buffer.

use crate::error::exception;
use crate::lent::release_given_up;
use crate::pieces::Piece;
use crate::server;
use crate::source::without_interpreter;
use pagestitch::{Access, SharedRegion};
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyMemoryView};
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Pieces as one buffer. A page has its bytes from its first touch on.
///
/// A piece is `bytes` or another read-only buffer, a path, an open file, a tuple `(path, offset, length)`, a `File`,
/// a `Hole`, or an object with `size` and `read_at(offset, length)`. A buffer that can be written is refused: pass
/// `memoryview(x).toreadonly()`, and leave its bytes alone.
///
/// `server` is a `Pool`; `"eager"`, which fills the region when it is built; or None, for a pool of the process, or
/// `"eager"` where the process may not use userfaultfd. `page_aligned` starts each piece on a page of its own, with
/// zeros before it. `budget` bounds the bytes of memory of a region that is only read: pages beyond it leave, and come
/// back when they are touched. A child of `fork` (`multiprocessing`) has the region with `inherit_on_fork` only.
#[pyclass(frozen, weakref, module = "pagestitch")]
#[derive(Debug)]
pub(crate) struct Region {
    /// None once the region is closed. A call in another thread may still have it.
    region: Mutex<Option<Arc<SharedRegion>>>,
    writable: bool,
    /// The buffers that Python code holds: their addresses must stay.
    exports: AtomicUsize,
    /// True while pages are absent that only Python code can fill.
    needs_populate: AtomicBool,
    /// The process that has the addresses; None: its forked children have them, too.
    process: Option<u32>,
}

#[pymethods]
impl Region {
    #[new]
    #[pyo3(signature = (pieces, *, name="region", server=None, writable=false, page_aligned=false, inherit_on_fork=false, budget=None))]
    fn new(
        pieces: &Bound<'_, PyAny>,
        name: &str,
        server: Option<&Bound<'_, PyAny>>,
        writable: bool,
        page_aligned: bool,
        inherit_on_fork: bool,
        budget: Option<u64>,
    ) -> PyResult<Self> {
        let py = pieces.py();
        release_given_up(py);
        let server = server::of_argument(server)?;
        let mut builder = SharedRegion::builder().name(name);
        for (set, option) in [
            (writable, pagestitch::Builder::writable as fn(pagestitch::Builder) -> pagestitch::Builder),
            (page_aligned, pagestitch::Builder::page_aligned),
            (inherit_on_fork, pagestitch::Builder::inherit_on_fork),
        ] {
            builder = if set { option(builder) } else { builder };
        }
        if let Some(bytes) = budget {
            let budget = pagestitch::Budget::bytes(bytes).map_err(|error| exception(&error))?;
            builder = builder.budget(&budget);
        }
        let access = if writable { Access::Writable } else { Access::ReadOnly };
        let mut in_python = false;
        for (number, piece) in pieces.try_iter()?.enumerate() {
            let piece = Piece::of(&piece?, access).map_err(|error| inside_piece(py, &error, number))?;
            in_python |= piece.in_python;
            builder = builder.chunk(piece.chunk);
        }
        if in_python && budget.is_some() {
            return Err(PyValueError::new_err(
                "a piece is read by Python code, which cannot run behind the touch of a page that has left: leave out budget",
            ));
        }
        let region =
            without_interpreter(py, || builder.build_shared(server)).map_err(|error| exception(&error))?;
        Ok(Self {
            region: Mutex::new(Some(Arc::new(region))),
            writable,
            exports: AtomicUsize::new(0),
            needs_populate: AtomicBool::new(in_python),
            process: (!inherit_on_fork).then(process::id),
        })
    }

    /// The bytes from `offset` on. Bytes that cannot be had are an exception, and not SIGBUS.
    fn read_at<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        let region = self.open()?;
        if length > region.len() {
            // The error of the range, before so many bytes are allocated.
            without_interpreter(py, || region.read_at(u64::MAX, &mut [0])).map_err(|_| {
                PyValueError::new_err(format!("{length} bytes are more than the region's {}", region.len()))
            })?;
        }
        PyBytes::new_with(py, length, |into| {
            without_interpreter(py, || region.read_at(offset, into)).map_err(|error| exception(&error))
        })
    }

    /// Writes bytes from `offset` on, if the region is writable.
    fn write_at(&self, py: Python<'_>, offset: u64, data: &[u8]) -> PyResult<()> {
        let region = self.open()?;
        without_interpreter(py, || region.write_at(offset, data)).map_err(|error| exception(&error))
    }

    /// Fills the absent pages of a range, and releases the interpreter meanwhile.
    #[pyo3(signature = (offset=0, length=None))]
    fn populate(&self, py: Python<'_>, offset: u64, length: Option<u64>) -> PyResult<()> {
        let region = self.open()?;
        let range = range(&region, offset, length)?;
        without_interpreter(py, || region.populate(range.clone())).map_err(|error| exception(&error))?;
        if range == (0..region.len() as u64) {
            self.needs_populate.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Asks the server to fill the absent pages of a range, and does not wait.
    #[pyo3(signature = (offset=0, length=None))]
    fn prefetch(&self, py: Python<'_>, offset: u64, length: Option<u64>) -> PyResult<()> {
        let region = self.open()?;
        let range = range(&region, offset, length)?;
        let job = py.detach(|| region.prefetch(range)).map_err(|error| exception(&error))?;
        job.detach();
        Ok(())
    }

    /// How the pages of each piece come, and why: text.
    fn plan(&self) -> PyResult<String> {
        Ok(self.open()?.plan().to_string())
    }

    /// The counters by name.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metrics = PyDict::new(py);
        self.open()?.metrics().all().try_for_each(|(name, value)| metrics.set_item(name, value))?;
        Ok(metrics)
    }

    /// The (offset, length) of each piece.
    fn pieces<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
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
        without_interpreter(py, || drop(given_up));
        release_given_up(py);
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
    fn open(&self) -> PyResult<Arc<SharedRegion>> {
        let region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        region.clone().ok_or_else(|| PyValueError::new_err("the region is closed"))
    }

    /// The region, if its addresses may be touched with the interpreter's lock held.
    fn shown(&self) -> PyResult<Arc<SharedRegion>> {
        let region = self.open().map_err(|_| PyBufferError::new_err("the region is closed"))?;
        if self.process.is_some_and(|process| process != process::id()) {
            return Err(PyBufferError::new_err(
                "a forked child has no addresses of its parent's region: build it in the child, or with inherit_on_fork=True",
            ));
        }
        if self.needs_populate.load(Ordering::Acquire) {
            return Err(PyBufferError::new_err(
                "a piece is read by Python code, which cannot run behind a touch of a page: call populate() first, or use read_at()",
            ));
        }
        Ok(region)
    }
}

/// The last reference has gone, in a thread that holds the interpreter's lock: a source in Python may be at work.
impl Drop for Region {
    fn drop(&mut self) {
        let mut region = self.region.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let _ = Python::try_attach(|py| {
            without_interpreter(py, || drop(region.take()));
            release_given_up(py);
        });
    }
}

fn range(region: &SharedRegion, offset: u64, length: Option<u64>) -> PyResult<Range<u64>> {
    let Some(length) = length else { return Ok(offset..region.len() as u64) };
    let end = offset.checked_add(length);
    Ok(offset..end.ok_or_else(|| {
        PyValueError::new_err(format!("{length} bytes from offset {offset} on end past 2**64"))
    })?)
}

/// The same exception, which names the piece.
fn inside_piece(py: Python<'_>, error: &PyErr, number: usize) -> PyErr {
    let text = format!("piece {number}");
    let _ = error.value(py).call_method1("add_note", (text,));
    error.clone_ref(py)
}
