//! Samplers compared with diffusers step by step, and the checks of configurations and requests.

use std::collections::BTreeMap;
use std::path::Path;

use respodiff::ErrorKind;
use respodiff::diffusion::scheduler::{
    NoiseLevel, Preset, Sampler, SamplerChoice, SamplerState, Schedule, SchedulerConfig, Spacing, Step, Tuning,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const SD15: &str = r#"{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false, "num_train_timesteps": 1000,
    "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null}"#;

fn config(text: &str) -> SchedulerConfig {
    SchedulerConfig::parse(text, "scheduler_config.json").unwrap()
}

/// `SD15` with some fields changed.
fn sd15(fields: Value) -> String {
    let mut all: serde_json::Map<String, Value> = serde_json::from_str(SD15).unwrap();
    all.extend(fields.as_object().unwrap().clone());
    Value::Object(all).to_string()
}

struct Golden {
    cases: Vec<Value>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Golden {
    fn load(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/cases/{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().as_ref().unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Self {
            cases: serde_json::from_str(&metadata["cases"]).unwrap(),
            tensors: tensors.iter().map(|(name, t)| (name.into(), (t.shape().into(), floats(t.data())))).collect(),
        }
    }

    fn rows(&self, name: &str) -> Vec<&[f32]> {
        let (shape, data) = &self.tensors[name];
        data.chunks_exact(data.len() / shape[0]).collect()
    }
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(theirs).map(|(a, b)| (a - b) as f64));
    difference / norm(&mut theirs.iter().map(|v| *v as f64))
}

/// Runs all recorded cases of a sampler, each on its own trajectory from the first sample to the last.
fn compare(name: &str) {
    let golden = Golden::load(name);
    let mut worst = 0f64;
    for (index, case) in golden.cases.iter().enumerate() {
        let spacing: Option<Spacing> = case["spacing"].as_str().map(|name| name.parse().unwrap());
        let checkpoint = config(&case["config"].to_string()).of_sdxl(case["xl"] == true);
        let named = case["sampler"].as_str().unwrap().parse::<SamplerChoice>().unwrap().sampler;
        // A sampler that the checkpoint itself names is not chosen explicitly.
        let sampler = named.filter(|s| *s != checkpoint.sampler().unwrap());
        let tuning: Tuning = serde_json::from_value(case["tuning"].clone()).unwrap_or_default();
        let choice = SamplerChoice { sampler, spacing, tuning };
        let schedule = Schedule::new(&checkpoint, choice, case["steps"].as_u64().unwrap() as usize)
            .unwrap_or_else(|error| panic!("{error}, {case}"));

        // With k-diffusion's sigmas, a noise level without signal has a sigma of 4096, next to which the roundings of
        // fp32 are large; so are they in a single step from the greatest sigma to the least.
        let tolerance = match schedule.init_noise_sigma > 4000.0 {
            true => 3e-4,
            // diffusers computes the sigmas in the middle of ancestral steps in fp32, where large numbers cancel. The
            // cases of k-diffusion, in float64, are closer.
            false if schedule.sampler == Sampler::Dpm2Ancestral && name != "sampler_k_diffusion" => 2e-5,
            false if schedule.init_noise_sigma > 1.0 && case["steps"].as_u64() == Some(2) => 1e-5,
            false => 4e-6,
        };

        let timesteps = golden.rows(&format!("{index}.timesteps"));
        assert_eq!(schedule.steps.len(), timesteps.len(), "number of calls, {case}");
        let sigma = case["init_noise_sigma"].as_f64().unwrap();
        assert!((schedule.init_noise_sigma as f64 / sigma - 1.0).abs() < 1e-6, "init_noise_sigma {sigma}, {case}");

        let inputs = golden.rows(&format!("{index}.model_input"));
        let samples = golden.rows(&format!("{index}.prev_sample"));
        let mut x: Vec<f32> = golden.rows("sample")[0].iter().map(|x| x * schedule.init_noise_sigma).collect();
        let mut state = SamplerState::new(x.len());
        for (i, step) in schedule.steps.iter().enumerate() {
            let theirs = timesteps[i][0];
            let rounding = if schedule.sampler == Sampler::Dpm2Ancestral { 1e-2 } else { 1e-4 };
            assert!((step.timestep - theirs).abs() <= rounding, "timestep {} of {theirs}, {case}", step.timestep);
            step.churn(&mut x, golden.rows("noise")[i]);
            let input: Vec<f32> = x.iter().map(|x| x * step.input_scale).collect();
            state.step(step, golden.rows("out")[i], &mut x, golden.rows("noise")[i]);
            for (what, ours, theirs) in [("model_input", &input, inputs[i]), ("prev_sample", &x, samples[i])] {
                let error = relative_error(ours, theirs);
                assert!(error <= tolerance, "{what} of call {i} is off by {error:.1e}, {case}");
                worst = worst.max(error);
            }
        }
    }
    println!("{name}: {} cases, worst relative error {worst:.1e}", golden.cases.len());
}

#[test]
fn ddim() {
    compare("scheduler_ddim");
}

#[test]
fn pndm() {
    compare("scheduler_pndm");
}

#[test]
fn euler() {
    compare("scheduler_euler");
}

#[test]
fn euler_ancestral() {
    compare("scheduler_euler_a");
}

#[test]
fn dpm_solver_multistep() {
    compare("scheduler_dpmpp_2m");
}

#[test]
fn unipc() {
    compare("scheduler_unipc");
}

#[test]
fn lcm() {
    compare("scheduler_lcm");
}

#[test]
fn samplers_of_diffusers_that_take_one_call_a_step() {
    for name in ["ddpm", "ddim_eta", "tcd", "lms", "dpmpp_2m_sde", "singlestep"] {
        compare(&format!("sampler_{name}"));
    }
}

#[test]
fn samplers_of_diffusers_that_take_two_calls_a_step() {
    for name in ["heun", "dpm2", "dpm2_a", "dpmpp_sde"] {
        compare(&format!("sampler_{name}"));
    }
}

#[test]
fn beta_spacing_and_lu_lambdas() {
    for name in ["beta", "beta_2m", "beta_unipc"] {
        compare(&format!("sampler_{name}"));
    }
}

/// Samplers, tunings and spacings that diffusers does not have, against k-diffusion's functions.
#[test]
fn k_diffusion() {
    compare("sampler_k_diffusion");
}

/// CFG++ in its published form: the guided prediction removes the noise, and the unconditional one brings it back.
#[test]
fn cfg_pp() {
    let (unconditional, conditional, noise) = (0.3, -0.8, 0.4);
    for (name, plain) in [("Euler CFG++", "Euler"), ("Euler a CFG++", "Euler a"), ("DDIM CFG++", "DDIM")] {
        for (fields, velocity) in [(json!({}), false), (json!({"prediction_type": "v_prediction"}), true)] {
            for eta in [None, Some(0.5)].into_iter().filter(|eta| eta.is_none() || plain != "Euler") {
                let schedule = |name: &str| {
                    let choice: SamplerChoice = name.parse().unwrap();
                    let tuning = Tuning { eta, ..Tuning::default() };
                    Schedule::new(&config(&sd15(fields.clone())), SamplerChoice { tuning, ..choice }, 7).unwrap()
                };
                let (ours, plain) = (schedule(name), schedule(plain));
                assert_eq!(ours.steps.len(), 7);
                for (step, plain) in ours.steps.iter().zip(&plain.steps) {
                    assert_eq!(plain.guidance, 1.0);
                    let next = |step: &Step, out: f64| {
                        let mut x = [0.7];
                        SamplerState::new(1).step(step, &[out as f32], &mut x, &[noise]);
                        x[0] as f64
                    };
                    let scale = 0.6;
                    let guided = |scale: f64| unconditional + scale * (conditional - unconditional);
                    let ours = next(step, guided(scale * step.guidance));
                    // A plain step is linear in the output: its slope is that of the removal of noise, less that of the
                    // noise brought back. From the sample without noise the first one is known.
                    let slope = next(plain, 1.0) - next(plain, 0.0);
                    let removal = match plain.input_scale {
                        // DDIM: alpha of the next level times the slope of the sample without noise.
                        1.0 => plain.next.m * plain.convert.out,
                        alpha => {
                            let alpha = alpha as f64;
                            if velocity { -(1.0 - alpha * alpha).sqrt() } else { -(1.0 / (alpha * alpha) - 1.0).sqrt() }
                        }
                    };
                    let brought_back = slope - removal;
                    let theirs = next(plain, 0.0) + removal * guided(scale) + brought_back * unconditional;
                    assert!((ours - theirs).abs() <= 1e-5 * theirs.abs().max(1.0), "{name}, {ours} is not {theirs}");
                }
            }
        }
    }
}

/// Presets take the steps that the models' cards show.
#[test]
fn presets() {
    let timesteps = |name: &str| {
        let preset: Preset = name.parse().unwrap();
        let schedule = Schedule::new(&config(SD15), preset.choice, preset.steps).unwrap();
        schedule.steps.iter().map(|step| step.timestep).collect::<Vec<_>>()
    };
    assert_eq!(timesteps("lightning-4"), [999.0, 749.0, 499.0, 249.0]);
    assert_eq!(timesteps("hyper-8"), [999.0, 874.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0]);
    assert_eq!(timesteps("LCM"), [999.0, 759.0, 499.0, 259.0]);
    for preset in Preset::ALL {
        assert_eq!(preset.name.parse::<Preset>().unwrap(), preset);
        assert_eq!((timesteps(preset.name).len(), timesteps(preset.name)[0]), (preset.steps, 999.0), "{}", preset.name);
        assert!(preset.check(true).is_ok() && preset.check(false).is_ok() != preset.name.starts_with("lightning"));
    }
    // The model for one step predicts the picture itself.
    let one: Preset = "lightning-1".parse().unwrap();
    let schedule = Schedule::new(&config(SD15), one.choice, one.steps).unwrap();
    let mut x = [9.0];
    SamplerState::new(1).step(&schedule.steps[0], &[0.25], &mut x, &[0.0]);
    assert!((x[0] - 0.25).abs() < 1e-6, "{x:?}");
    assert!("lightning-3".parse::<Preset>().is_err_and(|error| error.to_string().contains("lightning-4")));
}

/// Fields by which a checkpoint names a sampler and its steps.
#[test]
fn checkpoints_name_every_sampler() {
    for (fields, sampler, spacing) in [
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}),
            Sampler::DpmSolverMultistepSde,
            Spacing::Linspace,
        ),
        (
            json!({"_class_name": "DPMSolverSinglestepScheduler", "timestep_spacing": "leading"}),
            Sampler::DpmSolverSinglestep,
            Spacing::Linspace,
        ),
        (json!({"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": true}), Sampler::Heun, Spacing::Beta),
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": true}),
            Sampler::DpmSolverMultistep,
            Spacing::LuLambdas,
        ),
        (
            json!({"_class_name": "KDPM2AncestralDiscreteScheduler", "use_karras_sigmas": true}),
            Sampler::Dpm2Ancestral,
            Spacing::Karras,
        ),
    ] {
        let schedule = Schedule::new(&config(&sd15(fields)), SamplerChoice::default(), 10).unwrap();
        assert_eq!((schedule.sampler, schedule.spacing), (sampler, Some(spacing)));
    }
}

