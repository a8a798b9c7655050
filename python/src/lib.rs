//! The native part of the Python module `respodiff`: requests as JSON, pictures, concepts. The Python part, beside
//! `python/respodiff/__init__.py`, turns arguments into requests.

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple, PyType};
use respodiff::concepts::{Files, Shelf};
use respodiff::hub::HubConfig;
use respodiff::pictures::GenerationInfo;
use respodiff::requests::Made;
use respodiff::{ErrorKind, Pipeline, Result};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

/// A failure as an exception.
fn raised(error: &respodiff::Error) -> PyErr {
    let kind = match error.kind() {
        ErrorKind::Invalid => "invalid",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Damaged => "damaged",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Mismatch => "mismatch",
        ErrorKind::OutOfMemory => "out_of_memory",
        ErrorKind::Io => "io",
        ErrorKind::Network => "network",
        ErrorKind::NonFinite => "non_finite",
        ErrorKind::DeviceLost => "device_lost",
        ErrorKind::Cancelled => "cancelled",
        _ => "internal",
    };
    Python::attach(|py| {
        let made = py.import("respodiff._errors").and_then(|module| {
            module.call_method1("made", (kind, error.subject().to_string(), error.problem(), error.advice()))
        });
        made.map_or_else(|problem| problem, PyErr::from_value)
    })
}

/// A path's text.
fn text(path: PathBuf) -> PyResult<String> {
    path.into_os_string().into_string().map_err(|path| {
        pyo3::exceptions::PyValueError::new_err(format!("{} is not UTF-8", PathBuf::from(path).display()))
    })
}

/// An engine that takes requests as JSON. Programs use `respodiff.Engine`.
#[pyclass(frozen, module = "respodiff._respodiff")]
struct Engine(Pipeline);

/// Concepts that were loaded, by the names that the request calls them; then files, and the demo's concepts.
struct Loaded(HashMap<String, Arc<respodiff::Concept>>);

impl Shelf for Loaded {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name) || Files.has(name)
    }

    fn find(&self, name: &str) -> Result<Arc<respodiff::Concept>> {
        self.0.get(name).map_or_else(|| Files.find(name), |concept| Ok(concept.clone()))
    }
}

#[pymethods]
impl Engine {
    #[new]
    fn new(py: Python<'_>, model: &str, options: &str) -> PyResult<Self> {
        let hub = || HubConfig::from_variables(|name| std::env::var_os(name));
        let opened = py.detach(|| Pipeline::find(model, options.as_bytes(), &hub));
        opened.map(Engine).map_err(|error| raised(&error))
    }

    fn info(&self) -> String {
        self.0.info().to_string()
    }

    /// The pictures of a request, and warnings.
    fn generate(
        &self,
        py: Python<'_>,
        request: &str,
        named: HashMap<String, Py<Concept>>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(Vec<Picture>, Vec<String>)> {
        let loaded = Loaded(named.into_iter().map(|(name, concept)| (name, concept.get().concept.clone())).collect());
        let mut exception = None;
        // Other Python threads run meanwhile. Between two steps, this one looks for Ctrl-C and calls the callback.
        let mut between = |done: usize, total: usize| {
            let outcome = Python::attach(|py| {
                py.check_signals()?;
                progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (done, total)).map(drop))
            });
            match outcome {
                Ok(()) => ControlFlow::Continue(()),
                Err(raised) => {
                    exception.get_or_insert(raised);
                    ControlFlow::Break(())
                }
            }
        };
        let answer = py.detach(|| {
            let request = Pipeline::parse(request.as_bytes())?;
            self.0.generate(&request, &loaded, &mut between)
        });
        if let Some(exception) = exception {
            return Err(exception);
        }
        let answer = answer.map_err(|error| raised(&error))?;
        Ok((answer.pictures.into_iter().map(Picture).collect(), answer.warnings))
    }
}

/// A learnt concept, such as "a woman".
#[pyclass(frozen, module = "respodiff._respodiff")]
struct Concept {
    concept: Arc<respodiff::Concept>,
    /// The file, as it was named.
    #[pyo3(get)]
    path: String,
}

