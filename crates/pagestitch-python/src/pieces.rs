//! The pieces of a region.

use crate::error::of;
use crate::lent::Lent;
use crate::source::PythonSource;
use pagestitch::source::{FileSource, Memory, SharedFile};
use pagestitch::{Access, Chunk};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
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
    const fn new(length: u64) -> Self {
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
    Open(fs::File),
}

#[pymethods]
impl File {
    #[new]
    #[pyo3(signature = (file, offset=0, length=None, *, in_place=true))]
    fn new(file: &Bound<'_, PyAny>, offset: u64, length: Option<u64>, in_place: bool) -> PyResult<Self> {
        let place = match is_path(file)? {
            true => Place::Path(file.extract()?),
            false => Place::Open(duplicate(file)?),
        };
        Ok(Self { place, offset, length, in_place })
    }

    fn __repr__(&self) -> String {
        let file = match &self.place {
            Place::Path(path) => format!("{path:?}"),
            Place::Open(_) => String::from("<open file>"),
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
            PyValueError::new_err(format!("{length} bytes from offset {} on end past 2**64", self.offset))
        })?;
        Ok(whole.range(self.offset..end))
    }

    fn shared(&self, access: Access) -> PyResult<SharedFile> {
        match &self.place {
            Place::Path(path) => SharedFile::open(path, access).map_err(of),
            Place::Open(file) => SharedFile::try_from(file.try_clone()?).map_err(of),
        }
    }

    fn read(&self) -> PyResult<FileSource> {
        match &self.place {
            Place::Path(path) => FileSource::open(path).map_err(of),
            Place::Open(file) => FileSource::try_from(file.try_clone()?).map_err(of),
        }
    }
}

fn is_path(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(object.is_instance_of::<PyString>() || object.hasattr("__fspath__")?)
}

/// A descriptor of its own for an open file.
fn duplicate(file: &Bound<'_, PyAny>) -> PyResult<fs::File> {
    let number = match file.hasattr("fileno")? {
        true => file.call_method0("fileno")?,
        false => file.clone(),
    };
    let number: RawFd = number.extract().map_err(|_| {
        PyTypeError::new_err("a file is a path, an object with fileno(), or the number of an open descriptor")
    })?;
    if number < 0 {
        return Err(PyValueError::new_err(format!("the descriptor is {number}: pass an open one")));
    }
    // SAFETY: the descriptor is borrowed for this call, in which no Python code runs. A closed one is EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(borrowed.try_clone_to_owned()?.into())
}

/// A chunk, and whether it is read by Python code.
pub(crate) struct Piece {
    pub(crate) chunk: Chunk,
    pub(crate) in_python: bool,
}

impl Piece {
    /// The piece that an object stands for.
    pub(crate) fn of(object: &Bound<'_, PyAny>, access: Access) -> PyResult<Self> {
        if object.hasattr("read_at")? && object.hasattr("size")? {
            let source = PythonSource::of(object)?;
            return Ok(Self { chunk: Chunk::source(Arc::new(source)), in_python: true });
        }
        Ok(Self { chunk: chunk(object, access)?, in_python: false })
    }
}

fn chunk(object: &Bound<'_, PyAny>, access: Access) -> PyResult<Chunk> {
    if let Ok(hole) = object.cast::<Hole>() {
        return Ok(Chunk::hole(hole.get().length));
    }
    if let Ok(file) = object.cast::<File>() {
        return file.get().chunk(access);
    }
    if is_path(object)? || object.hasattr("fileno")? {
        return File::new(object, 0, None, true)?.chunk(access);
    }
    if object.is_instance_of::<PyTuple>() {
        let (file, offset, length): (Bound<'_, PyAny>, _, _) = object.extract().map_err(|_| {
            PyTypeError::new_err(
                "a tuple is (path, offset, length), with a path and two integers that are not negative",
            )
        })?;
        return File::new(&file, offset, Some(length), true)?.chunk(access);
    }
    match Lent::of(object) {
        Ok(lent) => Ok(Chunk::from(Memory::new(lent))),
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => Err(PyTypeError::new_err(format!(
            "a {} is no piece: pass bytes, a read-only buffer, a path, an open file, (path, offset, length), File, Hole, or an \
             object with size and read_at(offset, length)",
            object.get_type().name()?
        ))),
        Err(error) => Err(error),
    }
}