/// Which noise is drawn anew, and which is a Brownian motion's.
#[test]
fn spans_of_noise() {
    let spans = |fields: Value, name: Option<&str>| {
        let choice = name.map_or(SamplerChoice::default(), |name| name.parse().unwrap());
        let schedule = Schedule::new(&config(&sd15(fields)), choice, 5).unwrap();
        let noisy: Vec<Step> = schedule.steps.into_iter().filter(Step::needs_noise).collect();
        noisy.iter().map(|step| step.span).collect::<Vec<_>>()
    };
    let sde = json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"});
    // As diffusers' class, and as k-diffusion's function.
    assert_eq!(spans(sde.clone(), None), [None; 4]);
    let named = spans(sde, Some("DPM++ 2M SDE Karras"));
    let named: Vec<[f64; 2]> = named.into_iter().map(Option::unwrap).collect();
    assert_eq!(named.len(), 4);
    assert!(named.windows(2).all(|pair| (pair[0][1] / pair[1][0] - 1.0).abs() < 1e-12), "{named:?}");
    assert!((named[0][0] - 14.6146).abs() < 1e-3 && (named[3][1] - 0.02917).abs() < 1e-4, "{named:?}");
    // The way to the middle of a step is part of the step.
    let own = spans(json!({"_class_name": "DPMSolverSDEScheduler"}), None);
    let own: Vec<[f64; 2]> = own.into_iter().map(Option::unwrap).collect();
    assert_eq!(own.len(), 8);
    assert!(own.chunks(2).all(|pair| pair[0][0] == pair[1][0] && pair[0][1] > pair[1][1]), "{own:?}");
    assert_eq!(spans(json!({}), Some("Euler a")), [None; 4]);
}

