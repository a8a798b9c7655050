//! The whole engine on the emulated kernels: launches, packing, sampling and pictures, compared with the CPU executor.

mod support;

use half::f16;
use respodiff::backend::Cache;
use respodiff::concept::{Concept, Form, Metadata, Module};
use respodiff::cuda::{self, Emulated, Launch, Limits, Recording, TensorTiles, lowered};
use respodiff::diffusion::noise::Rng;
use respodiff::engine::UNET_CONSTANTS;
use respodiff::graph::Extent;
use respodiff::models::{UNetConfig, UNetInput, VaeConfig, unet, vae_decoder};
use respodiff::train::{Losses, Recipe, Task, Trainer};
use respodiff::weights::{Source, Tensors};
use respodiff::{Device, Engine, ErrorKind, Image, Output, Request, SessionOptions, Size};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::{golden, kernels, relative_l2, root};

/// The relative error that is promised for a UNet call. Whole samplings stay within it if fp16 permits: PyTorch's own
/// latents of the demo are off by 4e-3 in fp16 after 25 steps, but by 7e-3 to 5e-2 after 6 steps, which are too coarse
/// for PNDM.
const TOLERANCE: f64 = 1e-2;

fn generate(engine: &Engine, options: SessionOptions, request: &Request) -> Output {
    let session = engine.session(options);
    session.and_then(|mut s| s.generate(request, &mut |_| ControlFlow::Continue(()))).unwrap_or_else(|e| panic!("{e}"))
}

/// The demo from the repository's folder. If it were compiled in, the package for a machine with a GPU would contain it
/// twice.
fn demo(device: &Device) -> Engine {
    Engine::open(&Source::folder(root().join("demo/model")).unwrap(), device).unwrap()
}

fn engine(checkpoint: &str, device: &Device) -> Engine {
    Engine::open(&Source::folder(golden().join("checkpoints").join(checkpoint)).unwrap(), device).unwrap()
}

#[test]
fn the_demo_draws_the_same_pictures() {
    let options = SessionOptions::new(Size::new(64, 64)).batch(2);
    let image = |seed| Image::new("a photo of a doctor").seed(seed);
    let request = Request::new(vec![image(11), image(12)]).steps(25);
    let [ours, truth] = [kernels(), Device::cpu()].map(|device| generate(&demo(&device), options, &request));
    let error = relative_l2(&ours.latents, &truth.latents);
    println!("latents {error:.1e}");
    assert!(error < TOLERANCE, "latents are off by {error:.2e}");
    for (ours, truth) in ours.pictures.iter().zip(&truth.pictures) {
        let off: f64 = ours.rgb.iter().zip(&truth.rgb).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
        let off = off / ours.rgb.len() as f64;
        println!("picture {off:.2} of 255");
        assert!(off < 1.0, "a picture's bytes are off by {off:.2} on average");
    }
}

/// The memory that is planned before anything is allocated is, within 3 %, the memory that the device then counts, also
/// while pictures are made.
#[test]
fn planned_memory_is_what_the_device_counts() {
    for checkpoint in ["sd1", "sdxl"] {
        for options in [
            SessionOptions::new(Size::new(64, 40)).concepts(true),
            SessionOptions::new(Size::new(72, 128)).batch(3).guided(false),
        ] {
            let engine = engine(checkpoint, &Device::kernels(Emulated::new(Limits::A100, Emulated::QUICK)));
            let memory = engine.memory(options).unwrap();
            let off = |used: usize| (used as f64 / memory.total() as f64 - 1.0).abs();
            let mut session = engine.session(options).unwrap();
            let image = Image::new("a doctor").guidance(1.0);
            let request = Request::new(vec![image; options.batch]).steps(2);
            let (mut looks, mut worst) = (0, 0.0f64);
            let mut look = |_| {
                looks += 1;
                worst = worst.max(off(engine.used_memory().unwrap()));
                ControlFlow::Continue(())
            };
            session.generate(&request, &mut look).unwrap();
            assert!(looks > 0 && worst < 0.03, "{checkpoint}: {memory:?} is {worst:.3} off, of {looks} counts");
        }
    }
}

