//! Launches of `kernels/sampler.cu`: a sampler that runs on the device.
//!
//! ```text
//! once per session    sampler = DeviceSampler::new(device, latents' shape, capacity)
//!                     recording = prepare(..), the UNet's step, guide_and_step(..)
//! once per request    begin(steps, images, drawn); run draw(..), or write_latents(..)
//! every step          write_noise(..) if the step needs it and the host draws it; replay the recording
//! afterwards          fault(); for each image: latents_for_vae(..), the VAE's step, to_rgb8(..); picture_fault()
//! ```
//!
//! All that differs between steps and requests is read from device memory, so one recording serves every request of a
//! session.

use super::device::{Buffer, CudaDevice, Launch};
use crate::Result;
use crate::diffusion::scheduler::{HISTORY, Step};
use crate::graph::Shape;
use bytemuck::{NoUninit, Zeroable};
use std::sync::Arc;

const THREADS: usize = 256;
/// Alignment in bytes of the parts of the memory.
const ALIGN: usize = 256;

crate::params! {
    /// [`Step`] in f32, as the kernels read it.
    pub(super) struct DeviceStep {
        timestep: f32,
        input_scale: f32,
        convert_x: f32,
        convert_out: f32,
        clip: f32,
        base_x: f32,
        base_saved: f32,
        base_m: f32,
        base_history: [f32; HISTORY],
        next_base: f32,
        next_out: f32,
        next_m: f32,
        next_history: [f32; HISTORY],
        next_noise: f32,
        draw: u32,
        save: i32,
        push: i32,
        faults: u32,
    }
}

impl DeviceStep {
    fn new(step: &Step, draw: u32) -> Self {
        let Step { timestep, input_scale, convert, base, next, save, push } = *step;
        DeviceStep {
            timestep,
            input_scale,
            convert_x: convert.x as f32,
            convert_out: convert.out as f32,
            clip: convert.clip as f32,
            base_x: base.x as f32,
            base_saved: base.saved as f32,
            base_m: base.m as f32,
            base_history: base.history.map(|c| c as f32),
            next_base: next.base as f32,
            next_out: next.out as f32,
            next_m: next.m as f32,
            next_history: next.history.map(|c| c as f32),
            next_noise: next.noise as f32,
            draw,
            save: save.into(),
            push: push.into(),
            faults: 0,
        }
    }
}

crate::params! {
    pub(super) struct Run {
        philox: i32,
        steps: i32,
        next: i32,
        current: i32,
        picture_faults: u32,
    }

    /// The numbers of a request that one image has for itself.
    pub struct SampledImage {
        /// Seed of its noise.
        pub seed: u64,
        /// The prediction is `u + guidance * (c - u)` of the unconditional one u and the conditional one c; c itself at
        /// 1.
        pub guidance: f32,
        /// Draws of the seed that were made before the first step: 1 for latents by [`DeviceSampler::draw`], else 0.
        pub drawn: u32,
    }

    pub(super) struct LatentSize {
        length: i32,
        channels: i32,
        pixels: i32,
    }

    pub(super) struct NoiseParams {
        out: u64,
        images: u64,
        size: LatentSize,
        scale: f32,
    }

    pub(super) struct PrepareParams {
        run: u64,
        steps: u64,
        latents: u64,
        sample: u64,
        timestep: u64,
        length: i32,
        copies: i32,
        rows: i32,
        padding: i32,
    }

    pub(super) struct GuideAndStepParams {
        run: u64,
        images: u64,
        steps: u64,
        out: u64,
        noise: u64,
        latents: u64,
        saved: u64,
        history: u64,
        size: LatentSize,
        guided: i32,
    }

    pub(super) struct LatentsForVaeParams {
        latents: u64,
        out: u64,
        length: i32,
        scaling_factor: f32,
    }

    pub(super) struct ToRgb8Params {
        run: u64,
        x: u64,
        out: u64,
        length: i64,
    }
}

/// The parts of the sampler's memory, in order.
#[derive(Clone, Copy)]
enum Part {
    Run,
    Images,
    Latents,
    Noise,
    Saved,
    History,
    Steps,
}