#[test]
fn tunings_that_a_sampler_does_not_have_are_refused() {
    let none = Tuning::default();
    for (sampler, tuning, field) in [
        ("Euler", Tuning { eta: Some(1.0), ..none }, "eta"),
        ("DPM++ 2M", Tuning { eta: Some(0.0), ..none }, "eta"),
        ("DDIM", Tuning { eta: Some(1.1), ..none }, "eta"),
        ("TCD", Tuning { eta: Some(-0.1), ..none }, "eta"),
        ("Euler a", Tuning { eta: Some(f64::NAN), ..none }, "eta"),
        ("Euler a", Tuning { s_churn: Some(1.0), ..none }, "s_churn"),
        ("Euler", Tuning { s_churn: Some(f64::INFINITY), ..none }, "s_churn"),
        ("LMS", Tuning { s_tmin: Some(1.0), ..none }, "s_tmin"),
        ("LMS", Tuning { s_tmax: Some(1.0), ..none }, "s_tmax"),
        ("DDIM", Tuning { s_noise: Some(1.0), ..none }, "s_noise"),
    ] {
        let choice: SamplerChoice = sampler.parse().unwrap();
        let error = Schedule::new(&config(SD15), SamplerChoice { tuning, ..choice }, 5).expect_err(field);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(field), "{sampler}: {error}");
    }
}