#[pymethods]
impl Concept {
    /// Reads a concept file, or the demo's concept of that name if there is no such file.
    #[staticmethod]
    fn load(path: PathBuf) -> PyResult<Self> {
        let path = text(path)?;
        let concept = respodiff::Concept::open(&path).map_err(|error| raised(&error))?;
        Ok(Concept { concept: Arc::new(concept), path })
    }

    /// The prompt that it was trained for, such as "a woman".
    #[getter]
    fn name(&self) -> &str {
        &self.concept.metadata.concept
    }

    /// An identifier of its numbers.
    #[getter]
    fn fingerprint(&self) -> String {
        self.concept.fingerprint()
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        Ok((PyType::new::<Self>(py).getattr("load")?, (self.path.clone(),)))
    }

    fn __repr__(&self) -> String {
        format!("<respodiff.Concept {:?} of {}>", self.concept.metadata.concept, self.path)
    }
}

/// An 8-bit RGB picture, which also is a numpy array by `numpy.asarray(picture)`, without a copy.
#[pyclass(frozen, module = "respodiff._respodiff")]
struct Picture(Made);

#[pymethods]
impl Picture {
    /// The picture of these pixels, and of a record as `info` gives it, in JSON.
    #[new]
    fn new(width: u32, height: u32, rgb: Vec<u8>, parameters: &str) -> PyResult<Self> {
        let info: GenerationInfo = serde_json::from_str(parameters)
            .map_err(|problem| pyo3::exceptions::PyValueError::new_err(format!("parameters: {problem}")))?;
        Made::new(width, height, rgb, info).map(Picture).map_err(|error| raised(&error))
    }

    #[getter]
    fn width(&self) -> u32 {
        self.0.picture.width
    }

    #[getter]
    fn height(&self) -> u32 {
        self.0.picture.height
    }

    #[getter]
    fn seed(&self) -> u64 {
        self.0.info.seed
    }

    /// The names of its concepts, such as "a woman".
    #[getter]
    fn concepts(&self) -> Vec<&str> {
        self.0.info.concepts.iter().map(|used| used.name.as_str()).collect()
    }

    /// How it was made, as its file records it.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import("json")?.call_method1("loads", (self.parameters()?,))
    }

    /// A copy of the pixels: rows from the top, pixels from the left, red, green, blue.
    #[getter]
    fn rgb<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.picture.rgb)
    }

    /// The PNG file that `respodiff sample` writes of it, byte for byte.
    #[getter]
    fn png<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let png = py.detach(|| self.0.png()).map_err(|error| raised(&error))?;
        Ok(PyBytes::new(py, &png))
    }

    /// The picture as a `PIL.Image.Image`, which needs the package pillow.
    #[getter]
    fn image<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let size = (self.width(), self.height());
        py.import("PIL.Image")?.call_method1("frombytes", ("RGB", size, self.rgb(py)))
    }

    /// `image`, as a method.
    fn to_pil<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.image(py)
    }

    /// Writes `png` to a file, whole or not at all.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.save(&path)).map_err(|error| raised(&error))
    }

    /// numpy's description of the pixels, which stay where they are. An array of them keeps the picture alive.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        const READ_ONLY: bool = true;
        let picture = &self.0.picture;
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", "|u1")?;
        interface.set_item("shape", (picture.height, picture.width, 3))?;
        interface.set_item("data", (picture.rgb.as_ptr() as usize, READ_ONLY))?;
        Ok(interface)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyType>, Bound<'py, PyTuple>)> {
        let arguments = (self.width(), self.height(), self.rgb(py), self.parameters()?);
        let arguments = arguments.into_bound_py_any(py)?.cast_into::<PyTuple>()?;
        Ok((PyType::new::<Self>(py), arguments))
    }

    fn __repr__(&self) -> String {
        format!("<respodiff.Picture {}x{}, seed {}>", self.width(), self.height(), self.seed())
    }
}

impl Picture {
    fn parameters(&self) -> PyResult<String> {
        self.0.info.json().map_err(|error| raised(&error))
    }
}

#[pymodule]
fn _respodiff(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<Engine>()?;
    module.add_class::<Concept>()?;
    module.add_class::<Picture>()
}
