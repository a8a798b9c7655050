//! A picture of a prompt, with the demo checkpoint or one of your own: `cargo run --release --example 01-generate
//! [MODEL]`.

use respodiff::{Device, Engine, Image, Request, Source};
use std::ops::ControlFlow;
use std::path::Path;

fn main() -> respodiff::Result<()> {
    let source = match std::env::args().nth(1) {
        Some(model) => Source::open(model)?,
        None => Source::demo(),
    };
    let engine = Engine::open(&source, Device::auto())?;
    println!("{} on {}", engine.name(), engine.device().name());

    // A session has its memory ready for one size and batch.
    let options = engine.options();
    println!("{:.1} MiB of memory", engine.memory(options)?.total() as f64 / (1 << 20) as f64);
    let mut session = engine.session(options)?;

    let image = Image::new("a photo of a nurse").seed(7);
    let output = session.generate(&Request::from(image).steps(20), &mut |_| ControlFlow::Continue(()))?;
    output.pictures[0].save_png(Path::new("nurse.png"), &[])?;
    println!("nurse.png");
    Ok(())
}