#[test]
fn every_number_of_steps_has_finite_coefficients() {
    for checkpoint in [
        SD15.to_owned(),
        sd15(json!({"prediction_type": "v_prediction"})),
        sd15(json!({"prediction_type": "v_prediction", "rescale_betas_zero_snr": true})),
    ] {
        let zero_snr = checkpoint.contains("rescale_betas_zero_snr");
        let checkpoint = config(&checkpoint);
        for sampler in Sampler::ALL.into_iter().filter(|sampler| !(zero_snr && *sampler == Sampler::Pndm)) {
            for spacing in std::iter::once(None).chain(Spacing::ALL.map(Some)) {
                let choice = SamplerChoice { sampler: Some(sampler), spacing, ..SamplerChoice::default() };
                let timesteps =
                    matches!(spacing, None | Some(Spacing::Leading | Spacing::Trailing | Spacing::Linspace));
                let whole = matches!(sampler, Sampler::Ddim | Sampler::DdimCfgPp | Sampler::Ddpm | Sampler::Pndm);
                let distilled = matches!(sampler, Sampler::Lcm | Sampler::Tcd);
                if (distilled && spacing.is_some()) || (whole && !timesteps) {
                    assert!(
                        Schedule::new(&checkpoint, choice, 4).is_err_and(|e| e.kind() == ErrorKind::Invalid),
                        "{choice:?}"
                    );
                    continue;
                }
                for steps in 1..=if distilled { 50 } else { 100 } {
                    let schedule = Schedule::new(&checkpoint, choice, steps);
                    let schedule = schedule.unwrap_or_else(|error| panic!("{error}, {choice:?}"));
                    let calls = match sampler {
                        Sampler::Pndm => steps + (steps > 1) as usize,
                        Sampler::Heun | Sampler::Dpm2 | Sampler::Dpm2Ancestral => 2 * steps - 1,
                        Sampler::Dpmpp2sAncestral | Sampler::DpmppSde => 2 * steps - 1,
                        _ => steps,
                    };
                    assert_eq!(schedule.steps.len(), calls, "{choice:?} in {steps}");
                    // A run with a constant model output stays finite, so all coefficients are finite.
                    let mut state = SamplerState::new(1);
                    let mut x = [schedule.init_noise_sigma];
                    schedule.steps.iter().for_each(|step| state.step(step, &[0.5], &mut x, &[0.5]));
                    assert!(x[0].is_finite() && schedule.init_noise_sigma > 0.0, "{choice:?} in {steps}");
                    // As in diffusers, DPM2 with Karras' spacing rounds the timesteps of steps, and not those in the
                    // middle.
                    let falling = schedule.steps.windows(2).all(|pair| pair[0].timestep + 0.5 >= pair[1].timestep);
                    assert!(falling, "{choice:?} in {steps}");
                }
            }
        }
    }
}

