//! A batch of different prompts, seeds and guidance scales; each picture is the one that it would be alone:
//! `cargo run --release --example 04-many-prompts`.

use respodiff::{Device, Engine, Image, Request, Source};
use std::ops::ControlFlow;

fn main() -> respodiff::Result<()> {
    let engine = Engine::open(&Source::demo(), Device::auto())?;
    let images = vec![
        Image::new("a photo of a chef").seed(1),
        Image::new("a photo of a farmer").seed(2).guidance(3.0),
        Image::new("a photo of a sheriff").seed(3).negative("a hat"),
    ];
    let mut all = engine.session(engine.options().batch(images.len()))?;
    let together = all.generate(&Request::new(images.clone()).steps(10), &mut |_| ControlFlow::Continue(()))?;

    let mut one = engine.session(engine.options())?;
    for (image, picture) in images.into_iter().zip(&together.pictures) {
        let alone = one.generate(&Request::from(image).steps(10), &mut |_| ControlFlow::Continue(()))?;
        assert!(alone.pictures[0] == *picture);
    }
    println!("three pictures, each as if it were made alone");
    Ok(())
}
