//! Servers: the threads that answer page faults.

use crate::error::exception;
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
    fn new(workers: Option<usize>) -> PyResult<Self> {
        let mut builder = pagestitch::Pool::builder();
        if let Some(workers) = workers {
            builder = builder.workers(workers);
        }
        Ok(Self { pool: builder.start().map_err(|error| exception(&error))? })
    }

    /// The number of threads.
    #[getter]
    fn workers(&self) -> usize {
        self.pool.workers()
    }
}

/// The server of regions that name none, of one process: a forked child has none of its parent's threads.
static OF_PROCESS: Mutex<Option<(u32, BestServer)>> = Mutex::new(None);

/// The server that an argument names: a pool, `"eager"`, or none for the best one.
pub(crate) fn of_argument(argument: Option<&Bound<'_, PyAny>>) -> PyResult<Server> {
    let Some(argument) = argument else { return of_process() };
    if let Ok(pool) = argument.cast::<Pool>() {
        return Ok(Server::from(&pool.get().pool));
    }
    match argument.extract::<String>() {
        Ok(name) if name == "eager" => Ok(Eager.into()),
        _ => Err(PyTypeError::new_err("the server is None, a pagestitch.Pool or \"eager\"")),
    }
}

fn of_process() -> PyResult<Server> {
    let mut server = OF_PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    let own = server.take().filter(|(process, _)| *process == process::id());
    let (_, best) = server.insert(match own {
        Some(own) => own,
        None => (process::id(), pagestitch::best_server().map_err(|error| exception(&error))?),
    });
    Ok(Server::from(&*best))
}