/// The sampler adds noise in every step, and each image has concepts of its own.
#[test]
fn an_image_does_not_depend_on_its_batch() {
    alone_and_in_a_batch("sd1", &[Rng::TorchCpu, Rng::TorchCuda]);
}

#[test]
fn an_image_of_sdxl_does_not_depend_on_its_batch() {
    alone_and_in_a_batch("sdxl", &[Rng::TorchCpu]);
}

fn alone_and_in_a_batch(checkpoint: &str, rngs: &[Rng]) {
    let kernels = engine(checkpoint, &kernels());
    let options = SessionOptions::new(Size::new(40, 56)).batch(3).concepts(true);
    let shape = kernels.bottleneck(options);
    let concept = |i: usize| {
        let numbers = (0..shape.len()).map(|j| ((i * 7 + j) as f32 * 0.37).sin()).collect();
        let ram = Module::with_parameters(Form::Constant, shape, numbers).unwrap();
        Arc::new(Concept::new(Metadata::default(), ram, None))
    };
    // All settings that an image has of its own differ, and guidance multiplies the UNet's error threefold at most.
    let mut images = [
        Image::new("a doctor").seed(7).guidance(2.0).guidance_interval((900.0, 300.0)),
        Image::new("a portrait of a chef").negative("a hat").seed(3).guidance(1.5),
        Image::new("a nurse").seed(7).guidance(1.0),
    ];
    for (i, image) in images.iter_mut().enumerate() {
        image.concepts = (0..i).map(|c| (concept(c), 0.7.into())).collect();
    }
    // Two concepts act in the first of the three steps alone, beside one that acts in all.
    for image in &mut images[1..] {
        image.concepts[0].1.until = 900.0;
    }
    for &rng in rngs {
        let request =
            |images: &[Image]| Request::new(images.to_vec()).steps(3).rng(rng).sampler("euler a".parse().unwrap());
        let batch = generate(&kernels, options, &request(&images));
        let mut always = images.clone();
        always[1].concepts[0].1.until = 0.0;
        assert_ne!(generate(&kernels, options, &request(&always)).latents, batch.latents);
        let one = batch.latents.len() / 3;
        for i in 0..3 {
            let alone = options.batch(1).guided(images[i].guidance != Some(1.0));
            let alone = generate(&kernels, alone, &request(&images[i..=i]));
            assert_eq!(alone.latents, batch.latents[i * one..][..one], "image {i}");
            assert_eq!(alone.pictures[0], batch.pictures[i]);
        }
        let truth = generate(&engine(checkpoint, &Device::cpu()), options, &request(&images));
        let error = relative_l2(&batch.latents, &truth.latents);
        println!("{checkpoint}, {rng:?}: latents {error:.1e}");
        assert!(error < TOLERANCE, "{checkpoint}, {rng:?}: latents are off by {error:.2e}");
    }
}

#[test]
fn impossible_requests_are_refused() {
    let engine = engine("sd1", &kernels());
    let options = SessionOptions::new(Size::new(64, 64));
    let mut session = engine.session(options).unwrap();
    let mut go = |request: Request, flow: ControlFlow<()>| session.generate(&request, &mut |_| flow);
    let fine = Request::from(Image::new("a doctor")).steps(2);
    let next = ControlFlow::Continue(());
    let huge = Request::from(Image::new("a doctor").guidance(3e38)).steps(2);
    let huge = go(huge, next).expect_err("refused");
    assert!(huge.kind() == ErrorKind::NonFinite, "{huge}");
    assert_eq!(go(fine.clone(), ControlFlow::Break(())).expect_err("refused").kind(), ErrorKind::Cancelled);
    assert!(go(fine, next).is_ok());
}

