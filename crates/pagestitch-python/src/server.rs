//! Servers: the threads that answer page faults.

use crate::error::exception;
use crate::numbers::optional_workers;
use pagestitch::{BestServer, Eager, Server};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use std::process;
use std::sync::{Mutex, PoisonError};

/// Threads that answer the page faults of regions.
#[pyclass(frozen, module = "pagestitch")]
#[derive(Debug)]
pub(crate) struct Pool {
    pool: pagestitch::Pool,
}

#[pymethods]
impl Pool {
    #[new]
    #[pyo3(signature = (workers=None))]
    fn new(#[pyo3(from_py_with = optional_workers)] workers: Option<u64>) -> PyResult<Self> {
        let mut builder = pagestitch::Pool::builder();
        if let Some(workers) = workers {
            builder = builder.workers(usize::try_from(workers).unwrap_or(usize::MAX));
        }
        Ok(Self { pool: builder.start().map_err(|error| exception(&error))? })
    }

    /// The number of threads.
    #[getter]
    fn workers(&self) -> usize {
        self.pool.workers()
    }
}

/// The server of a region.
pub(crate) struct Chosen {
    pub(crate) server: Server,
    /// True if the build fills the region. All of its pages are present then, also in forked children.
    pub(crate) eager: bool,
}

/// The server of regions that name none, of one process: a forked child has none of its parent's threads.
static OF_PROCESS: Mutex<Option<(u32, BestServer)>> = Mutex::new(None);

/// The server that an argument names: a pool, `"eager"`, or none for the best one.
pub(crate) fn of_argument(argument: Option<&Bound<'_, PyAny>>) -> PyResult<Chosen> {
    let Some(argument) = argument else { return of_process() };
    if let Ok(pool) = argument.cast::<Pool>() {
        return Ok(Chosen { server: Server::from(&pool.get().pool), eager: false });
    }
    match argument.extract::<String>() {
        Ok(name) if name == "eager" => Ok(Chosen { server: Eager.into(), eager: true }),
        _ => Err(PyTypeError::new_err("the server is None, a pagestitch.Pool or \"eager\"")),
    }
}

fn of_process() -> PyResult<Chosen> {
    let mut server = OF_PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    let own = server.take().filter(|(process, _)| *process == process::id());
    let (_, best) = server.insert(match own {
        Some(own) => own,
        None => (process::id(), pagestitch::best_server().map_err(|error| exception(&error))?),
    });
    Ok(Chosen { server: Server::from(&*best), eager: best.pool().is_none() })
}
