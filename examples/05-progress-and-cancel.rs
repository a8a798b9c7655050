//! Progress is reported, and a run is cancelled from another thread: `cargo run --release --example
//! 05-progress-and-cancel`.

use respodiff::{Device, Engine, ErrorKind, Image, Progress, Request, Source};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn main() -> respodiff::Result<()> {
    let engine = Engine::open(&Source::demo(), Device::auto())?;
    let mut session = engine.session(engine.options())?;
    let request = Request::from(Image::new("a photo of a teacher")).steps(900);
    let cancelled = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            cancelled.store(true, Ordering::Relaxed);
        });
        session.generate(&request, &mut |progress| {
            if let Progress::Step { done, total } = progress
                && done % 10 == 0
            {
                println!("{done} of {total}");
            }
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    });
    match outcome {
        Err(error) if error.kind() == ErrorKind::Cancelled => println!("{error}"),
        other => println!("{:?}", other?),
    }
    // The session is ready for the next request.
    session
        .generate(&Request::from(Image::new("a photo of a teacher")).steps(2), &mut |_| ControlFlow::Continue(()))?;
    Ok(())
}
