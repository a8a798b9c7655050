//! Checkpoints of a training: its whole state between two rollouts, in one safetensors file that is replaced whole.

use super::trainer::State;
use super::{Adam, Losses, Trainer};
use crate::concept::Module;
use crate::{Error, Result, files};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::Path;

impl Trainer {
    /// Writes a checkpoint, whole or not at all. Between two rollouts ([`Trainer::between_rollouts`]) it holds the
    /// whole state; at other times a training that is resumed from it skips the rest of the current rollout.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let State { ram, sam, adam, history, rollouts } = &self.state;
        let mut tensors: Vec<(&str, &[f32])> =
            vec![("ram", &ram.parameters), ("adam.ram.first", &adam[0].first), ("adam.ram.second", &adam[0].second)];
        if let Some(sam) = sam {
            tensors.push(("sam", &sam.parameters));
            tensors.push(("adam.sam.first", &adam[1].first));
            tensors.push(("adam.sam.second", &adam[1].second));
        }
        let losses: Vec<f64> = history.iter().flat_map(|l| [l.resp, l.sem]).collect();
        let view = |dtype, bytes, len| TensorView::new(dtype, vec![len], bytes);
        let views = tensors
            .iter()
            .map(|(name, values)| Ok((*name, view(Dtype::F32, bytemuck::cast_slice(values), values.len())?)))
            .chain([view(Dtype::F64, bytemuck::cast_slice(&losses), losses.len()).map(|v| ("losses", v))])
            .collect::<std::result::Result<Vec<_>, _>>();
        let metadata =
            BTreeMap::from([("training".to_string(), self.identity()), ("rollouts".to_string(), rollouts.to_string())]);
        let bytes = views
            .and_then(|views| files::safetensors(views, &metadata))
            .map_err(|e| Error::internal(format!("the checkpoint cannot be written: {e}")))?;
        files::write(path, &bytes)
    }

    /// Continues from a checkpoint of the same training.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if the file is damaged, [`crate::ErrorKind::Mismatch`] if it is of another
    /// training: other prompts, recipe, seed, size or model. Another number of iterations does not make another
    /// training.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let damaged = |what: &str| {
            Error::damaged(path, format!("not a whole training checkpoint ({what})")).advise("delete it to start anew")
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(&e.to_string()))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(&e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("training") != Some(&self.identity()) {
            let problem = "the checkpoint of another training (prompts, recipe, seed, size or model differ)";
            return Err(
                Error::mismatch(path, problem).advise("delete it to start anew, or give the same settings to go on")
            );
        }
        let read = |name: &str, len: usize| -> Result<Vec<f32>> {
            let tensor = tensors.tensor(name).map_err(|_| damaged(name))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [len] {
                return Err(damaged(name));
            }
            Ok(bytemuck::pod_collect_to_vec(tensor.data()))
        };
        let losses = tensors.tensor("losses").map_err(|_| damaged("losses"))?;
        let losses: Vec<f64> = bytemuck::pod_collect_to_vec(losses.data());
        let history: Vec<Losses> = losses.as_chunks::<2>().0.iter().map(|&[resp, sem]| Losses { resp, sem }).collect();
        let module = |module: &Module, name: &str| -> Result<Module> {
            let parameters = read(name, module.parameters.len())?;
            Module::with_parameters(module.form(), module.shape(), parameters).ok_or_else(|| damaged(name))
        };
        let adam = |module: &Module, name: &str| -> Result<Adam> {
            let len = module.parameters.len();
            let moment = |which: &str| read(&format!("adam.{name}.{which}"), len);
            Ok(Adam { steps: history.len() as u64, first: moment("first")?, second: moment("second")? })
        };
        let rollouts = metadata.get("rollouts").and_then(|r| r.parse().ok()).ok_or_else(|| damaged("rollouts"))?;
        let ram = module(&self.state.ram, "ram")?;
        let sam = self.state.sam.as_ref().map(|sam| module(sam, "sam")).transpose()?;
        let second = sam.as_ref().map_or_else(|| Ok(Adam::new(0)), |sam| adam(sam, "sam"))?;
        self.state = State { adam: [adam(&ram, "ram")?, second], ram, sam, history, rollouts };
        Ok(())
    }

    /// Everything that decides the result, except the number of iterations.
    fn identity(&self) -> String {
        let recipe = super::Recipe { iterations: 0, ..self.recipe().clone() };
        let (task, shape) = (self.task(), self.state.ram.shape());
        let mut identity = serde_json::json!({
            "kind": task.kind, "concept": task.concept, "neutral": task.neutral, "seed": self.seed(),
            "fingerprint": self.base().1, "bottleneck": [shape.h, shape.w, shape.c], "recipe": recipe,
        });
        if !self.adapters().is_empty() {
            identity["adapters"] = self.adapters().iter().map(|used| (&*used.sha256, used.weight)).collect();
        }
        identity.to_string()
    }
}
