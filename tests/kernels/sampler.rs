//! `kernels/sampler.cu`, against the CPU's sampler, noise and pictures.

use super::*;
use respodiff::Picture;
use respodiff::backend::{Guidance, Kept};
use respodiff::cuda::{Buffer, DeviceSampler, Launch, SampledImage};
use respodiff::diffusion::noise::{NormalGenerator, Rng};
use respodiff::diffusion::scheduler::{Sampler, SamplerChoice, SamplerState, Schedule, SchedulerConfig, Step, Tuning};

/// An odd size, with more threads than a block has.
const LATENTS: Shape = Shape { n: 3, h: 9, w: 5, c: 4 };
const SEED: u64 = u64::MAX - 1;
/// Guidance of the images: one without any, and one that is rescaled and ends at the timestep 300.
const GUIDANCE: [Guidance; LATENTS.n] =
    [Guidance { scale: 7.5, rescale: 0.7, interval: (1000.0, 300.0) }, Guidance::new(1.0), Guidance::new(0.25)];

/// The slot of each row: not in order, so that a mistake of one for the other shows.
const PLACES: [usize; LATENTS.n] = [2, 0, 1];

/// An image of a row, for which `drawn` draws were made before the first step.
fn image(row: usize, drawn: u32, philox: bool) -> SampledImage {
    SampledImage { seed: SEED.wrapping_add(row as u64), guidance: GUIDANCE[row], drawn, philox, kept: false }
}

/// Begins an image in every row.
fn begin(sampler: &DeviceSampler, steps: &[Step], drawn: u32, philox: bool) {
    for (row, slot) in PLACES.into_iter().enumerate() {
        sampler.begin(slot, steps, image(row, drawn, philox)).unwrap();
    }
    sampler.place(&PLACES).unwrap();
}

/// The latents of all rows.
fn latents(sampler: &DeviceSampler) -> Vec<f32> {
    PLACES.iter().flat_map(|&slot| sampler.read_latents(slot).unwrap()).collect()
}

/// Writes latents or noise of all rows.
fn write(sampler: &DeviceSampler, values: &[f32], write: impl Fn(&DeviceSampler, usize, &[f32])) {
    let rows = values.chunks_exact(values.len() / LATENTS.n);
    PLACES.into_iter().zip(rows).for_each(|(slot, values)| write(sampler, slot, values));
}

fn write_latents(sampler: &DeviceSampler, values: &[f32]) {
    write(sampler, values, |sampler, slot, values| sampler.write_latents(slot, values).unwrap());
}

fn config(fields: &str) -> SchedulerConfig {
    let text = format!(
        r#"{{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "steps_offset": 1, {fields}}}"#
    );
    SchedulerConfig::parse(&text, "scheduler_config.json").unwrap()
}

fn run(device: &Arc<dyn CudaDevice>, launch: Launch) {
    // SAFETY: the callers' buffers are alive and as long as the launches require.
    unsafe { device.run(&[launch]) }.unwrap();
}

