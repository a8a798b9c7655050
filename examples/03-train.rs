//! A concept is trained and saved: `cargo run --release --example 03-train [ITERATIONS]`.

use respodiff::{Device, Engine, Recipe, Source, Task, Trainer};
use std::path::Path;

fn main() -> respodiff::Result<()> {
    let engine = Engine::open(&Source::demo(), Device::auto())?;
    let task = Task::toward("a woman", "a person");
    let mut recipe = Recipe::for_task(&task);
    recipe.iterations = std::env::args().nth(1).and_then(|count| count.parse().ok()).unwrap_or(1000);
    let iterations = recipe.iterations;

    let mut trainer = Trainer::new(&engine, task, recipe, 0, engine.default_size())?;
    for iteration in 1..=iterations {
        let losses = trainer.iterate()?;
        if iteration % 100 == 0 || iteration == iterations {
            println!("{iteration}: L_resp {:.2e}, L_sem {:.2e}", losses.resp, losses.sem);
        }
    }
    trainer.concept().save(Path::new("a-woman.safetensors"))?;
    println!("a-woman.safetensors");
    Ok(())
}