/// A model that knows the noise exactly leads from each step's noise level to the next one's, wherever the schedule
/// begins. Samples are vectors whose first coordinate is the signal, the second the noise of the beginning, and the
/// others the noise of each step.
#[test]
fn steps_lead_from_level_to_level() {
    for prediction in ["epsilon", "v_prediction"] {
        let checkpoint = config(&sd15(json!({"prediction_type": prediction})));
        for sampler in Sampler::ALL {
            // PNDM takes means of the model's outputs, as diffusers does, which are not those of the noise if the
            // outputs are velocities.
            if sampler == Sampler::Pndm && prediction == "v_prediction" {
                continue;
            }
            let choice = SamplerChoice { sampler: Some(sampler), ..SamplerChoice::default() };
            let whole = Schedule::new(&checkpoint, choice, 8).unwrap();
            for first in [0, 1, 5, 7] {
                let schedule = Schedule::from_step(&checkpoint, choice, 8, first).unwrap();
                // PNDM takes its first step twice, unless it is the only one; others call the model twice in every step
                // but the last.
                let twice = (sampler == Sampler::Pndm && first < 7) as usize;
                let calls = if whole.steps.len() == 15 { 15 - 2 * first } else { 8 - first + twice };
                assert_eq!(schedule.steps.len(), calls, "{sampler:?}");
                let both = schedule.steps.iter().skip(2 * twice).rev().zip(whole.steps.iter().rev());
                for (step, same) in both {
                    assert_eq!((step.timestep, step.level), (same.timestep, same.level), "{sampler:?} from {first}");
                }
                let mut state = SamplerState::new(20);
                let mut x = vec![0f32; 20];
                (x[0], x[1]) = (schedule.steps[0].level.signal as f32, schedule.steps[0].level.noise as f32);
                for (i, step) in schedule.steps.iter().enumerate() {
                    let (signal, noise) = (step.level.signal as f32, step.level.noise as f32);
                    let mut out: Vec<f32> = x.iter().map(|x| x / noise).collect();
                    out[0] = (x[0] - signal) / noise;
                    if prediction == "v_prediction" {
                        // alpha * epsilon - sigma * x0, of a sample whose variance is kept.
                        let length = signal.hypot(noise);
                        out.iter_mut().for_each(|epsilon| *epsilon *= signal / length);
                        out[0] -= noise / length;
                    }
                    let mut fresh = [0.0; 20];
                    fresh[2 + i] = 1.0;
                    state.step(step, &out, &mut x, &fresh);
                    let level = schedule.steps.get(i + 1).map_or(NoiseLevel::CLEAN, |next| next.level);
                    // Some end at training's first level, and not without noise.
                    let last = i + 1 == schedule.steps.len();
                    let length = x[1..].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    let off = (f64::from(x[0]) - level.signal).abs().max((length - level.noise).abs());
                    // The sampler's unit is sigma: Euler's samples are not scaled.
                    let tolerance = if last { 0.05 } else { 2e-5 * schedule.steps[0].level.noise.max(1.0) };
                    assert!(off < tolerance, "{sampler:?} {prediction} from {first}, step {i}: {off:.1e}");
                }
            }
        }
    }
}

