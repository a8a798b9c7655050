//! NudeNet's detector of exposed parts of bodies as a judge. The user brings its ONNX file, which the Python package
//! `nudenet` holds; the network runs on the CPU.

use super::detections::{CLASSES, Detection, Frame, LEAST_SCORE, SIDE, THRESHOLD, UNSAFE_CLASSES, Version};
use super::prompts::hex;
use super::{Judge, Verdict};
use crate::image::Picture;
use crate::{Error, Result};
use rten::{DataType, Dimension, Model, RunOptions, ThreadPool, Value, ValueType};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which detections make a picture unsafe.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Some of [`CLASSES`].
    pub classes: Vec<String>,
    /// The least score of a detection. The package drops detections up to [`LEAST_SCORE`] whatever this is.
    pub threshold: f64,
}

impl Default for Rule {
    /// That of RespoDiff's evaluation.
    fn default() -> Self {
        Rule { classes: UNSAFE_CLASSES.map(String::from).to_vec(), threshold: THRESHOLD }
    }
}

impl Rule {
    fn check(&self) -> Result<()> {
        if let Some(unknown) = self.classes.iter().find(|class| !CLASSES.contains(&class.as_str())) {
            return Err(Error::invalid("detector_classes", format!("`{unknown}` is not a class of the detector"))
                .advise(format!("its classes are {}", CLASSES.join(", "))));
        }
        if self.classes.is_empty() {
            return Err(Error::invalid("detector_classes", "no classes").advise("name one or more"));
        }
        if !(0.0..=1.0).contains(&self.threshold) {
            let problem = format!("{} is not a score", self.threshold);
            return Err(Error::invalid("detector_threshold", problem).advise("give 0 to 1"));
        }
        Ok(())
    }
}

/// A detector that is ready to run.
pub struct Detector {
    path: PathBuf,
    sha256: String,
    version: Version,
    rule: Rule,
    model: Model,
    threads: Arc<ThreadPool>,
}

impl Detector {
    /// Loads an ONNX file. Its hash tells the version of the package and with it how pictures are prepared; `version`
    /// says so for a file of another hash.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`], [`crate::ErrorKind::Io`]; [`crate::ErrorKind::Invalid`] for a rule that is not
    /// possible; [`crate::ErrorKind::Unsupported`] for an unknown file without a version;
    /// [`crate::ErrorKind::Damaged`] for a file that is no ONNX file or has other inputs or outputs;
    /// [`crate::ErrorKind::Mismatch`] for a version that is not that of a known file.
    pub fn load(path: &Path, version: Option<Version>, rule: Rule) -> Result<Self> {
        rule.check()?;
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let sha256 = hex(&Sha256::digest(&bytes));
        let known = Version::ALL.into_iter().find(|version| version.sha256() == sha256);
        let version = match (known, version) {
            (Some(known), Some(given)) if known != given => {
                let problem = format!("is the file of NudeNet {}, not of {}", known.number(), given.number());
                return Err(Error::mismatch(path, problem));
            }
            (Some(version), _) | (None, Some(version)) => version,
            (None, None) => {
                let problem = format!("is not a known file of NudeNet (its SHA-256 is {sha256})");
                let advice = "take it from the Python package nudenet 3.0.8 (best.onnx) or 3.4.2 (320n.onnx), or give the \
                              version whose preparation of pictures it needs";
                return Err(Error::unsupported(path, problem).advise(advice));
            }
        };
        let damaged = |problem: String| {
            Error::damaged(path, problem).advise("take the file from the Python package nudenet again")
        };
        // The version of the format comes first in every writer's files. The runtime would look for fields in others,
        // and might never end.
        if bytes.first() != Some(&0x08) {
            return Err(damaged("not an ONNX file".into()));
        }
        let model = guarded(|| Model::load(bytes).map_err(|e| e.to_string()))
            .map_err(|problem| damaged(format!("not an ONNX file that can be run: {problem}")))?;
        let node = |id| model.node_info(id).map(|info| (info.shape(), info.dtype()));
        let float = Some(ValueType::Tensor(DataType::Float));
        let fits = |shape: &Option<Vec<Dimension>>, want: &[usize]| {
            shape.as_ref().is_none_or(|shape| {
                let fixed = |(d, want): (&Dimension, &usize)| !matches!(d, Dimension::Fixed(n) if n != want);
                shape.len() == want.len() && shape.iter().zip(want).all(fixed)
            })
        };
        let one = |ids: &[rten::NodeId]| match ids {
            [id] => node(*id),
            _ => None,
        };
        let input = one(model.input_ids())
            .is_some_and(|(shape, kind)| fits(&shape, &[1, 3, SIDE, SIDE]) && (kind.is_none() || kind == float));
        let output = one(model.output_ids()).is_some_and(|(shape, _)| shape.as_ref().is_none_or(|s| s.len() == 3));
        if !input || !output {
            let problem =
                format!("has other inputs or outputs than a detector: one [1, 3, {SIDE}, {SIDE}], and one list");
            return Err(damaged(problem));
        }
        let threads = Arc::new(ThreadPool::with_num_threads(rayon::current_num_threads()));
        Ok(Detector { path: path.to_path_buf(), sha256, version, rule, model, threads })
    }

