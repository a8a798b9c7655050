//! Networks whose weights adapters change: merged while they are loaded, and exchanged afterwards.

use super::read_config;
use crate::Result;
use crate::backend::{Precision, Weights};
use crate::device::Device;
use crate::graph::{Graph, WeightSpec};
use crate::models::{ClipConfig, UNetConfig, UNetInput, text_encoder, unet};
use crate::weights::{Adapter, Edition, Network, Source, Tensors, adapted};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A checkpoint with adapters.
pub struct Adapted<'a> {
    source: &'a Source,
    /// The tensors of the networks that adapters may change; empty without adapters.
    tensors: BTreeMap<&'static str, Tensors>,
}

impl<'a> Adapted<'a> {
    /// # Errors
    /// Those of reading the configurations, and of `adapted`.
    pub fn new(source: &'a Source, adapters: &[(Arc<Adapter>, f32)]) -> Result<Self> {
        if adapters.is_empty() {
            return Ok(Adapted { source, tensors: BTreeMap::new() });
        }
        let config = match source.has("unet/config.json") {
            true => Some(read_config(source, "unet", UNetConfig::parse)?),
            false => None,
        };
        let mut graphs: Vec<(&'static str, Graph)> = Vec::new();
        graphs.extend(config.iter().map(|config| ("unet", unet(config, UNetInput::default()))));
        for component in ["text_encoder", "text_encoder_2"] {
            if source.has(&format!("{component}/config.json")) {
                let config = read_config(source, component, ClipConfig::parse)?;
                graphs.push((component, text_encoder(&config, 1)));
            }
        }
        let mut networks = Vec::new();
        for (component, graph) in &graphs {
            let config = config.as_ref().filter(|_| *component == "unet");
            networks.push(Network::new(component, graph.weights(), source.tensors(component)?, config));
        }
        Ok(Adapted { source, tensors: adapted(adapters, networks)? })
    }

    /// The weights of a component.
    ///
    /// # Errors
    /// Those of [`Source::tensors`].
    pub fn tensors(&self, component: &str) -> Result<Tensors> {
        self.tensors.get(component).cloned().map_or_else(|| self.source.tensors(component), Ok)
    }
}

/// A network's weights: as they were loaded first, and as they are with the adapters of the moment, which share with
/// the first all that both have.
#[derive(Clone)]
pub(super) struct Adaptable {
    first: (Edition, Weights),
    now: (Edition, Weights),
}

impl Adaptable {
    /// # Errors
    /// Those of [`crate::backend::Backend::weights`].
    pub fn load(device: &Device, specs: &[WeightSpec], tensors: &Tensors, precision: Precision) -> Result<Self> {
        let first = (tensors.editions(), device.weights(specs, tensors, &[], precision)?);
        Ok(Adaptable { now: first.clone(), first })
    }

    /// The weights with other adapters, which `tensors` have been changed by; `None` if they are those of the moment.
    ///
    /// # Errors
    /// Those of [`crate::backend::Backend::weights`].
    pub fn adapt(
        &self,
        device: &Device,
        specs: &[WeightSpec],
        tensors: &Tensors,
        precision: Precision,
    ) -> Result<Option<Self>> {
        let editions = tensors.editions();
        if editions == self.now.0 {
            return Ok(None);
        }
        let now = match editions == self.first.0 {
            true => self.first.clone(),
            false => (editions, device.weights(specs, tensors, &[&self.first.1], precision)?),
        };
        Ok(Some(Adaptable { first: self.first.clone(), now }))
    }

    /// The weights of the moment.
    pub fn weights(&self) -> &Weights {
        &self.now.1
    }

    /// True if both were loaded first as the same weights.
    pub fn has_first_of(&self, other: &Adaptable) -> bool {
        Arc::ptr_eq(&self.first.1, &other.first.1)
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        let more = if Arc::ptr_eq(&self.first.1, &self.now.1) { 0 } else { self.now.1.bytes() };
        self.first.1.bytes() + more
    }
}
