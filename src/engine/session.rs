//! Sessions: plans for one size and batch, run from prompts to pictures.

use super::init_image::Original;
use super::rows::{AHEAD, Rows, Settings};
use super::text::Conditioning;
use super::{
    EncodedPicture, Engine, Image, Output, Plans, Progress, Prompt, PromptText, Request, SessionOptions, Size, Start,
};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

/// An engine's plans for one size and batch: warm, and free of allocations while it steps. It is [`Send`]: a server may
/// move it between threads, and several sessions of one engine may run at once.
pub struct Session(Rows);

impl Session {
    pub(super) fn new(engine: Engine, options: SessionOptions, plans: Plans) -> Result<Self> {
        Ok(Session(Rows::new(engine, options, plans)?))
    }

    /// The options that it was made with.
    pub fn options(&self) -> SessionOptions {
        self.0.options()
    }

    /// Goes over to another engine of the same checkpoint, which [`Engine::with_adapters`] made. Nothing is planned or
    /// allocated anew.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for an engine of another checkpoint or device.
    pub fn switch(&mut self, engine: &Engine) -> Result<()> {
        self.0.switch(engine)
    }

    /// Makes the pictures of a request with as many images as [`SessionOptions::batch`]. `progress` is called with
    /// every step and every decoded picture, and may end the run. If it does so while pictures are decoded, the output
    /// holds those that are done.
    ///
    /// A picture is the same to the last bit whatever else is in its batch.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a request that cannot be served, [`crate::ErrorKind::Mismatch`] for a concept
    /// or an encoded prompt of another model, [`crate::ErrorKind::Cancelled`] when `progress` breaks,
    /// [`crate::ErrorKind::NonFinite`] when the network leaves the range of numbers, and
    /// [`crate::ErrorKind::DeviceLost`].
    pub fn generate(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Output> {
        let rows = &mut self.0;
        let SessionOptions { batch, size, .. } = rows.options();
        let settings = Settings::new(rows.engine(), rows.options(), request)?;
        if request.images.len() != batch {
            let problem = format!("{} images in a session for {batch}", request.images.len());
            return Err(Error::invalid("images", problem).advise("give as many as the session's batch"));
        }
        request.images.iter().try_for_each(|image| rows.check(image, &settings))?;
        let images = encoded(rows.engine(), &request.images)?;
        let images = with_encoded_pictures(rows.engine(), images, size)?;
        for (slot, image) in images.iter().enumerate() {
            rows.join(slot, image, &settings)?;
        }
        let total = (0..batch).map(|slot| rows.progress(slot).1).max().unwrap_or(0);
        rows.check_reuse()?;
        for done in 0..total {
            if progress(Progress::Step { done, total }).is_break() {
                return Err(Error::cancelled(format!("stopped after {done} of {total} steps, with no picture made")));
            }
            rows.step()?;
            if (done + 1).is_multiple_of(AHEAD) || done + 1 == total {
                (0..batch).try_for_each(|slot| rows.check_latents(slot))?;
            }
        }
        // After the last step nothing is left to cancel.
        let _ = progress(Progress::Step { done: total, total });
        let mut output = Output { pictures: Vec::new(), latents: Vec::new() };
        for slot in 0..batch {
            output.latents.extend(rows.latents(slot)?);
        }
        for slot in 0..batch {
            output.pictures.push(rows.picture(slot)?);
            let done = output.pictures.len();
            if progress(Progress::Decoded { done, total: batch }).is_break() && done < batch {
                break;
            }
        }
        Ok(output)
    }
}

/// The images with their prompts encoded, each text once.
///
/// # Errors
/// Those of [`Engine::encode`].
pub(crate) fn encoded(engine: &Engine, images: &[Image]) -> Result<Vec<Image>> {
    let mut texts: HashMap<&PromptText, Conditioning> = HashMap::new();
    for prompt in images.iter().flat_map(|image| [Some(&image.prompt), image.negative.as_ref()]).flatten() {
        if let Prompt::Text(words) = prompt
            && !texts.contains_key(words)
        {
            texts.insert(words, engine.encode(words.clone())?);
        }
    }
    let of = |prompt: &Prompt| match prompt {
        Prompt::Text(words) => Prompt::Encoded(texts[words].clone()),
        encoded => encoded.clone(),
    };
    let image =
        |image: &Image| Image { prompt: of(&image.prompt), negative: image.negative.as_ref().map(of), ..image.clone() };
    Ok(images.iter().map(image).collect())
}

/// The images with the pictures that they begin with encoded, each once.
fn with_encoded_pictures(engine: &Engine, mut images: Vec<Image>, size: Size) -> Result<Vec<Image>> {
    let mut known: HashMap<_, EncodedPicture> = HashMap::new();
    for image in &mut images {
        let Start::Image(init) = &mut image.start else { continue };
        let Original::Picture { picture, mask } = &init.original else { continue };
        let key = (Arc::as_ptr(picture), mask.as_ref().map(Arc::as_ptr));
        let encoded = match known.get(&key) {
            Some(encoded) => encoded.clone(),
            None => engine.encode_picture(picture, mask.as_deref(), size)?,
        };
        known.insert(key, encoded.clone());
        init.original = Original::Encoded(encoded);
    }
    Ok(images)
}

// Sessions are made for servers, which move them between threads and share engines.
const _: () = {
    const fn is_send<T: Send>() {}
    const fn is_shared<T: Send + Sync>() {}
    is_send::<Session>();
    is_shared::<Engine>();
    is_shared::<Conditioning>();
};
