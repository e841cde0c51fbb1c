//! The chunks of a region.

use crate::error::{of, of_descriptor};
use crate::held::Held;
use crate::lent::Lent;
use crate::numbers::{length, offset, optional_length, shown};
use crate::source::PythonSource;
use pagestitch::source::{FileSource, Memory, SharedFile};
use pagestitch::{Access, Chunk};
use pyo3::exceptions::{PyAttributeError, PyOSError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};
use std::fs;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

/// So many zeros, without memory.
#[pyclass(frozen, module = "pagestitch")]
#[derive(Debug)]
pub(crate) struct Hole {
    /// Its length in bytes.
    #[pyo3(get)]
    length: u64,
}

#[pymethods]
impl Hole {
    #[new]
    const fn new(#[pyo3(from_py_with = length)] length: u64) -> Self {
        Self { length }
    }

    fn __repr__(&self) -> String {
        format!("Hole({})", self.length)
    }
}

/// A part of a file; without `length`, up to its end.
///
/// `file` is a path, or an open file: an object with `fileno()`, or its number. That one is duplicated, so it
/// may be closed at once; its position does not matter.
///
/// `in_place` shows its whole pages as `mmap` does: without a copy, and with all later changes of the file. A
/// page past the end of a truncated file is SIGBUS. Without it, and at the edges of pages, the bytes are read on
/// first touch.
#[pyclass(frozen, module = "pagestitch")]
#[derive(Debug)]
pub(crate) struct File {
    place: Place,
    offset: u64,
    length: Option<u64>,
    in_place: bool,
}

/// The place where a file is found.
#[derive(Debug)]
enum Place {
    Path(PathBuf),
    /// With the number of the descriptor that was duplicated.
    Open(fs::File, RawFd),
}

#[pymethods]
impl File {
    #[new]
    #[pyo3(signature = (file, offset=0, length=None, *, in_place=true))]
    fn new(
        file: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = offset)] offset: u64,
        #[pyo3(from_py_with = optional_length)] length: Option<u64>,
        in_place: bool,
    ) -> PyResult<Self> {
        Ok(Self { place: Place::of(file)?, offset, length, in_place })
    }

    fn __repr__(&self) -> String {
        let file = match &self.place {
            Place::Path(path) => format!("{path:?}"),
            Place::Open(..) => String::from("<open file>"),
        };
        let length = self.length.map_or_else(|| String::from("None"), |length| length.to_string());
        let in_place = if self.in_place { "True" } else { "False" };
        format!("File({file}, {}, {length}, in_place={in_place})", self.offset)
    }
}

impl File {
    fn chunk(&self, access: Access) -> PyResult<Chunk> {
        let whole = match self.in_place {
            true => Chunk::from(Arc::new(self.shared(access)?)),
            false => Chunk::from(self.read()?),
        };
        let Some(length) = self.length else { return Ok(whole.range(self.offset..)) };
        let end = self.offset.checked_add(length);
        let end = end.ok_or_else(|| {
            PyValueError::new_err(format!("{length} bytes from offset {} on end past 2**64 - 1", self.offset))
        })?;
        Ok(whole.range(self.offset..end))
    }

    fn shared(&self, access: Access) -> PyResult<SharedFile> {
        match &self.place {
            Place::Path(path) => SharedFile::open(path, access).map_err(of),
            Place::Open(file, number) => {
                SharedFile::try_from(clone(file, *number)?).map_err(|error| of_descriptor(*number, error))
            }
        }
    }

    fn read(&self) -> PyResult<FileSource> {
        match &self.place {
            Place::Path(path) => FileSource::open(path).map_err(of),
            Place::Open(file, number) => {
                FileSource::try_from(clone(file, *number)?).map_err(|error| of_descriptor(*number, error))
            }
        }
    }
}

impl Place {
    fn of(file: &Bound<'_, PyAny>) -> PyResult<Self> {
        if is_path(file)? {
            // A path of bytes, too.
            let path = file.py().import("os")?.call_method1("fsdecode", (file,))?;
            return Ok(Self::Path(path.extract()?));
        }
        let number = descriptor(file)?;
        Ok(Self::Open(duplicate(number)?, number))
    }
}

fn is_path(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(object.is_instance_of::<PyString>() || object.hasattr("__fspath__")?)
}