#[test]
fn samplers_go_by_many_names() {
    use Sampler::*;
    for (names, sampler, spacing) in [
        ("DDIM|ddim|DDIMScheduler", Ddim, None),
        ("PNDM|PLMS|plms|PNDMScheduler", Pndm, None),
        ("euler|Euler|EulerDiscreteScheduler|sample_euler", Euler, None),
        (
            "euler_a|Euler a|EulerAncestralDiscreteScheduler|euler-ancestral|sample_euler_ancestral",
            EulerAncestral,
            None,
        ),
        ("dpmpp_2m|DPM++ 2M|DPMSolverMultistepScheduler|dpm++2m|dpm++_2m|sample_dpmpp_2m", DpmSolverMultistep, None),
        ("UniPC|unipc|UniPCMultistepScheduler|uni_pc", UniPc, None),
        ("LCM|lcm|LCMScheduler", Lcm, None),
        ("DPM++ 2M Karras|dpmpp_2m_karras|dpm++2mkarras", DpmSolverMultistep, Some(Spacing::Karras)),
        ("Euler Karras", Euler, Some(Spacing::Karras)),
        ("Euler a Exponential", EulerAncestral, Some(Spacing::Exponential)),
        ("DDIM CFG++|ddim_cfg_pp", DdimCfgPp, None),
        ("euler_cfg_pp|Euler CFG++|k_euler_cfg_pp", EulerCfgPp, None),
        ("euler_ancestral_cfg_pp|Euler a CFG++", EulerAncestralCfgPp, None),
        ("DDPM|DDPMScheduler|ddpm", Ddpm, None),
        ("Heun|k_heun|HeunDiscreteScheduler|sample_heun", Heun, None),
        ("LMS|k_lms|LMSDiscreteScheduler", Lms, None),
        ("DPM2|dpm_2|k_dpm_2|KDPM2DiscreteScheduler|sample_dpm_2", Dpm2, None),
        ("DPM2 a|k_dpm_2_a|k_dpm_2_ancestral|KDPM2AncestralDiscreteScheduler", Dpm2Ancestral, None),
        ("DPM++ 2M SDE|k_dpmpp_2m_sde|dpmpp_2m_sde", DpmSolverMultistepSde, None),
        ("DPM++ 3M SDE|k_dpmpp_3m_sde|sample_dpmpp_3m_sde", DpmSolverMultistep3Sde, None),
        ("DPM++ 2S|DPMSolverSinglestepScheduler", DpmSolverSinglestep, None),
        ("DPM++ 2S a|k_dpmpp_2s_a|sample_dpmpp_2s_ancestral", Dpmpp2sAncestral, None),
        ("DPM++ SDE|k_dpmpp_sde|DPMSolverSDEScheduler", DpmppSde, None),
        ("TCD|TCDScheduler", Tcd, None),
        ("DPM++ 2M AYS|dpmpp_2m align_your_steps", DpmSolverMultistep, Some(Spacing::AlignYourSteps)),
        ("DPM++ 2M SDE Karras|dpmpp_2m_sde_karras", DpmSolverMultistepSde, Some(Spacing::Karras)),
        ("Euler beta", Euler, Some(Spacing::Beta)),
        ("Euler KL Optimal", Euler, Some(Spacing::KlOptimal)),
        ("Euler lu", Euler, Some(Spacing::LuLambdas)),
        ("Euler trailing", Euler, Some(Spacing::Trailing)),
        ("euler sgm_uniform|Euler SGM Uniform", Euler, Some(Spacing::SgmUniform)),
        ("euler_simple", Euler, Some(Spacing::Simple)),
        ("euler ddim_uniform", Euler, Some(Spacing::Leading)),
        ("euler_normal|EULER UNIFORM|euler linspace", Euler, Some(Spacing::Linspace)),
        ("DDIM leading", Ddim, Some(Spacing::Leading)),
    ] {
        for name in names.split('|') {
            let choice: SamplerChoice = name.parse().unwrap();
            assert_eq!((choice.sampler, choice.spacing), (Some(sampler), spacing), "{name}");
        }
    }
    for sampler in Sampler::ALL {
        for name in sampler.diffusers_name().into_iter().chain([sampler.a1111_name()]) {
            assert_eq!(name.parse::<SamplerChoice>().unwrap().sampler, Some(sampler));
        }
    }
    for spacing in Spacing::ALL {
        assert_eq!(spacing.name().parse::<Spacing>().unwrap(), spacing);
    }
    for unknown in ["", "karras", "Heun b", "k", "euler b"] {
        let message = unknown.parse::<SamplerChoice>().expect_err(unknown).to_string();
        assert!(message.contains("Euler a") && message.contains("karras"), "{message}");
    }
    assert!("gamma".parse::<Spacing>().is_err_and(|error| error.to_string().contains("trailing")));
}

