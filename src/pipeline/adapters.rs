//! The adapters that requests ask for.

use crate::weights::Adapter;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;

/// The most adapters of a picture.
pub(crate) const MOST_ADAPTERS: usize = 64;

/// Adapters with their weights, in their order. Two are equal if they change a model in the same way.
#[derive(Clone, Default)]
pub(crate) struct AdapterSet(pub Vec<(Arc<Adapter>, f32)>);

impl PartialEq for AdapterSet {
    fn eq(&self, other: &Self) -> bool {
        let key = |(adapter, weight): &(Arc<Adapter>, f32)| (adapter.sha256().to_string(), weight.to_bits());
        self.0.iter().map(key).eq(other.0.iter().map(key))
    }
}

impl AdapterSet {
    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a weight that is not finite, and for one adapter too many.
    pub fn push(&mut self, adapter: Arc<Adapter>, weight: f32) -> Result<()> {
        if !weight.is_finite() {
            let problem = format!("{weight} is no weight for `{}`", adapter.name());
            return Err(Error::invalid("loras", problem).advise("give a finite number, such as 0.8"));
        }
        if self.0.len() == MOST_ADAPTERS {
            let problem = format!("a picture has more than {MOST_ADAPTERS} adapters");
            return Err(Error::invalid("loras", problem).advise("give fewer"));
        }
        self.0.push((adapter, weight));
        Ok(())
    }
}

/// Opens an adapter's file, or if there is none of this name, that of this name in a folder of adapters.
///
/// # Errors
/// Those of [`Adapter::find`] and [`Adapter::load`].
pub(crate) fn open_adapter(folder: Option<&Path>, name: &str) -> Result<Arc<Adapter>> {
    let file = Path::new(name);
    let adapter = match folder.filter(|_| !file.exists()) {
        Some(folder) => Adapter::load(Adapter::find(folder, name.strip_suffix(".safetensors").unwrap_or(name))?),
        None => Adapter::load(file),
    };
    adapter.map(Arc::new)
}