/// The number of an open file's descriptor.
fn descriptor(file: &Bound<'_, PyAny>) -> PyResult<RawFd> {
    let number = match file.hasattr("fileno")? {
        true => file.call_method0("fileno")?,
        false => file.clone(),
    };
    number.extract().map_err(|error: PyErr| match error.is_instance_of::<PyOverflowError>(file.py()) {
        true => is_not_open(&shown(&number)),
        false => PyTypeError::new_err(
            "a file is a path, an object with fileno(), or the number of an open descriptor",
        ),
    })
}

fn is_not_open(number: &str) -> PyErr {
    PyValueError::new_err(format!("the descriptor is {number}: pass an open one"))
}

/// A descriptor of its own for an open file.
fn duplicate(number: RawFd) -> PyResult<fs::File> {
    if number < 0 {
        return Err(is_not_open(&number.to_string()));
    }
    // SAFETY: the descriptor is borrowed for this call, in which no Python code runs. A closed one is EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let duplicated = borrowed.try_clone_to_owned();
    duplicated.map(fs::File::from).map_err(|error| match error.raw_os_error() {
        Some(EBADF) => PyOSError::new_err((EBADF, format!("descriptor {number}: {error}: pass an open one"))),
        _ => of_descriptor(number, error),
    })
}

/// A descriptor of its own for a chunk.
fn clone(file: &fs::File, number: RawFd) -> PyResult<fs::File> {
    file.try_clone().map_err(|error| of_descriptor(number, error))
}

/// The errno of a closed descriptor.
const EBADF: i32 = 9;

/// An object in the list of a region's chunks.
pub(crate) struct Listed {
    pub(crate) chunk: Chunk,
    /// The object, if the garbage collector must know that the region keeps it.
    pub(crate) held: Option<Held>,
    /// True if Python code reads the chunk.
    pub(crate) in_python: bool,
}

impl Listed {
    /// The chunk that an object stands for.
    pub(crate) fn of(object: &Bound<'_, PyAny>, access: Access) -> PyResult<Self> {
        if let Some(size) = size_of_source(object)? {
            let source = PythonSource::new(object, &size)?;
            let held = Some(Held::Source(Arc::clone(source.object())));
            return Ok(Self { chunk: Chunk::source(Arc::new(source)), held, in_python: true });
        }
        let not_in_python = |chunk| Self { chunk, held: None, in_python: false };
        if let Ok(hole) = object.cast::<Hole>() {
            return Ok(not_in_python(Chunk::hole(hole.get().length)));
        }
        if let Ok(file) = object.cast::<File>() {
            return file.get().chunk(access).map(not_in_python);
        }
        match file(object)? {
            Some(file) => file.chunk(access).map(not_in_python),
            None => Self::of_buffer(object),
        }
    }

    fn of_buffer(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let lent =
            Lent::of(object).map_err(|error| match error.is_instance_of::<PyTypeError>(object.py()) {
                true => is_no_chunk(object),
                false => error,
            })?;
        // `bytes` refer to nothing.
        let is_bytes = object.is_exact_instance_of::<PyBytes>();
        let held = (!is_bytes).then(|| Held::Exporter(Arc::clone(lent.export())));
        Ok(Self { chunk: Chunk::from(Memory::new(lent)), held, in_python: false })
    }
}

/// The size of an object with `read_at` and `size`; none, if it lacks one of them.
fn size_of_source<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    if !object.hasattr("read_at")? {
        return Ok(None);
    }
    match object.getattr("size") {
        Ok(size) => Ok(Some(size)),
        // A property that raises it, as one of its own attributes is absent, is an attribute of the type.
        Err(error)
            if error.is_instance_of::<PyAttributeError>(object.py())
                && !object.get_type().hasattr("size")? =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The file that an object names, if it names one.
fn file(object: &Bound<'_, PyAny>) -> PyResult<Option<File>> {
    if is_path(object)? || object.hasattr("fileno")? {
        return File::new(object, 0, None, true).map(Some);
    }
    if !object.is_instance_of::<PyTuple>() {
        return Ok(None);
    }
    let (file, offset, length): (Bound<'_, PyAny>, _, _) = object.extract().map_err(|_| {
        PyTypeError::new_err(
            "a tuple is (path, offset, length), with a path and two integers that are not negative",
        )
    })?;
    File::new(&file, offset, Some(length), true).map(Some)
}

fn is_no_chunk(object: &Bound<'_, PyAny>) -> PyErr {
    match object.get_type().name() {
        Ok(kind) => PyTypeError::new_err(format!(
            "an object of the type {kind} is no chunk: pass bytes, a read-only buffer, a path, an open file, (path, offset, length), \
             File, Hole, or an object with size and read_at(offset, length)"
        )),
        Err(error) => error,
    }
}