#[test]
fn the_checkpoint_names_the_default() {
    let schedule = Schedule::new(&config(SD15), SamplerChoice::default(), 20).unwrap();
    assert_eq!((schedule.sampler, schedule.spacing), (Sampler::Pndm, Some(Spacing::Leading)));
    let karras = sd15(json!({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true}));
    let schedule = Schedule::new(&config(&karras), SamplerChoice::default(), 20).unwrap();
    assert_eq!((schedule.sampler, schedule.spacing), (Sampler::DpmSolverMultistep, Some(Spacing::Karras)));
    // The user's choice takes precedence over the checkpoint's.
    let choice = SamplerChoice { spacing: Some(Spacing::Trailing), ..SamplerChoice::default() };
    assert_eq!(Schedule::new(&config(&karras), choice, 20).unwrap().spacing, Some(Spacing::Trailing));
    // Python's JSON, as diffusers writes it.
    let clipped = r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}"#;
    let plain = r#"{"_class_name": "DPMSolverMultistepScheduler"}"#;
    let schedule = |text| Schedule::new(&config(text), SamplerChoice::default(), 20).unwrap();
    assert_eq!(schedule(clipped), schedule(plain));
}

#[test]
fn configs_that_nothing_here_can_honour_are_refused() {
    for (fields, needles) in [
        (json!({"beta_schedule": "sigmoid"}), "beta_schedule sigmoid scaled_linear"),
        (json!({"prediction_type": "flow_prediction"}), "prediction_type flow_prediction v_prediction"),
        (json!({"timestep_spacing": "karras"}), "timestep_spacing karras trailing"),
        (json!({"thresholding": true}), "thresholding true"),
        (json!({"use_flow_sigmas": true}), "use_flow_sigmas true"),
        (json!({"use_dynamic_shifting": true}), "use_dynamic_shifting true"),
        (json!({"variance_type": "learned_range"}), "variance_type learned_range"),
        (json!({"solver_p": {"a": 1}}), "solver_p"),
        (json!({"final_sigmas_type": "one"}), "final_sigmas_type one sigma_min"),
        (json!({"interpolation_type": "cubic"}), "interpolation_type cubic log_linear"),
        (json!({"timestep_type": "odd"}), "timestep_type odd continuous"),
        (json!({"steps_offset": -1}), "steps_offset -1"),
        (json!({"beta_start": "0.1"}), "beta_start 0.1"),
        (json!({"sigma_min": 0.0}), "sigma_min 0 positive"),
        (json!({"clip_sample_range": -1.0}), "clip_sample_range -1 positive"),
        (json!({"sigma_data": 0.5}), "sigma_data 0.5 kind"),
    ] {
        let refused = SchedulerConfig::parse(&sd15(fields), "some/scheduler_config.json");
        let message = refused.expect_err(needles).to_string();
        let named = needles.split(' ').all(|needle| message.contains(needle));
        assert!(named && message.starts_with("some/scheduler_config.json: "), "{message}");
    }
    for text in ["", "[]", "{", r#"{"beta_start": 1e999}"#] {
        assert!(SchedulerConfig::parse(text, "x").is_err_and(|e| e.kind() == ErrorKind::Damaged), "{text}");
    }
    assert!(SchedulerConfig::read("no/such/file.json").is_err_and(|e| e.kind() == ErrorKind::NotFound));
}

