//! Launches of `kernels/sampler.cu`: a sampler that runs on the device.
//!
//! ```text
//! once per session    sampler = DeviceSampler::new(device, latents' shape, steps at most)
//!                     recording = prepare(..), the UNet's step, rescale(..) with guidance, guide_and_step(..)
//! once per image      begin(slot, ..); run draw(slot, ..), or write_latents(slot, ..); write_kept(slot, ..), if it has any
//! when rows change    place(slot of each row)
//! every step          write_noise(slot, ..) if its step needs it and the host draws it; replay the recording
//! afterwards          fault(slot); latents_for_vae(slot, ..), the VAE's step, to_rgb8(slot, ..); picture_fault(slot)
//! ```
//!
//! Every image has a slot, in which it begins and ends without regard to the others. All that differs between steps,
//! images and requests is read from device memory, so one recording serves every request of a session.

use super::device::{Buffer, CudaDevice, Launch};
use crate::Result;
use crate::backend::{Guidance, Kept, level_after};
use crate::diffusion::scheduler::{HISTORY, NoiseLevel, Step};
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
        churn: f32,
        input_scale: f32,
        guidance: f32,
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
        kept_signal: f32,
        kept_noise: f32,
        draw: u32,
        save: i32,
        push: i32,
    }
}

impl DeviceStep {
    /// `after` is the noise level that the step leads to, and `draw` the number of draws before it.
    fn new(step: &Step, after: NoiseLevel, draw: u32) -> Self {
        let Step { timestep, churn, input_scale, guidance, convert, base, next, save, push, level: _, span: _ } = *step;
        DeviceStep {
            timestep,
            churn: churn as f32,
            input_scale,
            guidance: guidance as f32,
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
            kept_signal: after.signal as f32,
            kept_noise: after.noise as f32,
            draw,
            save: save.into(),
            push: push.into(),
        }
    }
}

crate::params! {
    pub(super) struct Slot {
        seed: u64,
        guidance: f32,
        rescale: f32,
        first: f32,
        last: f32,
        factor: f32,
        drawn: u32,
        philox: i32,
        steps: i32,
        next: i32,
        current: i32,
        fault: u32,
        picture_faults: u32,
        keeps: i32,
        padding: i32,
    }

    pub(super) struct LatentSize {
        channels: i32,
        pixels: i32,
    }

    pub(super) struct NoiseParams {
        out: u64,
        slot: u64,
        size: LatentSize,
        scale: f32,
        padding: i32,
    }

    pub(super) struct PrepareParams {
        slots: u64,
        places: u64,
        steps: u64,
        noise: u64,
        latents: u64,
        sample: u64,
        timestep: u64,
        size: LatentSize,
        rows: i32,
        copies: i32,
        capacity: i32,
        padding: i32,
    }

    pub(super) struct RescaleParams {
        slots: u64,
        places: u64,
        steps: u64,
        out: u64,
        one: i32,
        rows: i32,
        capacity: i32,
        padding: i32,
    }

    pub(super) struct GuideAndStepParams {
        slots: u64,
        places: u64,
        steps: u64,
        out: u64,
        noise: u64,
        latents: u64,
        saved: u64,
        history: u64,
        kept: u64,
        repaint: u64,
        size: LatentSize,
        rows: i32,
        guided: i32,
        capacity: i32,
        stride: i32,
    }

    pub(super) struct LatentsForVaeParams {
        latents: u64,
        out: u64,
        length: i32,
        scaling_factor: f32,
    }

    pub(super) struct ToRgb8Params {
        slot: u64,
        x: u64,
        out: u64,
        length: i64,
    }
}

/// The numbers of an image that the kernels read.
#[derive(Clone, Copy, Debug)]
pub struct SampledImage {
    /// Seed of its noise.
    pub seed: u64,
    /// Its guidance.
    pub guidance: Guidance,
    /// Draws of the seed that are made before the first step, that of [`DeviceSampler::draw`] included.
    pub drawn: u32,
    /// True if the noise of steps is drawn on the device, as [`crate::diffusion::noise::Rng::TorchCuda`] does; else
    /// [`DeviceSampler::write_noise`] goes before every step that needs it.
    pub philox: bool,
    /// True if parts of it stay as they are, which [`DeviceSampler::write_kept`] writes.
    pub kept: bool,
}

