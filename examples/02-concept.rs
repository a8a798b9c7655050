//! Two concepts in one batch, a woman for one image and a man for the other: `cargo run --release --example
//! 02-concept`.

use respodiff::{Concept, Device, Engine, Image, Request, Source};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

fn main() -> respodiff::Result<()> {
    let engine = Engine::open(&Source::demo(), Device::auto())?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/concepts");
    let woman = Arc::new(Concept::load(folder.join("woman.safetensors"))?);
    let man = Arc::new(Concept::load(folder.join("man.safetensors"))?);

    let mut session = engine.session(engine.options().batch(2).concepts(true))?;
    // The prompt is encoded once for both.
    let prompt = engine.encode("a photo of a doctor")?;
    let image = |seed| Image::new(&prompt).seed(seed);
    let request = Request::new(vec![image(1).concept(woman, 1.0), image(2).concept(man, 1.0)]).steps(20);
    let output = session.generate(&request, &mut |_| ControlFlow::Continue(()))?;
    for (picture, name) in output.pictures.iter().zip(["woman.png", "man.png"]) {
        picture.save_png(Path::new(name), &[])?;
        println!("{name}");
    }
    Ok(())
}
