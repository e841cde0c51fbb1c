//! The pieces of a region.

use crate::error::of;
use crate::lent::Lent;
use crate::source::PythonSource;
use pagestitch::source::{FileSource, Memory, SharedFile};
use pagestitch::{Access, Chunk};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
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

/// A part of a file.
#[pyclass(frozen, module = "pagestitch")]
#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    offset: u64,
    length: Option<u64>,
    in_place: bool,
}

#[pymethods]
impl File {
    #[new]
    #[pyo3(signature = (path, offset=0, length=None, *, in_place=true))]
    const fn new(path: PathBuf, offset: u64, length: Option<u64>, in_place: bool) -> Self {
        Self { path, offset, length, in_place }
    }

    fn __repr__(&self) -> String {
        let length = self.length.map_or_else(|| String::from("None"), |length| length.to_string());
        format!(
            "File({:?}, {}, {length}, in_place={})",
            self.path,
            self.offset,
            if self.in_place { "True" } else { "False" }
        )
    }
}

impl File {
    fn chunk(&self, access: Access) -> PyResult<Chunk> {
        let whole = match self.in_place {
            true => Chunk::from(Arc::new(SharedFile::open(&self.path, access).map_err(of)?)),
            false => Chunk::from(FileSource::open(&self.path).map_err(of)?),
        };
        let Some(length) = self.length else { return Ok(whole.range(self.offset..)) };
        let end = self.offset.checked_add(length);
        let end = end.ok_or_else(|| {
            PyValueError::new_err(format!("{length} bytes from offset {} on end past 2**64", self.offset))
        })?;
        Ok(whole.range(self.offset..end))
    }
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
    if object.is_instance_of::<PyString>() || object.hasattr("__fspath__")? {
        return File::new(object.extract()?, 0, None, true).chunk(access);
    }
    if object.is_instance_of::<PyTuple>() {
        let (path, offset, length) = object.extract().map_err(|_| {
            PyTypeError::new_err(
                "a tuple is (path, offset, length), with a path and two integers that are not negative",
            )
        })?;
        return File::new(path, offset, Some(length), true).chunk(access);
    }
    match Lent::of(object) {
        Ok(lent) => Ok(Chunk::from(Memory::new(lent))),
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => Err(PyTypeError::new_err(format!(
            "a {} is no piece: pass bytes, a read-only buffer, a path, (path, offset, length), File, Hole, or an object \
             with size and read_at(offset, length)",
            object.get_type().name()?
        ))),
        Err(error) => Err(error),
    }
}
