//! The checkpoint that `--model` names: the demo if the flag is absent, otherwise a folder or file if it exists,
//! otherwise a Hugging Face model id.

use super::progress::Progress;
use crate::Result;
use crate::weights::Source;
use crate::weights::hub::HubConfig;
use std::cell::OnceCell;

/// The cache and the server of Hugging Face models, as set by environment variables.
pub(super) fn hub() -> Result<HubConfig> {
    HubConfig::from_variables(|name| std::env::var_os(name))
}

/// Finds a checkpoint, or downloads it.
pub(super) fn source(model: Option<&str>) -> Result<Source> {
    let Some(model) = model else { return Ok(Source::demo()) };
    let shown = OnceCell::new();
    let source = Source::find(model, &hub, &mut |downloaded| {
        let shown = shown.get_or_init(|| Progress::new("downloading", 0, "bytes"));
        shown.set_total(downloaded.total);
        shown.set(downloaded.bytes, downloaded.file);
    });
    if let Some(shown) = shown.get() {
        shown.finish();
    }
    source
}