#[test]
fn configs_that_one_sampler_cannot_honour_are_refused_by_it() {
    for (class, fields, needles) in [
        ("ScoreSdeVeScheduler", json!({}), "_class_name ScoreSdeVeScheduler EulerDiscreteScheduler"),
        ("PNDMScheduler", json!({"skip_prk_steps": false}), "skip_prk_steps false true"),
        ("PNDMScheduler", json!({"skip_prk_steps": null}), "skip_prk_steps false true"),
        ("PNDMScheduler", json!({"rescale_betas_zero_snr": true}), "rescale_betas_zero_snr"),
        ("DPMSolverMultistepScheduler", json!({"algorithm_type": "sde-dpmsolver"}), "algorithm_type sde dpmsolver++"),
        (
            "DPMSolverSinglestepScheduler",
            json!({"algorithm_type": "sde-dpmsolver++"}),
            "algorithm_type sde dpmsolver++",
        ),
        ("HeunDiscreteScheduler", json!({"clip_sample": true}), "clip_sample true pixels"),
        ("DDPMScheduler", json!({"variance_type": "fixed_large_log"}), "variance_type fixed_large_log"),
        ("DPMSolverMultistepScheduler", json!({"solver_type": "rk4"}), "solver_type rk4 midpoint"),
        ("DPMSolverMultistepScheduler", json!({"solver_order": 4}), "solver_order 4 3"),
        (
            "DPMSolverMultistepScheduler",
            json!({"use_lu_lambdas": true, "use_beta_sigmas": true}),
            "use_lu_lambdas use_beta_sigmas",
        ),
        (
            "EulerDiscreteScheduler",
            json!({"use_karras_sigmas": true, "use_exponential_sigmas": true}),
            "use_karras_sigmas use_exponential_sigmas",
        ),
        ("UniPCMultistepScheduler", json!({"solver_type": "rk4"}), "solver_type rk4 bh2"),
        ("UniPCMultistepScheduler", json!({"solver_order": 0}), "solver_order 0 3"),
        ("UniPCMultistepScheduler", json!({"predict_x0": false}), "predict_x0 final_sigmas_type"),
        ("LCMScheduler", json!({"original_inference_steps": 2000}), "original_inference_steps 2000 1000"),
        ("LCMScheduler", json!({"original_inference_steps": 0}), "original_inference_steps 0"),
        ("DDIMScheduler", json!({"num_train_timesteps": 0}), "num_train_timesteps 0"),
        ("DDIMScheduler", json!({"beta_end": 1.5}), "beta_end 1.5"),
        ("DDIMScheduler", json!({"trained_betas": [0.1, 0.2]}), "trained_betas 2 1000"),
        ("DDIMScheduler", json!({"num_train_timesteps": 2, "trained_betas": [0.1, 1.0]}), "trained_betas between"),
        ("DDIMScheduler", json!({"num_train_timesteps": 2000000}), "num_train_timesteps 2000000"),
    ] {
        let mut text = fields;
        text["_class_name"] = class.into();
        let refused = Schedule::new(&config(&sd15(text)), SamplerChoice::default(), 1);
        let message = refused.expect_err(needles).to_string();
        assert!(needles.split(' ').all(|needle| message.contains(needle)), "{message}");
    }
    // Another sampler accepts such a checkpoint if the field says nothing about the model.
    for fields in [
        json!({"_class_name": "ScoreSdeVeScheduler"}),
        json!({"algorithm_type": "sde-dpmsolver++", "solver_type": "rk4", "solver_order": 4, "use_lu_lambdas": true}),
        json!({"skip_prk_steps": false, "original_inference_steps": 0, "predict_x0": false}),
    ] {
        Schedule::new(&config(&sd15(fields)), "Euler".parse().unwrap(), 10).unwrap();
    }
}

#[test]
fn requests_that_cannot_work_are_refused() {
    let usage = |text: &str, sampler: &str, steps, needle: &str| {
        let refused = Schedule::new(&config(text), sampler.parse().unwrap(), steps);
        let error = refused.expect_err(sampler);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let message = error.to_string();
        assert!(message.contains(needle), "{message}");
    };
    usage(SD15, "euler", 0, "0 steps; choose from 1 to 1000");
    usage(SD15, "euler", 1001, "1001 steps; choose from 1 to 1000");
    usage(SD15, "lcm", 51, "51 steps; choose from 1 to 50");
    usage(SD15, "lcm karras", 4, "leave the spacing out");
    usage(SD15, "ddim karras", 4, "choose leading, trailing or linspace");
    // steps_offset pushes the first timestep out of the table.
    usage(SD15, "ddim", 1000, "DDIM with leading spacing cannot sample in 1000 steps; choose from 1 to 999");
    usage(SD15, "plms", 1000, "PLMS with leading spacing cannot sample in 1000 steps; choose from 1 to 999");
    // All timesteps the same.
    usage(SD15, "dpm++ 2m leading", 1000, "no finite step");
    // At a noise level without signal, the predicted noise says nothing about the sample.
    usage(&sd15(json!({"rescale_betas_zero_snr": true})), "ddim trailing", 10, "no finite step at timestep 999");
    // Every timestep clipped away.
    usage(&sd15(json!({"lambda_min_clipped": 50.0})), "dpm++ 2m trailing", 10, "has no timesteps");
}