/// A VAE decoder whose residual stream leaves fp16's range, as SDXL's does: the result of the first convolution is
/// `factor` times as large. Only norms read the stream, so the picture hardly changes.
#[test]
fn a_vae_beyond_fp16_decodes() {
    let case = support::cases("vae_sd1_", 1).remove(0);
    let [n, c, h, w] = case.shape("latents")[..] else { panic!("latents are NCHW") };
    let decode = |factor: f32, device: Device| {
        let folder = enlarged("vae", "decoder.conv_in", factor);
        let source = Source::folder(folder.path()).unwrap();
        let path = source.path("vae/config.json");
        let config = VaeConfig::parse(&source.read_text("vae/config.json").unwrap(), &path).unwrap();
        let latents = support::nchw_to_nhwc(&case.floats("latents"), n, c);
        let inputs = HashMap::from([("latents", latents)]);
        let graph = vae_decoder(&config, n, Extent { h, w });
        support::run(&device, graph, &source.tensors("vae").unwrap(), &inputs)["image"].clone()
    };
    // With a factor of 50000, the stream is far beyond 65504, but a 32nd of it, which the kernels carry, is not.
    let error = relative_l2(&decode(5e4, kernels()), &decode(5e4, Device::cpu()));
    println!("beyond fp16 {error:.1e}");
    assert!(error < TOLERANCE, "off by {error:.2e}");
    // Beyond even that, stores saturate: the picture is wrong, but finite.
    assert!(decode(1e9, kernels()).iter().all(|x| x.is_finite()));
}

/// A norm's weights are so large that its result is infinite and the SiLU of it NaN. The conversions to fp16 between
/// the layers must not turn NaN into numbers.
#[test]
fn nan_in_a_network_ends_the_run() {
    let options = SessionOptions::new(Size::new(64, 64));
    // PNDM makes one step more than requested.
    let request = Request::from(Image::new("a doctor")).steps(2);
    for (network, tensor, words) in
        [("unet", "down_blocks.0.resnets.0.norm1.weight", "step 1 of 3"), ("vae", "decoder.conv_norm_out", "the VAE")]
    {
        let folder = enlarged(network, tensor, 2e38);
        let engine = Engine::open(&Source::folder(folder.path()).unwrap(), kernels()).unwrap();
        let run = engine.session(options).unwrap().generate(&request, &mut |_| ControlFlow::Continue(()));
        let error = run.err().unwrap_or_else(|| panic!("{tensor}: a picture"));
        assert!(error.kind() == ErrorKind::NonFinite && error.to_string().contains(words), "{tensor}: {error}");
    }
}

/// A golden checkpoint in which the tensors of a network whose names begin with `prefix` are `factor` times as large.
fn enlarged(network: &str, prefix: &str, factor: f32) -> tempfile::TempDir {
    let folder = support::copy("sd1");
    let file = folder.path().join(network).join("diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let floats = |view: &TensorView| -> Vec<f32> {
        match view.dtype() {
            Dtype::F16 => view.data().chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F32 => bytemuck::pod_collect_to_vec(view.data()),
            other => panic!("{other:?}"),
        }
    };
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let scaled = tensors.iter().map(|(name, view)| {
        let scale = if name.starts_with(prefix) { factor } else { 1.0 };
        let bytes: Vec<u8> = floats(&view).iter().flat_map(|x| (x * scale).to_le_bytes()).collect();
        (name.to_string(), view.shape().to_vec(), bytes)
    });
    let scaled: Vec<_> = scaled.collect();
    let views = scaled.iter().map(|(n, shape, b)| (n, TensorView::new(Dtype::F32, shape.clone(), b).unwrap()));
    std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
    folder
}

