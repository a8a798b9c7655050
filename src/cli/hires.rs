//! A second pass at a larger size, and the passes of a run.

use super::init_image::Canvas;
use crate::engine::{Engine, InitImage, Output, Progress, Request, Session, SessionOptions, Size, Start};
use crate::image::{Filter, Picture, UsedHires};
use crate::{Error, Result};
use std::ops::ControlFlow;
use std::sync::Arc;

/// The choice of a second pass.
#[derive(clap::Args)]
#[group(id = "second_pass")]
pub(super) struct Flags {
    /// Make the picture larger by this factor in a second pass: it is resized by a Lanczos filter, put under noise, and
    /// denoised at the larger size (A1111's hires fix)
    #[arg(long, value_name = "FACTOR", conflicts_with = "mask", allow_negative_numbers = true)]
    hires: Option<f64>,
    /// How much of the picture the second pass makes anew, as --strength
    #[arg(long, value_name = "SHARE", requires = "hires", default_value_t = 0.5, allow_negative_numbers = true)]
    hires_strength: f64,
    /// Steps of which the second pass takes that share [default: as --steps]
    #[arg(long, value_name = "STEPS", requires = "hires")]
    hires_steps: Option<usize>,
}

/// A second pass, which begins with the pictures of the first.
pub(super) struct Pass {
    /// The size of its pictures.
    pub(super) size: Size,
    /// Its steps, of which a share is taken.
    pub(super) steps: usize,
    strength: f64,
    factor: f64,
}

impl Flags {
    /// The second pass after one at `size` in `steps` steps, if there is one.
    pub(super) fn pass(&self, size: Size, steps: usize) -> Result<Option<Pass>> {
        let Some(factor) = self.hires else { return Ok(None) };
        if !(1.0..=16.0).contains(&factor) {
            return Err(Error::invalid("hires", format!("{factor} is no factor from 1 to 16")).advise("2 is usual"));
        }
        Ok(Some(Pass::new(size, factor, self.hires_strength, self.hires_steps.unwrap_or(steps))))
    }
}

impl Pass {
    fn new(size: Size, factor: f64, strength: f64, steps: usize) -> Self {
        let side = |pixels: usize| (pixels as f64 * factor / 8.0).round() as usize * 8;
        Pass { size: Size::new(side(size.width), side(size.height)), steps, strength, factor }
    }

    /// The pass that a picture's record stands for.
    pub(super) fn of_record(used: &UsedHires, size: Size) -> Self {
        Pass::new(size, used.factor, used.strength, used.steps)
    }

    /// The record in a picture's file.
    pub(super) fn record(&self) -> UsedHires {
        UsedHires { factor: self.factor, strength: self.strength, steps: self.steps }
    }

    /// The first step that is taken, counted from 0.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a strength that is not from 0 to 1, or leaves no step.
    pub(super) fn first_step(&self) -> Result<usize> {
        let init = InitImage::new(Arc::new(Picture { width: 0, height: 0, rgb: Vec::new() }), self.strength);
        init.first_step(self.steps).map_err(|error| error.of_field("hires_strength"))
    }

    /// The request of the second pass: that of the first with its pictures for beginnings.
    pub(super) fn request(&self, first: &Request, pictures: &[Picture]) -> Request {
        let (width, height) = (self.size.width as u32, self.size.height as u32);
        let begin = |picture: &Picture| {
            let larger = picture.resized(width, height, Filter::Lanczos);
            Start::Image(InitImage::new(Arc::new(larger), self.strength))
        };
        let images = first.images.iter().zip(pictures).map(|(image, picture)| image.clone().start(begin(picture)));
        Request { images: images.collect(), ..first.clone() }.steps(self.steps)
    }
}

/// The passes over one batch after another, and what they begin with.
pub(super) struct Passes<'a> {
    engine: &'a Engine,
    canvas: Option<&'a Canvas>,
    second: Option<&'a Pass>,
    /// The sessions of the passes, made for the latest batch's shape.
    sessions: Option<(Session, Option<Session>)>,
}

impl<'a> Passes<'a> {
    /// Sessions are made when a batch needs them.
    pub(super) fn new(engine: &'a Engine, canvas: Option<&'a Canvas>, second: Option<&'a Pass>) -> Self {
        Passes { engine, canvas, second, sessions: None }
    }

    /// Makes the session of the first pass.
    ///
    /// # Errors
    /// Those of [`Engine::session`].
    pub(super) fn prepare(&mut self, options: SessionOptions) -> Result<()> {
        if self.sessions.as_ref().is_none_or(|(session, _)| session.options() != options) {
            // The sessions of another shape are dropped first, to free their memory.
            self.sessions = None;
            self.sessions = Some((self.engine.session(options)?, None));
        }
        Ok(())
    }

    /// Makes the pictures of a request; fewer, or none, if `follow` broke off. `follow` is told of each step, and the
    /// pass that it belongs to, counted from 0.
    ///
    /// # Errors
    /// Those of [`Engine::session`] and [`Session::generate`].
    pub(super) fn make(
        &mut self,
        options: SessionOptions,
        request: &Request,
        follow: &mut dyn FnMut(Progress, usize) -> ControlFlow<()>,
    ) -> Result<Output> {
        self.prepare(options)?;
        let (session, larger) = self.sessions.as_mut().ok_or_else(|| Error::internal("no session"))?;
        let mut output = session.generate(request, &mut |progress| follow(progress, 0))?;
        if let Some(pass) = self.second {
            if output.pictures.len() < options.batch {
                return Ok(Output { pictures: Vec::new(), latents: Vec::new() });
            }
            let request = pass.request(request, &output.pictures);
            let larger = match larger {
                Some(session) => session,
                none => none.insert(self.engine.session(options.size(pass.size))?),
            };
            output = larger.generate(&request, &mut |progress| follow(progress, 1))?;
        }
        if let Some(canvas) = self.canvas {
            output.pictures = output.pictures.into_iter().map(|picture| canvas.finish(picture)).collect();
        }
        Ok(output)
    }
}