/// The offset of a part.
fn offset(shape: Shape, part: Part) -> usize {
    let array = (shape.len() * size_of::<f32>()).next_multiple_of(ALIGN);
    let latents = ALIGN + (shape.n * size_of::<SampledImage>()).next_multiple_of(ALIGN);
    match part {
        Part::Run => 0,
        Part::Images => ALIGN,
        Part::Latents => latents,
        Part::Noise => latents + array,
        Part::Saved => latents + 2 * array,
        Part::History => latents + 3 * array,
        Part::Steps => latents + (3 + HISTORY) * array,
    }
}

/// The latents of a batch with everything that sampling them needs, in one allocation of device memory: the steps'
/// coefficients, the state that the sampler keeps between steps, and the step counter that the kernels advance.
pub struct DeviceSampler {
    buffer: Buffer,
    shape: Shape,
    capacity: usize,
}

impl DeviceSampler {
    /// For latents of `shape` (`[batch, h, w, c]`) and schedules of up to `capacity` steps.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn new(device: &Arc<dyn CudaDevice>, shape: Shape, capacity: usize) -> Result<Self> {
        Ok(DeviceSampler { buffer: Buffer::new(device, Self::bytes(shape, capacity))?, shape, capacity })
    }

    /// Bytes of a sampler's device memory.
    pub fn bytes(shape: Shape, capacity: usize) -> usize {
        offset(shape, Part::Steps) + capacity * size_of::<DeviceStep>()
    }

    /// Begins a request: the next `prepare` is that of the first of `steps`. With `drawn` the noise of steps is drawn
    /// on the device, as [`crate::diffusion::noise::Rng::TorchCuda`] does; else [`DeviceSampler::write_noise`] goes
    /// before every step that needs it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    ///
    /// # Panics
    /// If there are more steps than the sampler was made for, or not as many images as its batch has.
    pub fn begin(&self, steps: &[Step], images: &[SampledImage], drawn: bool) -> Result<()> {
        assert!(steps.len() <= self.capacity, "{} steps of at most {}", steps.len(), self.capacity);
        assert_eq!(images.len(), self.shape.n);
        let mut draw = 0u32;
        let mut table = Vec::with_capacity(steps.len());
        for step in steps {
            table.push(DeviceStep::new(step, draw));
            draw = draw.wrapping_add(step.needs_noise().into());
        }
        self.buffer.write(offset(self.shape, Part::Steps), bytemuck::cast_slice(&table))?;
        self.buffer.write(offset(self.shape, Part::Images), bytemuck::cast_slice(images))?;
        let run = Run { philox: drawn.into(), steps: steps.len() as i32, next: 0, current: 0, picture_faults: 0 };
        self.buffer.write(offset(self.shape, Part::Run), bytemuck::bytes_of(&run))
    }

    /// Writes the latents, NHWC.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    pub fn write_latents(&self, latents: &[f32]) -> Result<()> {
        self.write(Part::Latents, latents)
    }

    /// Writes the noise of the next step, NHWC.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    pub fn write_noise(&self, noise: &[f32]) -> Result<()> {
        self.write(Part::Noise, noise)
    }

    fn write(&self, part: Part, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.shape.len());
        self.buffer.write(offset(self.shape, part), bytemuck::cast_slice(values))
    }

    /// Reads the latents, NHWC.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`]: the driver's word, also about work given before.
    pub fn read_latents(&self) -> Result<Vec<f32>> {
        let mut latents = vec![0f32; self.shape.len()];
        self.buffer.read(offset(self.shape, Part::Latents), bytemuck::cast_slice_mut(&mut latents))?;
        Ok(latents)
    }

    /// The first step, counted from 0, that gave latents that are not finite.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`]: the driver's word, also about work given before.
    pub fn fault(&self) -> Result<Option<usize>> {
        let mut steps = vec![DeviceStep::zeroed(); self.run()?.steps as usize];
        self.buffer.read(offset(self.shape, Part::Steps), bytemuck::cast_slice_mut(&mut steps))?;
        Ok(steps.iter().position(|step| step.faults > 0))
    }

    /// True if [`DeviceSampler::to_rgb8`] has met a number that is not finite since the request began.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`]: the driver's word, also about work given before.
    pub fn picture_fault(&self) -> Result<bool> {
        Ok(self.run()?.picture_faults > 0)
    }

    fn run(&self) -> Result<Run> {
        let mut run = Run::zeroed();
        self.buffer.read(offset(self.shape, Part::Run), bytemuck::bytes_of_mut(&mut run))?;
        Ok(run)
    }

    /// Draws the first latents as [`crate::diffusion::noise::Rng::TorchCuda`] does, times `sigma`
    /// ([`crate::diffusion::scheduler::Schedule::init_noise_sigma`]).
    pub fn draw(&self, sigma: f32) -> Launch {
        let (out, images) = (self.address(Part::Latents), self.address(Part::Images));
        let params = NoiseParams { out, images, size: self.size(), scale: sigma };
        launch("noise", self.shape.len(), &params)
    }

    /// Writes the UNet's inputs for the next step: `sample`, fp16 `[images, h, w, c]`, and `timestep`, f32 `[images]`,
    /// where `images` is the batch, or twice the batch when `guided`.
    pub fn prepare(&self, sample: u64, timestep: u64, guided: bool) -> Launch {
        let copies = if guided { 2 } else { 1 };
        let params = PrepareParams {
            run: self.address(Part::Run),
            steps: self.address(Part::Steps),
            latents: self.address(Part::Latents),
            sample,
            timestep,
            length: self.shape.len() as i32,
            copies,
            rows: copies * self.shape.n as i32,
            padding: 0,
        };
        launch("prepare", self.shape.len().max(params.rows as usize), &params)
    }

    /// Takes the step whose inputs `prepare` wrote, from the UNet's output, f32: as many images as in `prepare`, the
    /// unconditional ones first.
    pub fn guide_and_step(&self, out: u64, guided: bool) -> Launch {
        let params = GuideAndStepParams {
            run: self.address(Part::Run),
            images: self.address(Part::Images),
            steps: self.address(Part::Steps),
            out,
            noise: self.address(Part::Noise),
            latents: self.address(Part::Latents),
            saved: self.address(Part::Saved),
            history: self.address(Part::History),
            size: self.size(),
            guided: guided.into(),
        };
        launch("guide_and_step", self.shape.len(), &params)
    }

    /// Writes the VAE's input, fp16 `[1, h, w, c]`: one image's latents divided by `scaling_factor`.
    pub fn latents_for_vae(&self, image: usize, scaling_factor: f32, out: u64) -> Launch {
        let length = self.shape.len() / self.shape.n;
        let latents = self.address(Part::Latents) + (image * length * size_of::<f32>()) as u64;
        let params = LatentsForVaeParams { latents, out, length: length as i32, scaling_factor };
        launch("latents_for_vae", length, &params)
    }

    /// Converts `length` numbers of the VAE's output, f32 `[h, w, 3]`, to bytes in the same way as
    /// [`crate::Picture::from_hwc`]. `x` and `out` must be multiples of 16.
    pub fn to_rgb8(&self, x: u64, length: usize, out: u64) -> Launch {
        let params = ToRgb8Params { run: self.address(Part::Run), x, out, length: length as i64 };
        launch("to_rgb8", length.div_ceil(4), &params)
    }

    fn address(&self, part: Part) -> u64 {
        self.buffer.address() + offset(self.shape, part) as u64
    }

    fn size(&self) -> LatentSize {
        let Shape { c, .. } = self.shape;
        LatentSize { length: self.shape.len() as i32, channels: c as i32, pixels: self.shape.tokens() as i32 }
    }
}

fn launch(kernel: &'static str, threads: usize, params: &impl NoUninit) -> Launch {
    Launch::new(kernel, [threads.div_ceil(THREADS), 1, 1], THREADS, 0, params)
}