/// Two iterations of a training: rollout, targets, both losses and both steps of Adam. Losses are mean squared
/// differences of predictions, whose size is 1 and which fp16 leaves off by about 2e-3. Adam's first steps are the
/// signs of the gradients: if one number in 400 has the wrong sign, a module is off by a tenth.
#[test]
fn the_demo_trains_as_on_the_cpu() {
    let run = |device: &Device| {
        let engine = demo(device);
        let task = Task::toward("a woman", "a person");
        let mut recipe = Recipe::for_task(&task);
        recipe.batch = 1;
        recipe.rollout_steps = 3;
        recipe.latents_per_rollout = 2;
        recipe.lr_ram = 0.2;
        recipe.lr_sam = 0.2;
        let mut trainer = Trainer::new(&engine, task, recipe, 5, Size::new(64, 64)).unwrap();
        let losses: Vec<Losses> = (0..2).map(|_| trainer.iterate().unwrap()).collect();
        (losses, trainer.concept())
    };
    let ((ours, concept), (truth, true_concept)) = (run(&kernels()), run(&Device::cpu()));
    for (ours, truth) in ours.iter().zip(&truth) {
        println!("{ours:?}, on the CPU {truth:?}");
        for (ours, truth) in [(ours.resp, truth.resp), (ours.sem, truth.sem)] {
            assert!((ours.sqrt() - truth.sqrt()).abs() < 2e-3, "a loss of {ours} for {truth}");
        }
    }
    let modules =
        [(&concept.ram, &true_concept.ram), (concept.sam.as_ref().unwrap(), true_concept.sam.as_ref().unwrap())];
    for (ours, truth) in modules {
        let error = relative_l2(&ours.parameters, &truth.parameters);
        println!("module {error:.1e}");
        assert!(error < 0.1, "a module is off by {error:.2e}");
    }
}

/// The host takes no part in a rollout with constant modules: the number of times that an iteration reads from the
/// device and writes to it does not depend on its number of rollout steps. The memory is that which was planned.
#[test]
fn rollouts_wait_for_nothing_but_their_end() {
    let device = Emulated::new(Limits::A100, Emulated::QUICK);
    let counting = Arc::new(Counting { device, reads: AtomicUsize::new(0), writes: AtomicUsize::new(0) });
    let engine = engine("sd1", &Device::kernels(counting.clone()));
    let task = Task::toward("a woman", "a person");
    let mut recipe = Recipe::for_task(&task);
    recipe.batch = 1;
    recipe.rollout_steps = 12;
    recipe.latents_per_rollout = 2;
    let before = engine.used_memory().unwrap();
    let mut trainer = Trainer::new(&engine, task, recipe, 5, Size::new(64, 40)).unwrap();
    let used = engine.used_memory().unwrap() - before;
    let planned = trainer.memory().halves.weights + trainer.memory().halves.activations;
    assert_eq!(used, planned);
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let before = (trainer.times.rollout_steps, counting.counts());
        trainer.iterate().unwrap();
        let steps = trainer.times.rollout_steps - before.0;
        let [reads, writes] = counting.counts();
        let counts = [reads - before.1[0], writes - before.1[1]];
        println!("{steps} steps, reads and writes {counts:?}");
        // An iteration without a rollout step is not comparable.
        if steps > 0 && seen.iter().all(|(other, _)| *other != steps) {
            seen.push((steps, counts));
        }
    }
    assert!(seen.iter().all(|(_, counts)| *counts == seen[0].1), "{seen:?}");
}

/// A device that counts how often the host reads from it and writes to it.
struct Counting {
    device: Arc<dyn cuda::CudaDevice>,
    reads: AtomicUsize,
    writes: AtomicUsize,
}

impl Counting {
    fn counts(&self) -> [usize; 2] {
        [&self.reads, &self.writes].map(|count| count.load(Ordering::Relaxed))
    }
}

impl cuda::CudaDevice for Counting {
    fn name(&self) -> String {
        self.device.name()
    }

    fn limits(&self) -> Limits {
        self.device.limits()
    }

    fn free_bytes(&self) -> Option<usize> {
        self.device.free_bytes()
    }

    fn used_bytes(&self) -> Option<usize> {
        self.device.used_bytes()
    }

