//! The checkpoint that `--model` names: the demo if the flag is absent, otherwise a folder or file if it exists,
//! otherwise a Hugging Face model id.

use super::progress::Progress;
use crate::Result;
use crate::weights::Source;
use crate::weights::hub::{self, HubConfig};
use std::path::Path;

/// The cache and the server of Hugging Face models, as set by environment variables.
pub(super) fn hub() -> Result<HubConfig> {
    HubConfig::from_variables(|name| std::env::var_os(name))
}

/// Finds a checkpoint, or downloads it.
pub(super) fn source(model: Option<&str>) -> Result<Source> {
    let Some(model) = model else { return Ok(Source::demo()) };
    let path = Path::new(model);
    if path.exists() || [".safetensors", ".ckpt", ".pt", ".pth", ".bin"].iter().any(|end| model.ends_with(end)) {
        return Source::open(path);
    }
    let shown = Progress::new("downloading", 0, "bytes");
    let folder = hub::resolve(model, &hub()?, &mut |downloaded| {
        shown.set_total(downloaded.total);
        shown.set(downloaded.bytes, downloaded.file);
    });
    shown.finish();
    Source::folder(folder?)
}