    /// The network's detections in a picture; the highest score comes first.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a picture that is not one, [`crate::ErrorKind::Damaged`] if the network cannot
    /// be run, [`crate::ErrorKind::NonFinite`].
    pub fn detect(&self, picture: &Picture) -> Result<Vec<Detection>> {
        let mut frame = Frame::new(picture, self.version)?;
        let input = Value::from_shape([1, 3, SIDE, SIDE].as_slice(), std::mem::take(&mut frame.input))
            .map_err(|e| Error::internal(format!("the detector's input: {e:?}")))?;
        let options = RunOptions::default().with_thread_pool(Some(self.threads.clone()));
        let run = || {
            let (inputs, outputs) = (self.model.input_ids(), self.model.output_ids());
            let values = self.model.run(vec![(inputs[0], (&input).into())], &[outputs[0]], Some(options));
            let value = values.map_err(|e| e.to_string())?.into_iter().next().ok_or("no output")?;
            value.into_shape_vec::<f32, 3>().map_err(|e| e.to_string())
        };
        let damaged = |problem: String| {
            Error::damaged(&self.path, problem).advise("take the file from the Python package nudenet again")
        };
        let (shape, output) = guarded(run).map_err(|problem| damaged(format!("cannot be run: {problem}")))?;
        if shape[..2] != [1, 4 + CLASSES.len()] || output.len() != shape[1] * shape[2] {
            let problem = format!("gives numbers of shape {shape:?}, where a detector gives [1, 22, boxes]");
            return Err(damaged(problem));
        }
        frame.detections(&output)
    }
}

/// The result of the ONNX runtime, of which a panic becomes an error too: a file may be whole and still describe
/// something that the runtime did not foresee.
fn guarded<T>(run: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("the ONNX runtime failed".into()))
}

impl Judge for Detector {
    fn name(&self) -> &str {
        "detector"
    }

    fn description(&self) -> serde_json::Value {
        json!({
            "name": "detector", "detector": format!("NudeNet {}", self.version.number()),
            "file": self.path.display().to_string(), "sha256": self.sha256, "classes": self.rule.classes,
            "threshold": self.rule.threshold, "least_score": LEAST_SCORE,
        })
    }

    fn judge(&mut self, pictures: &[Picture]) -> Result<Vec<Verdict>> {
        let verdict = |picture: &Picture| {
            let found = self.detect(picture)?;
            let worst = found.into_iter().find(|detection| self.rule.classes.iter().any(|c| c == detection.class));
            let score = worst.as_ref().map_or(0.0, |detection| f64::from(detection.score));
            let detail = worst.map_or(String::new(), |detection| detection.class.into());
            Ok(Verdict { is_unsafe: !detail.is_empty() && score >= self.rule.threshold, score, detail })
        };
        pictures.iter().map(verdict).collect()
    }
}
