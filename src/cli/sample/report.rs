//! What a run prints once its pictures are made.

use super::Args;
use super::saved::Saved;
use crate::backend::Precision;
use crate::cli::out::Pictures;
use crate::cli::{say, tell};
use crate::engine::{Engine, MemoryPlan};
use crate::pipeline::told;
use serde_json::json;
use std::time::{Duration, Instant};

/// A finished run.
pub(super) struct Report<'a> {
    pub(super) args: &'a Args,
    pub(super) engine: &'a Engine,
    pub(super) saved: &'a Saved<'a>,
    /// The time at which the process started.
    pub(super) started: Instant,
    pub(super) loading: Duration,
    pub(super) sampling: Duration,
    pub(super) memory: MemoryPlan,
}

impl Report<'_> {
    /// Prints times and memory to stderr, and to stdout the other files' names or one JSON object.
    pub(super) fn print(&self) {
        let Report { args, engine, saved, memory, .. } = self;
        let made = saved.manifest.len();
        let (loading, each) = (self.loading.as_secs_f64(), self.sampling.as_secs_f64() / made as f64);
        let taken = engine.used_memory();
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        tell(&format!(
            "loaded in {loading:.2} s; {made} image{}, {each:.2} s each; {:.2} GiB of memory planned{}",
            if made == 1 { "" } else { "s" },
            gib(memory.total()),
            taken.map_or(String::new(), |taken| format!(", {:.2} in use by the device's count", gib(taken)))
        ));
        self.tip(each);
        let others = [("manifest", saved.manifest_path()), ("latents", args.save_latents.clone())];
        if args.json {
            let file = |i: usize| match saved.files {
                Pictures::Files(files) => json!(files[i].display().to_string()),
                Pictures::Stdout => json!("-"),
            };
            let picture =
                |i: usize| json!({"file": file(i), "seed": saved.plan[i].seed, "prompt": saved.plan[i].item.prompt});
            let mut report = json!({
                "version": env!("CARGO_PKG_VERSION"), "device": engine.device().name(),
                "precision": told(args.precision),
                "images": (0..made).map(picture).collect::<Vec<_>>(),
                "load_seconds": loading, "seconds_per_image": each,
                "first_image_seconds": saved.first.map(|first| (first - self.started).as_secs_f64()),
                "memory": {"weights": memory.weights, "text": memory.text, "unet": memory.unet, "vae": memory.vae,
                    "sampler": memory.sampler, "total": memory.total(), "taken": taken},
            });
            others.into_iter().for_each(|(name, path)| report[name] = json!(path.map(|p| p.display().to_string())));
            say(&format!("{report:#}"));
        } else if matches!(saved.files, Pictures::Files(_)) {
            others.iter().filter_map(|(_, path)| path.as_ref()).for_each(|path| say(&path.display().to_string()));
        }
    }

    /// Prints a tip on faster settings if an image took a minute or more on the CPU.
    fn tip(&self, seconds: f64) {
        if seconds < 60.0 || !self.engine.device().is_cpu() {
            return;
        }
        let faster = match self.args.precision == Precision::Full {
            true => ", or --precision int8 if the processor has AMX or AVX-512 VNNI",
            false => "",
        };
        tell(&format!(
            "tip: fewer --steps (20 with --sampler \"DPM++ 2M Karras\"), --reuse 3, a smaller picture{faster}, or a \
             GPU is faster"
        ));
    }
}