    fn allocate(&self, bytes: usize) -> respodiff::Result<u64> {
        self.device.allocate(bytes)
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: the caller's promise.
        unsafe { self.device.free(address) }
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> respodiff::Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.device.upload(address, bytes) }
    }

    unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> respodiff::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.device.download(address, bytes) }
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> respodiff::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device.zero(address, bytes) }
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> respodiff::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device.copy(to, from, bytes) }
    }

    fn tensor_map(&self, tiles: &TensorTiles) -> respodiff::Result<[u64; 16]> {
        self.device.tensor_map(tiles)
    }

    unsafe fn run(&self, launches: &[Launch]) -> respodiff::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device.run(launches) }
    }

    unsafe fn record(self: Arc<Self>, launches: &[Launch]) -> respodiff::Result<Box<dyn Recording>> {
        // SAFETY: the caller's promise.
        unsafe { self.device.clone().record(launches) }
    }

    unsafe fn time(&self, launches: &[Launch], cache: Cache) -> respodiff::Result<Duration> {
        // SAFETY: the caller's promise.
        unsafe { self.device.time(launches, cache) }
    }
}

/// Networks with random weights whose layers have the shapes that the kernels of compute capability 9.0 require, unlike
/// those of the recorded checkpoints: a UNet with heads of 64 channels, concatenated sources, upsampled sources and a
/// shifted bottleneck, and a VAE decoder.
#[test]
fn networks_on_the_kernels_of_an_h100() {
    let unet_config = r#"{"_class_name": "UNet2DConditionModel", "sample_size": 16, "cross_attention_dim": 64,
        "attention_head_dim": [1, 2], "block_out_channels": [64, 128], "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}"#;
    let vae_config = r#"{"_class_name": "AutoencoderKL", "block_out_channels": [64, 64], "layers_per_block": 1,
        "latent_channels": 4, "norm_num_groups": 8, "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;
    let path = Path::new("config.json");
    let unet_config = UNetConfig::parse(unet_config, path).unwrap();
    let graphs = [
        ("unet", unet(&unet_config, UNetInput { rows: 2, h: 16, w: 10, tokens: 77, shifted: 1 }), "sample"),
        ("vae", vae_decoder(&VaeConfig::parse(vae_config, path).unwrap(), 1, Extent { h: 33, w: 26 }), "image"),
    ];
    // With few multiprocessors, large tiles are the fastest for small layers too.
    let few = Limits { multiprocessors: 4, ..Limits::H100 };
    let hopper = support::gpu().unwrap_or_else(|| Emulated::new(few, Emulated::QUICK));
    for (name, graph, output) in graphs {
        let run = |device: &Device| {
            let plan = device.plan(graph.clone(), UNET_CONSTANTS);
            let weights = device.weights(graph.weights(), &Tensors::random(), &[], respodiff::Precision::Full).unwrap();
            let mut executor = device.executor(plan, &weights).unwrap();
            for input in ["sample", "timestep", "encoder_hidden_states", "shift", "latents"] {
                let Some(id) = graph.find_input(input) else { continue };
                let length = graph.shape(id).len();
                let number = |i: usize| if input == "timestep" { 500.0 } else { (i as f32 * 0.7).sin() };
                executor.write(input, &(0..length).map(number).collect::<Vec<_>>()).unwrap();
            }
            executor.prologue().unwrap();
            executor.step().unwrap();
            executor.read(output).unwrap()
        };
        let launched = lowered(&graph, &[], few).unwrap();
        let launched =
            launched.iter().flat_map(|node| &node.launches).filter(|launch| launch.kernel.contains("hopper"));
        let launched = launched.count();
        println!("{name}: {launched} launches of kernels of 9.0");
        assert!(launched > 2, "{name}");
        let error = relative_l2(&run(&Device::kernels(hopper.clone())), &run(&Device::cpu()));
        println!("{name} {error:.1e}");
        assert!(error < TOLERANCE, "{name} is off by {error:.2e}");
    }
}