fn floats(buffer: &Buffer, len: usize) -> Vec<f32> {
    let mut values = vec![0f32; len];
    buffer.read(0, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

fn halves(buffer: &Buffer, len: usize) -> Vec<f16> {
    let mut values = vec![f16::ZERO; len];
    buffer.read(0, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

fn generators(rng: Rng) -> Vec<NormalGenerator> {
    (0..LATENTS.n as u64).map(|i| NormalGenerator::new(rng, SEED.wrapping_add(i))).collect()
}

/// One draw for every image, converted from NCHW to NHWC.
fn draw(generators: &mut [NormalGenerator]) -> Vec<f32> {
    let (pixels, channels) = (LATENTS.tokens(), LATENTS.c);
    let mut nchw = vec![0f32; pixels * channels];
    let images = generators.iter_mut().flat_map(|generator| {
        generator.fill(&mut nchw);
        (0..pixels * channels).map(|i| nchw[i % channels * pixels + i / channels]).collect::<Vec<f32>>()
    });
    images.collect()
}

/// The prediction of an image with guidance, from the outputs without and with the prompt: the published formulas.
fn guided(guidance: Guidance, step: &Step, without: &[f32], with: &[f32]) -> Vec<f32> {
    let inside = guidance.interval.0 >= step.timestep && guidance.interval.1 <= step.timestep;
    if !inside || guidance.scale * step.guidance as f32 == 1.0 {
        return with.to_vec();
    }
    let scale = guidance.scale * step.guidance as f32;
    let mixed: Vec<f32> = without.iter().zip(with).map(|(u, c)| u + scale * (c - u)).collect();
    if guidance.rescale == 0.0 {
        return mixed;
    }
    let deviation = |values: &[f32]| {
        let mean = values.iter().map(|&x| x as f64).sum::<f64>() / values.len() as f64;
        values.iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>().sqrt()
    };
    let ratio = deviation(with) / deviation(&mixed);
    let factor = (guidance.rescale as f64 * ratio + (1.0 - guidance.rescale as f64)) as f32;
    mixed.iter().map(|x| x * factor).collect()
}

/// A session: a sampler with the buffers of the UNet that it would serve.
struct Session {
    device: Arc<dyn CudaDevice>,
    sampler: DeviceSampler,
    guided: bool,
    sample: Buffer,
    timestep: Buffer,
    out: Buffer,
    /// The first one comes before the UNet, the others after it.
    recordings: Vec<Box<dyn respodiff::cuda::Recording>>,
}

impl Session {
    fn new(device: &Arc<dyn CudaDevice>, guided: bool) -> Self {
        let rows = if guided { 2 } else { 1 };
        let sampler = DeviceSampler::new(device, LATENTS, 20).unwrap();
        let sample = Buffer::new(device, rows * LATENTS.len() * 2).unwrap();
        let timestep = Buffer::new(device, rows * LATENTS.n * 4).unwrap();
        let out = Buffer::new(device, rows * LATENTS.len() * 4).unwrap();
        // One recording for all steps of all samplers: nothing in it may depend on them.
        let record = |launch| {
            // SAFETY: the buffers live as long as the recordings, in the same structure.
            unsafe { device.clone().record(&[launch]) }.unwrap()
        };
        let mut recordings = vec![record(sampler.prepare(LATENTS.n, sample.address(), timestep.address(), guided))];
        recordings.extend(guided.then(|| record(sampler.rescale(LATENTS.n, out.address()))));
        recordings.push(record(sampler.guide_and_step(LATENTS.n, out.address(), guided)));
        Session { device: device.clone(), sampler, guided, sample, timestep, out, recordings }
    }

    /// Samples with a "model" that is a random multiple of its input plus random numbers, in parallel with the CPU's
    /// sampler, which gets the same outputs. Both do the same f32 arithmetic in the same order, so their numbers are
    /// equal. For noise drawn on the device this holds except for one number in 10^8, whose f64 is almost halfway
    /// between two f32.
    fn check(&self, label: &str, schedule: &Schedule, rng: Rng) {
        let rows = if self.guided { 2 } else { 1 };
        let mut generators = generators(rng);
        begin(&self.sampler, &schedule.steps, 1, rng == Rng::TorchCuda);
        let mut x = draw(&mut generators);
        x.iter_mut().for_each(|x| *x *= schedule.init_noise_sigma);
        match rng {
            Rng::TorchCpu => write_latents(&self.sampler, &x),
            Rng::TorchCuda => {
                PLACES.iter().for_each(|&slot| run(&self.device, self.sampler.draw(slot, schedule.init_noise_sigma)));
            }
        }
        let mut state = SamplerState::new(x.len());
        for (i, step) in schedule.steps.iter().enumerate() {
            let label = format!("{label}, step {i}");
            let noise = if step.needs_noise() { draw(&mut generators) } else { vec![0.0; x.len()] };
            if step.needs_noise() && rng == Rng::TorchCpu {
                write(&self.sampler, &noise, |sampler, slot, noise| sampler.write_noise(slot, noise).unwrap());
            }
            step.churn(&mut x, &noise);
            self.recordings[0].replay().unwrap();
            assert_eq!(floats(&self.timestep, rows * LATENTS.n), vec![step.timestep; rows * LATENTS.n], "{label}");
            let input = halves(&self.sample, rows * x.len());
            for (ours, x) in input.iter().zip(x.iter().cycle()) {
                assert_eq!(*ours, f16::from_f32(x * step.input_scale), "{label}");
            }
            let factor = random(2, i as u64 + 1);
            let shift = random(input.len(), 50 + i as u64);
            let out: Vec<f32> =
                input.iter().zip(&shift).map(|(x, s)| (factor[0] * x.to_f64() + factor[1] + s) as f32).collect();
            self.out.write(0, bytemuck::cast_slice(&out)).unwrap();
            let one = x.len() / LATENTS.n;
            let prediction: Vec<f32> = match self.guided {
                true => (0..LATENTS.n)
                    .flat_map(|i| guided(GUIDANCE[i], step, &out[i * one..][..one], &out[x.len() + i * one..][..one]))
                    .collect(),
                false => out,
            };
            self.recordings[1..].iter().for_each(|recording| recording.replay().unwrap());
            state.step(step, &prediction, &mut x, &noise);
            for (i, (ours, theirs)) in latents(&self.sampler).iter().zip(&x).enumerate() {
                assert_eq!(ours, theirs, "{label}, number {i}");
            }
        }
        assert!(PLACES.iter().all(|&slot| self.sampler.fault(slot).unwrap().is_none()), "{label}");
    }
}

#[test]
fn every_sampler_steps_as_on_the_cpu() {
    for (name, device) in devices(Limits::A100) {
        for guided in [true, false] {
            // In turn on one session: the state that one sampler leaves must not matter to the next.
            let session = Session::new(&device, guided);
            for sampler in Sampler::ALL {
                for fields in [r#""clip_sample": false"#, r#""clip_sample": true, "prediction_type": "v_prediction""#] {
                    // Heun's method refuses to clip.
                    if sampler == Sampler::Heun && fields.contains("true") {
                        continue;
                    }
                    // Noise before a step is tested with those that have it, and else the noise after it.
                    let churns = matches!(sampler, Sampler::Euler | Sampler::Heun | Sampler::Dpm2);
                    let tuning = Tuning { s_churn: churns.then_some(2.0), ..Tuning::NONE };
                    let choice = SamplerChoice { sampler: Some(sampler), tuning, ..SamplerChoice::default() };
                    let schedule = Schedule::new(&config(fields), choice, 5).unwrap();
                    // If no step needs noise, the generator matters to the first latents alone.
                    let noisy = schedule.steps.iter().any(|step| step.needs_noise());
                    for rng in Rng::ALL.into_iter().filter(|rng| noisy || *rng == Rng::TorchCpu) {
                        let label = format!("{name}, {sampler:?}, {fields}, guided {guided}, {rng:?}");
                        session.check(&label, &schedule, rng);
                    }
                }
            }
        }
    }
}

/// Images with samplers, seeds and lengths of their own join between the steps of others, in batches of changing size;
/// some keep parts of a picture. Each becomes what it is alone: the CPU's sampler with the same predictions.
#[test]
fn images_join_and_leave() {
    let one = Shape { n: 1, ..LATENTS }.len();
    // The slot, the call of the UNet before which it joins, its sampler, its steps,
    // and if it keeps parts of a picture.
    let joining =
        [(1, 0, "DPM++ 2M", 6, true), (0, 2, "PNDM", 3, false), (2, 3, "Euler a", 2, true), (0, 7, "UniPC", 4, false)];
    for (name, device) in devices(Limits::A100) {
        let sampler = DeviceSampler::new(&device, LATENTS, 20).unwrap();
        let sample = Buffer::new(&device, 2 * LATENTS.len() * 2).unwrap();
        let timestep = Buffer::new(&device, 2 * LATENTS.n * 4).unwrap();
        let out = Buffer::new(&device, 2 * LATENTS.len() * 4).unwrap();
        struct Truth {
            slot: usize,
            schedule: Schedule,
            done: usize,
            x: Vec<f32>,
            state: SamplerState,
            noise: NormalGenerator,
            kept: Option<Kept>,
        }
        let mut truths: Vec<Truth> = Vec::new();
        for call in 0..12 {
            let joining = joining.into_iter().enumerate().filter(|(_, (_, at, ..))| *at == call);
            for (i, (slot, _, choice, steps, keeps)) in joining {
                let schedule =
                    Schedule::new(&config(r#""clip_sample": false"#), choice.parse().unwrap(), steps).unwrap();
                let x: Vec<f32> = random(one, 90 + i as u64).iter().map(|&x| x as f32).collect();
                let floats = |seed| random(one, seed + i as u64).iter().map(|&x| x as f32).collect::<Vec<f32>>();
                let repaint = (0..LATENTS.tokens()).map(|i| i % 3 == slot).collect();
                let kept = keeps.then(|| Kept { latents: floats(200), noise: floats(300), repaint });
                sampler.begin(slot, &schedule.steps, SampledImage { kept: keeps, ..image(slot, 0, false) }).unwrap();
                kept.iter().for_each(|kept| sampler.write_kept(slot, kept).unwrap());
                sampler.write_latents(slot, &x).unwrap();
                let noise = NormalGenerator::new(Rng::TorchCpu, i as u64);
                truths.push(Truth { slot, schedule, done: 0, x, state: SamplerState::new(one), noise, kept });
            }
            let active = |truth: &&mut Truth| truth.done < truth.schedule.steps.len();
            let mut active: Vec<&mut Truth> = truths.iter_mut().filter(active).collect();
            // The last rows of a batch that is larger than needed have no image.
            let rows = active.len().next_power_of_two().min(LATENTS.n);
            sampler.place(&active.iter().map(|truth| truth.slot).collect::<Vec<_>>()).unwrap();
            run(&device, sampler.prepare(rows, sample.address(), timestep.address(), true));
            let input = halves(&sample, 2 * rows * one);
            let mut predicted = vec![0f32; 2 * rows * one];
            for (row, truth) in active.iter_mut().enumerate() {
                let step = &truth.schedule.steps[truth.done];
                for copy in [row, rows + row] {
                    assert_eq!(floats(&timestep, 2 * rows)[copy], step.timestep, "{name}, call {call}");
                    let theirs = truth.x.iter().map(|x| f16::from_f32(x * step.input_scale));
                    assert!(input[copy * one..][..one].iter().copied().eq(theirs), "{name}, call {call}, row {row}");
                    let seed = (1000 * truth.slot + 10 * truth.done + copy.min(rows)) as u64;
                    let values = random(one, seed);
                    predicted[copy * one..][..one].iter_mut().zip(values).for_each(|(p, x)| *p = x as f32);
                }
            }
            assert!(input[active.len() * one..rows * one].iter().all(|x| x.to_f32() == 0.0), "{name}, call {call}");
            out.write(0, bytemuck::cast_slice(&predicted)).unwrap();
            for (row, truth) in active.iter_mut().enumerate() {
                let step = truth.schedule.steps[truth.done];
                let (without, with) = (&predicted[row * one..][..one], &predicted[(rows + row) * one..][..one]);
                let prediction = guided(GUIDANCE[truth.slot], &step, without, with);
                let mut noise = vec![0f32; one];
                if step.needs_noise() {
                    truth.noise.fill(&mut noise);
                    sampler.write_noise(truth.slot, &noise).unwrap();
                }
                truth.state.step(&step, &prediction, &mut truth.x, &noise);
                truth.done += 1;
                let level =
                    truth.schedule.steps.get(truth.done).map_or((1.0, 0.0), |s| (s.level.signal, s.level.noise));
                if let Some(kept) = &truth.kept {
                    for i in (0..one).filter(|i| !kept.repaint[i / LATENTS.c]) {
                        truth.x[i] = level.0 as f32 * kept.latents[i] + level.1 as f32 * kept.noise[i];
                    }
                }
            }
            run(&device, sampler.rescale(rows, out.address()));
            run(&device, sampler.guide_and_step(rows, out.address(), true));
            // A slot holds the image that began there last.
            for (i, Truth { slot, x, .. }) in truths.iter().enumerate() {
                if truths[i + 1..].iter().all(|later| later.slot != *slot) {
                    assert_eq!(sampler.read_latents(*slot).unwrap(), *x, "{name}, call {call}, slot {slot}");
                }
            }
        }
        assert!(truths.iter().all(|truth| truth.done == truth.schedule.steps.len()));
    }
}

/// The numbers of the CPU's generator, within an error in the last place.
#[test]
fn noise() {
    for (name, device) in devices(Limits::A100) {
        let sampler = DeviceSampler::new(&device, LATENTS, 1).unwrap();
        let mut generators = generators(Rng::TorchCuda);
        for drawn in 1..=3 {
            begin(&sampler, &[], drawn, true);
            PLACES.iter().for_each(|&slot| run(&device, sampler.draw(slot, 14.6146)));
            let theirs: Vec<f32> = draw(&mut generators).iter().map(|x| x * 14.6146).collect();
            let ours = latents(&sampler);
            for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                assert!((a - b).abs() <= b.abs() * 2.5e-7, "{name}: number {i} is {a} where {b} is right");
            }
        }
    }
}

#[test]
fn latents_that_are_not_finite_are_found_in_their_step() {
    let schedule = Schedule::new(&config(r#""clip_sample": true"#), "DDIM".parse().unwrap(), 5).unwrap();
    for (name, device) in devices(Limits::A100) {
        for bad in [f32::NAN, f32::INFINITY] {
            let session = Session::new(&device, true);
            begin(&session.sampler, &schedule.steps, 0, false);
            write_latents(&session.sampler, &vec![0.5; LATENTS.len()]);
            let mut out: Vec<f32> = random(2 * LATENTS.len(), 9).iter().map(|&x| x as f32).collect();
            for step in 0..5 {
                if step == 3 {
                    out[LATENTS.len() + 300] = bad;
                }
                session.out.write(0, bytemuck::cast_slice(&out)).unwrap();
                session.recordings.iter().for_each(|recording| recording.replay().unwrap());
                // The number is one of the second row.
                for (row, slot) in PLACES.into_iter().enumerate() {
                    let expected = (step >= 3 && row == 1).then_some(3);
                    let fault = session.sampler.fault(slot).unwrap();
                    assert_eq!(fault, expected, "{name}: {bad} in step 3, row {row} after step {step}");
                }
            }
        }
    }
}

/// Replays beyond the last step change nothing.
#[test]
fn a_finished_sampler_stays() {
    let schedule = Schedule::new(&config(r#""clip_sample": false"#), "Euler".parse().unwrap(), 2).unwrap();
    let (_, device) = devices(Limits::A100).remove(0);
    let session = Session::new(&device, false);
    begin(&session.sampler, &schedule.steps, 0, false);
    write_latents(&session.sampler, &vec![0.5; LATENTS.len()]);
    session.out.write(0, bytemuck::cast_slice(&vec![0.25f32; LATENTS.len()])).unwrap();
    let replay = || session.recordings.iter().for_each(|recording| recording.replay().unwrap());
    (0..2).for_each(|_| replay());
    let done = latents(&session.sampler);
    replay();
    assert!(latents(&session.sampler) == done);
}

#[test]
fn latents_for_vae() {
    let all: Vec<f32> = random(LATENTS.len(), 4).iter().map(|&x| 3.0 * x as f32).collect();
    let one = LATENTS.len() / LATENTS.n;
    for (name, device) in devices(Limits::A100) {
        let sampler = DeviceSampler::new(&device, LATENTS, 1).unwrap();
        write_latents(&sampler, &all);
        let out = Buffer::new(&device, one * 2).unwrap();
        for (image, latents) in all.chunks_exact(one).enumerate() {
            run(&device, sampler.latents_for_vae(PLACES[image], 0.18215, out.address()));
            let theirs: Vec<f16> = latents.iter().map(|x| f16::from_f32(x / 0.18215)).collect();
            assert_eq!(halves(&out, one), theirs, "{name}, image {image}");
        }
    }
}

#[test]
fn to_rgb8() {
    for (name, device) in devices(Limits::A100) {
        for (height, width) in [(5, 7), (32, 24), (1, 1)] {
            let length = height * width * 3;
            let mut values: Vec<f32> = random(length, 6).iter().map(|&x| 1.25 * x as f32).collect();
            // Halfway between bytes, which round to the even one.
            values.iter_mut().step_by(5).enumerate().for_each(|(i, x)| *x = (i % 255) as f32 / 127.5 - 254.0 / 255.0);
            let sampler = DeviceSampler::new(&device, LATENTS, 1).unwrap();
            begin(&sampler, &[], 0, false);
            let x = Buffer::from_bytes(&device, bytemuck::cast_slice(&values)).unwrap();
            let out = Buffer::new(&device, length).unwrap();
            run(&device, sampler.to_rgb8(1, x.address(), length, out.address()));
            let mut rgb = vec![0; length];
            out.read(0, &mut rgb).unwrap();
            assert_eq!(rgb, Picture::from_hwc(&values, height, width).unwrap().rgb, "{name}, {width}x{height}");
            assert!(!sampler.picture_fault(1).unwrap(), "{name}");
            for bad in [f32::NAN, f32::NEG_INFINITY] {
                begin(&sampler, &[], 0, false);
                values[length - 1] = bad;
                x.write(0, bytemuck::cast_slice(&values)).unwrap();
                run(&device, sampler.to_rgb8(1, x.address(), length, out.address()));
                assert!(sampler.picture_fault(1).unwrap() && !sampler.picture_fault(0).unwrap(), "{name}: {bad}");
                // A preview that fails does not condemn the picture after it.
                sampler.begin_picture(1).unwrap();
                assert!(!sampler.picture_fault(1).unwrap(), "{name}: {bad}");
            }
        }
    }
}
