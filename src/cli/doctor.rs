//! `respodiff doctor`: it reports the capabilities of this machine and of this build, and gives advice on those that
//! are missing.

use super::{model, say};
use crate::cuda::{self, compiled::FAMILIES, compiled::RESOURCES};
use crate::{Device, Result, cpu};
use serde_json::{Value, json};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut advice: Vec<String> = Vec::new();
    let families: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
    let mut architectures: Vec<String> = RESOURCES.iter().map(|kernel| format!("sm_{}", kernel.architecture)).collect();
    architectures.sort();
    architectures.dedup();
    let emulator = cfg!(feature = "emulated");
    let driver = cuda::cards();
    let (driver_version, cards) = match &driver {
        Ok((version, cards)) => (Some(version.to_string()), cards.as_slice()),
        Err(_) => (None, &[][..]),
    };
    let chosen = cuda::open(None).map_or_else(
        |problem| {
            // If there are two problems, only the driver's is reported, since it must be fixed first.
            advice.push(driver.as_ref().err().unwrap_or(&problem).to_string());
            Device::cpu()
        },
        Device::kernels,
    );
    let isa = format!("{:?}", cpu::isa());
    if cpu::isa() == cpu::Isa::Baseline && cfg!(target_arch = "x86_64") {
        advice.push("this CPU has no AVX2, so pictures will take several times longer here".into());
    }
    let threads = rayon::current_num_threads();
    let free = crate::memory::free();
    let cache = match model::hub() {
        Ok(config) => Some(config.cache),
        Err(problem) => {
            advice.push(problem.to_string());
            None
        }
    };

    let gib = |bytes: usize| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    if args.json {
        let cards: Vec<Value> = cards
            .iter()
            .map(|card| {
                json!({"name": card.name, "capability": card.limits.capability, "memory": card.memory,
                    "multiprocessors": card.limits.multiprocessors, "shared_memory": card.limits.shared,
                    "usable": card.usable(), "code": card.code()})
            })
            .collect();
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "kernels": families, "architectures": architectures, "emulator": emulator, "driver": driver_version,
            "gpus": cards, "auto": chosen.name(),
            "cpu": {"instructions": isa, "threads": threads, "free_memory": free},
            "cache": cache, "advice": advice,
        });
        say(&format!("{report:#}"));
        return Ok(());
    }
    say(&format!("respodiff    {}", env!("CARGO_PKG_VERSION")));
    let compiled = match families.as_slice() {
        [] => "none".to_string(),
        families => format!("{} for {} and as PTX", families.join(", "), architectures.join(", ")),
    };
    say(&format!("kernels      {compiled}{}", if emulator { "; with the emulator" } else { "" }));
    say(&format!("driver       {}", driver_version.map_or("none".into(), |version| format!("CUDA {version}"))));
    for card in cards {
        let limits = card.limits;
        let (memory, shared) = (gib(card.memory), limits.shared >> 10);
        let form = card.code();
        say(&format!(
            "GPU          {card}, {memory}, {} multiprocessors with {shared} KiB of shared memory; runs {form}",
            limits.multiprocessors
        ));
    }
    say(&format!("CPU          {isa}, {threads} threads, {} of memory free", free.map_or("unknown size".into(), gib)));
    say(&format!("cache        {}", cache.map_or("none".into(), |folder| folder.display().to_string())));
    let arithmetic = if chosen.is_cpu() { "fp32" } else { "fp16" };
    say(&format!("--device auto takes {}, in {arithmetic}", chosen.name()));
    for line in advice {
        say(&format!("note: {line}"));
    }
    Ok(())
}
