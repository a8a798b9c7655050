//! The modules of a network by all the names that adapter files give them.

use super::super::single::{original, text_model};
use super::super::tensors::Tensors;
use super::keys;
use crate::Result;
use crate::graph::{WeightKind, WeightSpec};
use crate::models::UNetConfig;
use std::collections::HashMap;

/// The shape of a tensor as a matrix, and what a column stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    pub outputs: usize,
    /// Numbers of a row: `inputs * taps`.
    pub width: usize,
    /// Taps of a convolution's kernel; 1 for everything else.
    pub taps: usize,
}

/// A network that adapters may change: its modules and tensors.
pub(crate) struct Network<'a> {
    pub(super) component: &'static str,
    pub(super) tensors: Tensors,
    specs: &'a [WeightSpec],
    /// The name of each module in the checkpoint, by its spellings.
    modules: HashMap<String, String>,
    /// The index of each tensor's weight, and the tensor's index within it.
    places: HashMap<&'a str, (usize, usize)>,
}

impl<'a> Network<'a> {
    /// A network that reads `specs` from `tensors`; `component` is its folder in a checkpoint, `unet` its configuration
    /// if it is a UNet.
    pub(crate) fn new(
        component: &'static str,
        specs: &'a [WeightSpec],
        tensors: Tensors,
        unet: Option<&UNetConfig>,
    ) -> Self {
        let each = specs
            .iter()
            .enumerate()
            .flat_map(|(i, spec)| spec.names.iter().enumerate().map(move |(part, name)| (name.as_str(), (i, part))));
        let places: HashMap<&str, (usize, usize)> = each.collect();
        let mut modules = HashMap::new();
        for name in places.keys().filter(|name| name.ends_with(".weight")) {
            let module = name.trim_end_matches(".weight");
            let original = unet.and_then(|config| original::unet(name, config));
            for spelling in [Some(*name), original.as_deref()].into_iter().flatten() {
                let spelling = spelling.trim_end_matches(".weight");
                // kohya's scripts write underscores for dots.
                modules.insert(spelling.replace('.', "_"), module.to_string());
                modules.insert(spelling.to_string(), module.to_string());
            }
        }
        Network { component, tensors, specs, modules, places }
    }

    /// The checkpoint's name of a module that a file spells so.
    pub(super) fn module(&self, spelled: &str) -> Option<&str> {
        let full = text_model(spelled).filter(|_| self.component != "unet");
        let others = keys::respelled(full.as_deref().unwrap_or(spelled));
        let spellings = [Some(spelled), full.as_deref(), Some(&others[0]), Some(&others[1])];
        spellings.into_iter().flatten().find_map(|spelling| self.modules.get(spelling)).map(String::as_str)
    }

    /// The shape of a tensor.
    pub(super) fn target(&self, tensor: &str) -> Option<Target> {
        let &(index, part) = self.places.get(tensor)?;
        let spec = &self.specs[index];
        let taps = match spec.kind {
            WeightKind::Matrix { kernel, .. } | WeightKind::Mirrored { kernel, .. } => kernel * kernel,
            WeightKind::Vector | WeightKind::Table => 1,
        };
        Some(Target { outputs: spec.outputs[part], width: spec.width, taps })
    }

    /// A tensor's numbers without any adapter.
    ///
    /// # Errors
    /// Those of [`Tensors::stored`].
    pub(super) fn read(&self, tensor: &str) -> Result<Vec<f32>> {
        let (index, part) = self.places[tensor];
        self.tensors.stored(&self.specs[index])?[part].read()
    }

    /// The width of the text that a UNet's cross attention reads.
    pub(super) fn text_width(&self) -> Option<usize> {
        let of = |name: &&&str| self.component == "unet" && name.ends_with(".attn2.to_k.weight");
        self.places.keys().find(of).and_then(|name| self.target(name)).map(|target| target.width)
    }
}