/// The parts of the sampler's memory, in order.
#[derive(Clone, Copy)]
enum Part {
    Slots,
    Places,
    Latents,
    Noise,
    Saved,
    History,
    Kept,
    Repaint,
    Steps,
}

/// The offset of a part.
fn offset(shape: Shape, part: Part) -> usize {
    let array = (shape.len() * size_of::<f32>()).next_multiple_of(ALIGN);
    let places = (shape.n * size_of::<Slot>()).next_multiple_of(ALIGN);
    let latents = places + (shape.n * size_of::<i32>()).next_multiple_of(ALIGN);
    match part {
        Part::Slots => 0,
        Part::Places => places,
        Part::Latents => latents,
        Part::Noise => latents + array,
        Part::Saved => latents + 2 * array,
        Part::History => latents + 3 * array,
        Part::Kept => latents + (3 + HISTORY) * array,
        Part::Repaint => latents + (5 + HISTORY) * array,
        Part::Steps => latents + (5 + HISTORY) * array + shape.rows().next_multiple_of(ALIGN),
    }
}

/// The latents of images with everything that sampling them needs, in one allocation of device memory: the steps'
/// coefficients, the state that a sampler keeps between steps, and the index of the next step, which the kernels
/// advance.
pub struct DeviceSampler {
    buffer: Buffer,
    shape: Shape,
    capacity: usize,
}

