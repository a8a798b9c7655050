//! `respodiff convert`.

use super::{parts, say, warn};
use crate::weights::Format;
use crate::{Error, Result};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The checkpoint: a folder, a single file or a Hugging Face model id
    source: String,
    /// A file in the original layout if the name ends in .safetensors, else a folder as diffusers writes it
    destination: PathBuf,
    /// Number format: fp16, bf16 or fp32 [default: each tensor's own]
    #[arg(long, value_name = "fp16|bf16|fp32")]
    dtype: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let format = match args.dtype.as_deref() {
        None => None,
        Some("fp16") => Some(Format::F16),
        Some("bf16") => Some(Format::BF16),
        Some("fp32") => Some(Format::F32),
        Some(other) => {
            let problem = format!("`{other}` is no number format");
            return Err(Error::invalid("dtype", problem).advise("give fp16, bf16 or fp32"));
        }
    };
    let source = args.parts.source(Some(&args.source))?;
    for note in source.convert(&args.destination, format)? {
        warn(&format!("a file in the original layout does not say {note}"));
    }
    say(&args.destination.display().to_string());
    Ok(())
}