impl DeviceSampler {
    /// For latents of `shape` (`[slots, h, w, c]`) and schedules of up to `capacity` steps.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn new(device: &Arc<dyn CudaDevice>, shape: Shape, capacity: usize) -> Result<Self> {
        let sampler = DeviceSampler { buffer: Buffer::new(device, Self::bytes(shape, capacity))?, shape, capacity };
        sampler.place(&[])?;
        Ok(sampler)
    }

    /// Bytes of a sampler's device memory.
    pub fn bytes(shape: Shape, capacity: usize) -> usize {
        offset(shape, Part::Steps) + shape.n * capacity * size_of::<DeviceStep>()
    }

    /// The number of slots.
    pub fn slots(&self) -> usize {
        self.shape.n
    }

    /// Begins an image: the next `prepare` of its row is that of the first of `steps`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    ///
    /// # Panics
    /// If there are more steps than the sampler was made for, or no such slot.
    pub fn begin(&self, slot: usize, steps: &[Step], image: SampledImage) -> Result<()> {
        assert!(steps.len() <= self.capacity, "{} steps of at most {}", steps.len(), self.capacity);
        let mut draw = 0u32;
        let mut table = Vec::with_capacity(steps.len());
        for (i, step) in steps.iter().enumerate() {
            table.push(DeviceStep::new(step, level_after(steps, i), draw));
            draw = draw.wrapping_add(step.needs_noise().into());
        }
        let first = slot * self.capacity * size_of::<DeviceStep>();
        self.buffer.write(offset(self.shape, Part::Steps) + first, bytemuck::cast_slice(&table))?;
        let SampledImage { seed, guidance, drawn, philox, kept } = image;
        let state = Slot {
            seed,
            guidance: guidance.scale,
            rescale: guidance.rescale,
            first: guidance.interval.0,
            last: guidance.interval.1,
            factor: 1.0,
            drawn,
            philox: philox.into(),
            steps: steps.len() as i32,
            next: 0,
            current: 0,
            fault: u32::MAX,
            picture_faults: 0,
            keeps: kept.into(),
            padding: 0,
        };
        self.buffer.write(self.slot_offset(slot), bytemuck::bytes_of(&state))
    }

    /// Assigns slots to the rows of the UNet's batch; rows beyond `slots` have none.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    ///
    /// # Panics
    /// If there are more rows than slots.
    pub fn place(&self, slots: &[usize]) -> Result<()> {
        let mut places = vec![-1i32; self.shape.n];
        places[..slots.len()].iter_mut().zip(slots).for_each(|(place, &slot)| *place = slot as i32);
        self.buffer.write(offset(self.shape, Part::Places), bytemuck::cast_slice(&places))
    }

    /// Writes an image's latents, NHWC.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    pub fn write_latents(&self, slot: usize, latents: &[f32]) -> Result<()> {
        self.write(Part::Latents, slot, latents)
    }

    /// Writes the noise of an image's next step, NHWC.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    pub fn write_noise(&self, slot: usize, noise: &[f32]) -> Result<()> {
        self.write(Part::Noise, slot, noise)
    }

    /// Writes the parts of an image that stay as they are.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    pub fn write_kept(&self, slot: usize, kept: &Kept) -> Result<()> {
        let Kept { latents, noise, repaint } = kept;
        assert!(latents.len() == self.one() && noise.len() == self.one() && repaint.len() == self.shape.tokens());
        // The latents of all slots, and then the noise of all.
        self.write(Part::Kept, slot, latents)?;
        let noise_of_all = self.shape.len() * size_of::<f32>();
        self.buffer.write(self.image_offset(Part::Kept, slot) + noise_of_all, bytemuck::cast_slice(noise))?;
        let repaint: Vec<u8> = repaint.iter().map(|&repaint| repaint.into()).collect();
        self.buffer.write(offset(self.shape, Part::Repaint) + slot * repaint.len(), &repaint)
    }

    fn write(&self, part: Part, slot: usize, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.one());
        self.buffer.write(self.image_offset(part, slot), bytemuck::cast_slice(values))
    }

    /// Reads an image's latents, NHWC.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`]: the driver's word, also about work given before.
    pub fn read_latents(&self, slot: usize) -> Result<Vec<f32>> {
        let mut latents = vec![0f32; self.one()];
        self.buffer.read(self.image_offset(Part::Latents, slot), bytemuck::cast_slice_mut(&mut latents))?;
        Ok(latents)
    }

    /// An image's first step, counted from 0, that gave latents that are not finite.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`]: the driver's word, also about work given before.
    pub fn fault(&self, slot: usize) -> Result<Option<usize>> {
        let fault = self.slot(slot)?.fault;
        Ok((fault != u32::MAX).then_some(fault as usize))
    }

    /// Forgets the faults of earlier pictures of an image, such as previews.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    pub fn begin_picture(&self, slot: usize) -> Result<()> {
        let offset = self.slot_offset(slot) + std::mem::offset_of!(Slot, picture_faults);
        self.buffer.write(offset, bytemuck::bytes_of(&0u32))
    }

    /// True if [`DeviceSampler::to_rgb8`] has met a number that is not finite since the image's picture began.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`]: the driver's word, also about work given before.
    pub fn picture_fault(&self, slot: usize) -> Result<bool> {
        Ok(self.slot(slot)?.picture_faults > 0)
    }

    fn slot(&self, slot: usize) -> Result<Slot> {
        let mut state = Slot::zeroed();
        self.buffer.read(self.slot_offset(slot), bytemuck::bytes_of_mut(&mut state))?;
        Ok(state)
    }

    /// Draws an image's first latents as [`crate::diffusion::noise::Rng::TorchCuda`] does, times `sigma`
    /// ([`crate::diffusion::scheduler::Schedule::init_noise_sigma`]).
    pub fn draw(&self, slot: usize, sigma: f32) -> Launch {
        let out = self.buffer.address() + self.image_offset(Part::Latents, slot) as u64;
        let slot = self.buffer.address() + self.slot_offset(slot) as u64;
        let params = NoiseParams { out, slot, size: self.size(), scale: sigma, padding: 0 };
        launch("noise", self.one(), &params)
    }

    /// Adds the noise that goes before the next step of `rows` images, and writes the UNet's inputs for it: `sample`,
    /// fp16 `[n, h, w, c]`, and `timestep`, f32 `[n]`, where `n` is `rows`, or twice as many when `guided`.
    pub fn prepare(&self, rows: usize, sample: u64, timestep: u64, guided: bool) -> Launch {
        let params = PrepareParams {
            slots: self.address(Part::Slots),
            places: self.address(Part::Places),
            steps: self.address(Part::Steps),
            noise: self.address(Part::Noise),
            latents: self.address(Part::Latents),
            sample,
            timestep,
            size: self.size(),
            rows: rows as i32,
            copies: if guided { 2 } else { 1 },
            capacity: self.capacity as i32,
            padding: 0,
        };
        launch("prepare", rows * self.one(), &params)
    }

    /// Computes what [`Guidance::rescale`] multiplies the predictions by, from the output of a UNet with guidance, f32:
    /// as many images as in `prepare`, the unconditional ones first.
    pub fn rescale(&self, rows: usize, out: u64) -> Launch {
        let params = RescaleParams {
            slots: self.address(Part::Slots),
            places: self.address(Part::Places),
            steps: self.address(Part::Steps),
            out,
            one: self.one() as i32,
            rows: rows as i32,
            capacity: self.capacity as i32,
            padding: 0,
        };
        // Two sums for each of two predictions.
        Launch::new("rescale", [rows, 1, 1], THREADS, 4 * THREADS * size_of::<f64>(), &params)
    }

    /// Takes the step whose inputs `prepare` wrote, from the UNet's output, f32: as many images as in `prepare`, the
    /// unconditional ones first.
    pub fn guide_and_step(&self, rows: usize, out: u64, guided: bool) -> Launch {
        let params = GuideAndStepParams {
            slots: self.address(Part::Slots),
            places: self.address(Part::Places),
            steps: self.address(Part::Steps),
            out,
            noise: self.address(Part::Noise),
            latents: self.address(Part::Latents),
            saved: self.address(Part::Saved),
            history: self.address(Part::History),
            kept: self.address(Part::Kept),
            repaint: self.address(Part::Repaint),
            size: self.size(),
            rows: rows as i32,
            guided: guided.into(),
            capacity: self.capacity as i32,
            stride: self.shape.len() as i32,
        };
        launch("guide_and_step", rows * self.one(), &params)
    }

    /// Writes the VAE's input, fp16 `[1, h, w, c]`: one image's latents divided by `scaling_factor`.
    pub fn latents_for_vae(&self, slot: usize, scaling_factor: f32, out: u64) -> Launch {
        let latents = self.buffer.address() + self.image_offset(Part::Latents, slot) as u64;
        let params = LatentsForVaeParams { latents, out, length: self.one() as i32, scaling_factor };
        launch("latents_for_vae", self.one(), &params)
    }

    /// Converts `length` numbers of the VAE's output, f32 `[h, w, 3]`, to bytes in the same way as
    /// [`crate::Picture::from_hwc`], for the image in a slot. `x` and `out` must be multiples of 16.
    pub fn to_rgb8(&self, slot: usize, x: u64, length: usize, out: u64) -> Launch {
        let slot = self.buffer.address() + self.slot_offset(slot) as u64;
        let params = ToRgb8Params { slot, x, out, length: length as i64 };
        launch("to_rgb8", length.div_ceil(4), &params)
    }

    fn address(&self, part: Part) -> u64 {
        self.buffer.address() + offset(self.shape, part) as u64
    }

    fn slot_offset(&self, slot: usize) -> usize {
        assert!(slot < self.shape.n, "slot {slot} of {}", self.shape.n);
        offset(self.shape, Part::Slots) + slot * size_of::<Slot>()
    }

    /// The offset of an image's numbers in an array of all slots.
    fn image_offset(&self, part: Part, slot: usize) -> usize {
        assert!(slot < self.shape.n, "slot {slot} of {}", self.shape.n);
        offset(self.shape, part) + slot * self.one() * size_of::<f32>()
    }

    /// Numbers of one image.
    fn one(&self) -> usize {
        self.shape.len() / self.shape.n
    }

    fn size(&self) -> LatentSize {
        let Shape { c, .. } = self.shape;
        LatentSize { channels: c as i32, pixels: self.shape.tokens() as i32 }
    }
}

fn launch(kernel: &'static str, threads: usize, params: &impl NoUninit) -> Launch {
    Launch::new(kernel, [threads.div_ceil(THREADS), 1, 1], THREADS, 0, params)
}
